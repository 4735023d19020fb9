"""A `Checkpoint` on the evaluator that `attach_swap` makes score the EMA: what it saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("ignite")

from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver, ModelCheckpoint

from ema_triton import EMAHandler

TEXT = r"The Checkpoint on this evaluator saves the online model \('model'\) under the EMA's score"


def score(engine: Engine) -> float:
    return 1.0


class Case:
    """A model, its handler, and an evaluator whose output is the model's only weight."""

    def __init__(self, **options: Any) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        self.handler = EMAHandler(self.model, **options)
        self.model.weight.data.fill_(1.0)
        self.evaluator = Engine(lambda engine, batch: self.model.weight.item())

    def add(self, saver: Checkpoint, event: Any = Events.COMPLETED, *args: Any) -> Case:
        self.evaluator.add_event_handler(event, saver, *args)
        return self

    def checkpoint(self, folder: Path, **to_save: Any) -> Checkpoint:
        saver = DiskSaver(folder, require_empty=False)
        return Checkpoint(to_save, saver, score_function=score)


def silent(case: Case, runs: int = 2) -> None:
    """Warnings are errors here."""
    for _ in range(runs):
        case.evaluator.run([0], max_epochs=2)


def wrapped(model: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Identity(), model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "not wrapped": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "inside another module": wrapped,
}


