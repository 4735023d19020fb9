"""The handler in Ignite's `Checkpoint`: what is saved, loaded, refused, and in which order."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("ignite")

from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from ignite.handlers import EMAHandler as IgniteHandler

from ema_triton import EMAHandler
from ema_triton.schedules import Constant, LinearWarmup
from tests.engines import (
    BATCHES,
    SCHEDULES,
    batches,
    changed,
    control,
    linear,
    network,
    probing_engine,
    same,
    shared_storage,
    unit_model,
    values,
)

pytestmark = pytest.mark.usefixtures("one_thread")
ITERATION, EPOCH = Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED


@dataclass
class Script:
    """All that a training script sets up."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    handler: Any
    trainer: Engine
    momenta: list[float]
    to_save: dict[str, Any]

    def attach(self) -> None:
        self.handler.attach(self.trainer, name="mine")
        self.trainer.add_event_handler(
            Events.ITERATION_COMPLETED,
            lambda: self.momenta.append(self.trainer.state.mine),
        )

    def run(self, epochs: int) -> None:
        self.trainer.run(batches(), max_epochs=epochs)


def script(seed: int, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Script:
    torch.manual_seed(seed)
    model = network().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    handler = EMAHandler(model, **kwargs)

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[0].to(dtype)), batch[1]).backward()
        optimizer.step()
        if handler.handle_buffers == "ema_train":
            with torch.no_grad():
                handler.ema_model(batch[0].to(handler.ema_model[1].weight.dtype))

    trainer = Engine(step)
    to_save = {"model": model, "optimizer": optimizer, "trainer": trainer, "ema": handler}
    return Script(model, optimizer, handler, trainer, [], to_save)


def save(script: Script, folder: Path, keys: list[str] | None = None) -> Path:
    to_save = {key: script.to_save[key] for key in keys or script.to_save}
    checkpoint = Checkpoint(
        to_save,
        DiskSaver(str(folder), create_dir=True, require_empty=False),
        global_step_transform=lambda engine, event: engine.state.iteration,
    )
    checkpoint(script.trainer)
    return folder / str(checkpoint.last_checkpoint)


def resume(script: Script, path: Path, keys: list[str] | None = None) -> None:
    state = torch.load(path, weights_only=True)
    to_load = {key: script.to_save[key] for key in keys or script.to_save}
    Checkpoint.load_objects(to_load=to_load, checkpoint=state)


RESUMED: dict[str, dict[str, Any]] = {
    "default": {},
    "warm-up": {"momentum": 0.05, "momentum_warmup": 0.9, "warmup_iters": 9},
    "update": {
        "momentum": 0.05,
        "momentum_warmup": 0.9,
        "warmup_iters": 9,
        "handle_buffers": "update",
    },
    "ema_train": {"momentum": 0.1, "handle_buffers": "ema_train"},
    "fp32 of bf16": {
        "momentum": 0.001,
        "momentum_warmup": 0.9,
        "warmup_iters": 9,
        "ema_dtype": torch.float32,
        "dtype": torch.bfloat16,
        "handle_buffers": "update",
    },
} | {type(schedule).__name__: {"schedule": schedule} for schedule in SCHEDULES}


@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize("case", RESUMED)
def test_a_cut_run_equals_an_uncut_one(case: str, attach_first: bool, tmp_path: Path) -> None:
    uncut = script(0, **RESUMED[case])
    uncut.attach()
    uncut.run(3)
    assert len(uncut.momenta) == 3 * BATCHES

    first = script(0, **RESUMED[case])
    first.attach()
    first.run(1)
    path = save(first, tmp_path)
    second = script(99, **RESUMED[case])
    if attach_first:
        second.attach()
    resume(second, path)
    assert changed(values(first.handler.ema_model), second.handler.ema_model) == []
    assert second.handler.update_index == BATCHES
    if not attach_first:
        second.attach()
    second.run(3)

    assert first.momenta + second.momenta == uncut.momenta
    assert changed(values(uncut.model), second.model) == []
    assert changed(values(uncut.handler.ema_model), second.handler.ema_model) == []
    assert second.handler.update_index == uncut.handler.update_index == 3 * BATCHES


def test_the_cut_is_noticed_without_the_handlers_state(tmp_path: Path) -> None:
    uncut = script(0, **RESUMED["warm-up"])
    uncut.attach()
    uncut.run(3)
    first = script(0, **RESUMED["warm-up"])
    first.attach()
    first.run(1)
    second = script(99, **RESUMED["warm-up"])
    resume(second, save(first, tmp_path), ["model", "optimizer", "trainer"])
    second.attach()
    second.run(3)
    assert changed(values(uncut.model), second.model) == []
    assert first.momenta + second.momenta != uncut.momenta
    assert "1.weight" in changed(values(uncut.handler.ema_model), second.handler.ema_model)


@control
def test_control_ignites_warmup_restarts(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="state_dict"):
        Checkpoint({"ema": IgniteHandler(unit_model())}, DiskSaver(str(tmp_path)))
    used = []
    for _ in range(2):
        handler = IgniteHandler(unit_model(), 0.1, 0.5, 5)
        engine, seen = probing_engine(handler)
        handler.attach(engine)
        engine.run(range(2))
        used += seen[0]
    assert used == same(linear(0.5, 0.1, 5, 2) * 2)


@pytest.mark.parametrize("key", ["ema", "ema_handler", "handler", "ema_model"])
def test_the_handler_alone_in_a_checkpoint(key: str, tmp_path: Path) -> None:
    # Ignite saves a single object's state itself, and looks for the key in it when loading.
    first = script(0, momentum=0.3)
    first.attach()
    first.run(1)
    first.to_save[key] = first.handler
    path = save(first, tmp_path, [key])
    second = script(1, momentum=0.3)
    second.to_save[key] = second.handler
    resume(second, path, [key])
    assert changed(values(first.handler.ema_model), second.handler.ema_model) == []
    assert second.handler.update_index == BATCHES
    assert shared_storage(second.handler) == []


def test_a_state_is_independent_once_saved(tmp_path: Path) -> None:
    first = script(0, momentum=0.3)
    first.attach()
    first.run(1)
    path = tmp_path / "ema.pt"
    torch.save(first.handler.state_dict(), path)
    second = script(1, momentum=0.3)
    second.handler.load_state_dict(torch.load(path, weights_only=True))
    before = values(second.handler.ema_model)
    first.run(2)
    assert changed(before, second.handler.ema_model) == []
    assert changed(before, first.handler.ema_model) != []


def test_loading_a_state_directly_does_not_tie_two_handlers() -> None:
    first, second = script(0, momentum=0.3), script(1, momentum=0.3)
    second.handler.load_state_dict(first.handler.state_dict())
    before = values(second.handler.ema_model)
    assert changed(values(first.handler.ema_model), second.handler.ema_model) == []
    first.attach()
    first.run(1)
    assert changed(before, second.handler.ema_model) == []


@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize(
    ("saved", "other"),
    [
        (Constant(0.3), Constant(0.7)),
        (LinearWarmup(0.9, 0.1, 7), Constant(0.7)),
        (Constant(0.3), LinearWarmup(0.9, 0.1, 7)),
        (LinearWarmup(0.9, 0.1, 7), LinearWarmup(0.9, 0.1, 70)),
    ],
)
def test_the_saved_schedule_wins_with_a_warning(
    saved: Callable[[int], float], other: Callable[[int], float], attach_first: bool
) -> None:
    first = script(0, schedule=saved)
    first.attach()
    first.run(1)
    second = script(0, schedule=other)
    if attach_first:
        second.attach()
    with pytest.warns(UserWarning, match="schedule") as caught:
        second.handler.load_state_dict(first.handler.state_dict())
    assert repr(saved) in str(caught[0].message)
    if not attach_first:
        second.attach()
    second.run(1)
    assert second.momenta == [saved(index) for index in range(BATCHES + 1, 2 * BATCHES + 1)]


def test_arguments_that_mean_the_same_do_not_warn() -> None:
    first = script(0, momentum=0.1, momentum_warmup=0.9, warmup_iters=7)
    second = script(0, schedule=LinearWarmup(0.9, 0.1, 7))
    second.handler.load_state_dict(first.handler.state_dict())
    assert second.handler.schedule == first.handler.schedule


def test_a_function_is_not_saved_but_its_index_is(tmp_path: Path) -> None:
    def schedule(index: int) -> float:
        return 1 / (1 + index)

    first = script(0, schedule=schedule)
    first.attach()
    first.run(1)
    path = save(first, tmp_path)
    second = script(1, schedule=schedule)
    resume(second, path)
    second.attach()
    second.run(2)
    assert second.momenta == [schedule(index) for index in range(5, 9)]


def wrong_shape(state: Any) -> Any:
    """The same state with one tensor of another shape."""
    if isinstance(state, dict):
        return {
            key: torch.zeros(9, 9) if key == "3.weight" else wrong_shape(value)
            for key, value in state.items()
        }
    return state


def missing_name(state: Any) -> Any:
    if isinstance(state, dict):
        return {k: missing_name(value) for k, value in state.items() if k != "3.weight"}
    return state


@pytest.mark.parametrize("damage", [wrong_shape, missing_name])
def test_a_state_that_does_not_fit_names_the_tensor(damage: Callable[[Any], Any]) -> None:
    first = script(0, schedule=LinearWarmup(0.9, 0.1, 7))
    first.attach()
    first.run(1)
    second = script(1, schedule=LinearWarmup(0.9, 0.1, 7))
    state = damage(first.handler.state_dict())
    before = values(second.handler.ema_model)
    with pytest.raises(ValueError, match=r"3\.weight"):
        second.handler.load_state_dict(state)
    assert changed(before, second.handler.ema_model) == []
    assert second.handler.update_index == 0
    second.handler.load_state_dict(first.handler.state_dict())  # the damage was to the copy