@pytest.mark.parametrize("options", ["a copy", "as_module=False", "given"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_online_model_under_the_emas_score_is_warned_of(
    tmp_path: Path, wrap: str, options: str
) -> None:
    given = {"ema_model": nn.Linear(1, 1, bias=False)} if options == "given" else {}
    case = Case(as_module=options != "as_module=False", **given)
    case.add(case.checkpoint(tmp_path, model=WRAPPERS[wrap](case.model), other=nn.Linear(2, 2)))
    with pytest.warns(UserWarning, match=TEXT) as caught:
        case.handler.attach_swap(case.evaluator)
    (warned,) = caught
    assert warned.filename == __file__
    said = str(warned.message)
    assert "swapped back before COMPLETED" in said
    assert "{'ema': handler}" in said
    assert ("handler.ema_model" in said) == (options != "as_module=False")
    silent(case)
    (path,) = tmp_path.iterdir()
    (weight,) = torch.load(path)["model"].values()
    assert weight.item() == 1.0  # and so it is
    assert case.evaluator.state.output != 1.0


def test_ddp_is_seen_through(tmp_path: Path) -> None:
    case = Case()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(case.model)
        case.add(Checkpoint({"model": ddp}, lambda *_: None, score_function=score))
        with pytest.warns(UserWarning, match=TEXT):
            case.handler.attach_swap(case.evaluator)
    finally:
        torch.distributed.destroy_process_group()


def test_one_attached_afterwards_is_warned_of_once_when_the_run_begins(tmp_path: Path) -> None:
    case = Case()
    case.handler.attach_swap(case.evaluator)
    silent(case)
    case.add(case.checkpoint(tmp_path, model=case.model))
    with pytest.warns(UserWarning, match=TEXT) as caught:
        case.evaluator.run([0], max_epochs=2)
    assert len(caught) == 1
    silent(case)
    case.add(case.checkpoint(tmp_path, net=case.model, model=case.model))
    with pytest.warns(UserWarning, match=r"online model \('net'\)") as caught:
        case.evaluator.run([0])
    assert len(caught) == 1
    silent(case)


def test_a_warning_that_is_an_error_leaves_the_weights_alone(tmp_path: Path) -> None:
    case = Case()
    case.handler.attach_swap(case.evaluator)
    case.add(case.checkpoint(tmp_path, model=case.model))
    with pytest.raises(UserWarning, match=TEXT):
        case.evaluator.run([0])
    assert case.model.weight.item() == 1.0
    silent(case)
    assert case.evaluator.state.output != 1.0


EVENTS = {
    "completed": Events.COMPLETED,
    "filtered": Events.COMPLETED(every=1),
    "one of several": Events.EPOCH_COMPLETED(every=100) | Events.COMPLETED,
    "terminated": Events.TERMINATE,
}


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_after_the_swap_counts(tmp_path: Path, event: str) -> None:
    case = Case()
    case.add(case.checkpoint(tmp_path, model=case.model), EVENTS[event])
    with pytest.warns(UserWarning, match=TEXT):
        case.handler.attach_swap(case.evaluator)


@pytest.mark.parametrize("given", ["args", "kwargs"])
def test_a_model_checkpoint_is_one_too(tmp_path: Path, given: str) -> None:
    case = Case()
    saver = ModelCheckpoint(tmp_path, score_function=score)
    objects = {"model": case.model}
    if given == "args":
        case.evaluator.add_event_handler(Events.COMPLETED, saver, objects)
    else:
        case.evaluator.add_event_handler(Events.COMPLETED, saver, to_save=objects)
    with pytest.warns(UserWarning, match=TEXT):
        case.handler.attach_swap(case.evaluator)


RIGHT: dict[str, Callable[[Case], dict[str, Any]]] = {
    "the handler": lambda case: {"ema": case.handler},
    "its ema": lambda case: {"ema": case.handler.ema},
    "ema_model": lambda case: {"model": case.handler.ema_model},
    "compiled ema_model": lambda case: {
        "model": torch.compile(case.handler.ema_model, backend="eager")
    },
    "both": lambda case: {"model": case.model, "ema": case.handler},
    "both models": lambda case: {"model": case.model, "ema": case.handler.ema_model},
    "others": lambda case: {
        "model": nn.Linear(1, 1, bias=False),
        "optimizer": torch.optim.SGD(case.model.parameters(), lr=0.1),
    },
}


@pytest.mark.parametrize("objects", RIGHT)
def test_what_is_right_is_not_warned_of(tmp_path: Path, objects: str) -> None:
    case = Case()
    case.add(case.checkpoint(tmp_path, **RIGHT[objects](case)))
    case.handler.attach_swap(case.evaluator)
    silent(case)


def test_a_checkpoint_of_the_training_is_not_warned_of(tmp_path: Path) -> None:
    """Without a score, it saves the online model at each evaluation, as it should."""
    case = Case()
    case.add(Checkpoint({"model": case.model}, DiskSaver(tmp_path)))
    trainer = Engine(lambda engine, batch: None)
    trainer.add_event_handler(Events.COMPLETED, case.checkpoint(tmp_path, model=case.model))
    case.handler.attach_swap(case.evaluator)
    silent(case)


def test_inside_the_swap_the_online_models_own_warning_speaks(tmp_path: Path) -> None:
    """At EPOCH_COMPLETED the online model holds the EMA's weights, and they are saved."""
    case = Case()
    case.add(case.checkpoint(tmp_path, model=case.model), Events.EPOCH_COMPLETED)
    case.handler.attach_swap(case.evaluator)
    with pytest.warns(UserWarning, match="while it holds the EMA's weights") as caught:
        case.evaluator.run([0])
    assert len(caught) == 1
    (path,) = tmp_path.iterdir()
    assert torch.load(path)["weight"].item() == case.handler.ema_model.weight.item() != 1.0


@pytest.mark.parametrize("key", ["ema", "model"])
def test_the_best_checkpoint_holds_what_was_scored(tmp_path: Path, key: str) -> None:
    case = Case(momentum=0.5)
    to_save = {"ema": case.handler} if key == "ema" else {"model": case.handler.ema_model}
    case.add(case.checkpoint(tmp_path, **to_save))
    case.handler.attach_swap(case.evaluator)
    for value in (3.0, 5.0):
        case.model.weight.data.fill_(value)
        case.handler.ema.update(0.5)
    silent(case)
    scored = case.evaluator.state.output
    (path,) = tmp_path.iterdir()
    saved = torch.load(path)
    weight = saved["weights"]["weight"] if key == "ema" else saved["weight"]
    assert weight.item() == scored == case.handler.ema_model.weight.item()
    assert case.model.weight.item() == 5.0