def test_no_part_of_a_damaged_state_is_loaded() -> None:
    first = script(0, schedule=Constant(0.3))
    first.attach()
    first.run(1)
    whole = first.handler.state_dict()
    assert len(whole) >= 3
    for key in whole:
        second = script(1, schedule=Constant(0.7))
        before = values(second.handler.ema_model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match="state"):
                second.handler.load_state_dict({k: v for k, v in whole.items() if k != key})
        assert changed(before, second.handler.ema_model) == []
        assert second.handler.update_index == 0
        assert second.handler.schedule == Constant(0.7)


@pytest.mark.parametrize(
    "state", [{}, {"0.weight": torch.zeros(3)}, {"ema": network().state_dict()}]
)
def test_something_else_is_not_a_state(state: dict[str, Any]) -> None:
    handler = EMAHandler(network(), 0.3)
    before = values(handler.ema_model)
    with pytest.raises(ValueError, match="state"):
        handler.load_state_dict(state)
    assert changed(before, handler.ema_model) == []


def test_what_was_saved_of_ignites_ema_model_is_a_state(tmp_path: Path) -> None:
    theirs, ours = IgniteHandler(network(), 0.3), EMAHandler(network(), 0.3)
    assert changed(values(ours.ema_model), theirs.ema_model) != []
    checkpoint = Checkpoint({"ema": theirs.ema_model}, DiskSaver(tmp_path))
    checkpoint(Engine(lambda engine, batch: None))
    state = torch.load(tmp_path / checkpoint.last_checkpoint, weights_only=True)
    Checkpoint.load_objects({"ema": ours}, {"ema": state})
    assert changed(values(ours.ema_model), theirs.ema_model) == []
    assert ours.schedule == Constant(0.3)


def test_checkpoints_during_a_run(tmp_path: Path) -> None:
    """Ignite's own way: a Checkpoint attached to the trainer, written while training goes on."""
    uncut = script(0, **RESUMED["update"])
    uncut.attach()
    uncut.trainer.add_event_handler(
        Events.EPOCH_COMPLETED,
        Checkpoint(
            uncut.to_save,
            DiskSaver(str(tmp_path), require_empty=False),
            n_saved=None,
            global_step_transform=lambda engine, event: engine.state.epoch,
        ),
    )
    uncut.run(3)
    paths = sorted(tmp_path.glob("*.pt"))
    assert len(paths) == 3
    for epoch, path in enumerate(paths, start=1):
        again = script(99, **RESUMED["update"])
        resume(again, path)
        again.attach()
        if epoch < 3:
            again.run(3)
        assert uncut.momenta[epoch * BATCHES :] == again.momenta
        assert changed(values(uncut.handler.ema_model), again.handler.ema_model) == []


@pytest.mark.parametrize("what", ["handler", "ema", "ema_model", "model"])
@pytest.mark.parametrize(
    ("of_checkpoint", "of_handler", "together"),
    [
        (ITERATION, ITERATION, True),
        (ITERATION(every=2), ITERATION, True),
        (ITERATION(every=4), ITERATION(every=2), True),
        (EPOCH, EPOCH, True),
        (EPOCH, EPOCH | ITERATION, True),
        (EPOCH, ITERATION, False),
        (ITERATION, Events.ITERATION_STARTED, False),
    ],
)
@pytest.mark.parametrize("checkpoint_first", [True, False])
def test_a_checkpoint_that_would_run_before_the_update_is_warned_of(
    what: str, of_checkpoint: Any, of_handler: Any, together: bool, checkpoint_first: bool
) -> None:
    handler = EMAHandler(nn.Linear(2, 2), 0.5)
    thing = {"handler": handler, "ema_model": handler.ema_model}.get(what)
    trainer, indices = Engine(lambda engine, batch: None), []
    checkpoint = Checkpoint(
        {"it": thing or getattr(handler.ema, what, handler.ema)},
        lambda state, *_: indices.append(state.get("update_index")),
        n_saved=None,
    )
    if not checkpoint_first:
        handler.attach(trainer, event=of_handler)
    trainer.add_event_handler(of_checkpoint, checkpoint)
    if checkpoint_first:
        late = together and what != "model"
        with pytest.warns(UserWarning, match="the same event") if late else nullcontext():
            handler.attach(trainer, event=of_handler)
    trainer.run([None] * 4, max_epochs=2)
    if what == "handler" and of_checkpoint is of_handler:  # what is warned of is so
        assert indices == [*range(1 - checkpoint_first, len(indices) + 1 - checkpoint_first)]
