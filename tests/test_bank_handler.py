"""`EMAHandler` with several schedules: a bank in an Ignite engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("ignite")

from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver

from ema_triton import Constant, EMABank, EMAHandler, HalfLife, LinearWarmup, ModelEMA
from tests.banks import assert_equal
from tests.engines import batches, network, sgd_step
from tests.states import PRECISIONS, same

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULES = {"0.05": LinearWarmup(0.9, 0.1, 6), "0.10": Constant(0.25), "long": HalfLife(9)}


class Script:
    """A training with a bank's handler, beside single EMAs updated by hand."""

    def __init__(self, start: int = 0, **options: Any) -> None:
        torch.manual_seed(start)
        self.model = network()
        self.handler = EMAHandler(self.model, schedule=SCHEDULES, **options)
        self.singles = {name: ModelEMA(self.model, **options) for name in SCHEDULES}
        for name, ema in self.singles.items():
            ema.schedule = SCHEDULES[name]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=0.5)
        self.trainer = Engine(self.step)
        self.shown: list[dict[str, float]] = []

    def step(self, engine: Engine, batch: Any) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(batch[0]), batch[1]).backward()
        self.optimizer.step()

    def attach(self, **options: Any) -> Script:
        self.handler.attach(self.trainer, name="momenta", **options)
        event = options.get("event", Events.ITERATION_COMPLETED)
        self.trainer.add_event_handler(event, self.note)
        return self

    def note(self) -> None:
        self.shown.append(dict(self.trainer.state.momenta))
        for ema in self.singles.values():
            ema.update(ema.next_momentum())

    @property
    def to_save(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "trainer": self.trainer,
            "ema": self.handler,
        }


def momenta(updates: range) -> list[dict[str, float]]:
    return [{name: schedule(t) for name, schedule in SCHEDULES.items()} for t in updates]


CASES = {
    "plain": {},
    "averaged buffers": {"handle_buffers": "update"},
    "no module": {"as_module": False},
}


@pytest.mark.parametrize("case", [*CASES, *PRECISIONS])
def test_a_training_averages_by_every_schedule(case: str) -> None:
    script = Script(**{**CASES, **PRECISIONS}[case]).attach()
    handler, state = script.handler, script.trainer.state
    assert isinstance(handler.ema, EMABank)
    assert [*handler.ema] == [*SCHEDULES]
    assert handler.model is script.model
    script.trainer.run(batches(), max_epochs=2)
    assert script.shown == momenta(range(1, 9))
    assert_equal(handler.ema, script.singles)
    assert handler.update_index == handler.ema.update_index == 8
    assert type(state.momenta) is dict
    assert handler.schedule == SCHEDULES


def test_the_state_shows_the_momenta_from_the_start_of_the_run_on() -> None:
    script = Script()
    script.handler.attach(script.trainer, name="momenta")
    seen = []
    script.trainer.add_event_handler(
        Events.ITERATION_STARTED, lambda: seen.append(script.trainer.state.momenta)
    )
    script.trainer.run(batches(), max_epochs=1)
    assert all({*shown} == {*SCHEDULES} for shown in seen)
    assert all(isinstance(value, float) for shown in seen for value in shown.values())


def test_it_updates_at_the_event_it_is_given() -> None:
    script = Script().attach(event=Events.ITERATION_COMPLETED(every=2))
    script.trainer.run(batches(), max_epochs=3)
    assert script.shown == momenta(range(1, 7))
    assert_equal(script.handler.ema, script.singles)
    script.handler.detach()
    script.trainer.run(batches(), max_epochs=4)
    assert script.handler.update_index == 6


def test_there_is_no_ema_model_but_one_of_each_average() -> None:
    handler = Script().handler
    with pytest.raises(RuntimeError, match=r"0\.05, 0\.10, long.*\['0\.05'\]\.ema_model"):
        _ = handler.ema_model
    assert isinstance(handler.ema["0.10"].ema_model, nn.Module)


def test_the_schedules_may_be_assigned_while_it_runs() -> None:
    script = Script().attach()
    script.trainer.run(batches(), max_epochs=1)
    new = {name: Constant(0.5) for name in SCHEDULES}
    script.handler.schedule = new
    for ema in script.singles.values():
        ema.schedule = Constant(0.5)
    assert script.handler.schedule == new
    script.trainer.run(batches(), max_epochs=2)
    assert script.shown[4:] == [dict.fromkeys(SCHEDULES, 0.5)] * len(script.shown[4:])
    assert len(script.shown) > 4
    assert_equal(script.handler.ema, script.singles)
    for wrong, error, text in [
        ({"0.05": Constant(0.5)}, ValueError, r"'0\.05'.*this bank has '0\.05', '0\.10', 'long'"),
        (Constant(0.5), TypeError, "schedules must map names"),
    ]:
        with pytest.raises(error, match=text):
            script.handler.schedule = wrong
        assert script.handler.schedule == new


@pytest.mark.parametrize("case", ["plain", *PRECISIONS])
def test_a_run_resumed_from_ignites_checkpoint_goes_on_bit_by_bit(
    case: str, tmp_path: Path
) -> None:
    options = {**CASES, **PRECISIONS}[case]
    whole = Script(**options).attach()
    whole.trainer.run(batches(), max_epochs=3)
    first = Script(**options).attach()
    saver = Checkpoint(first.to_save, DiskSaver(str(tmp_path), create_dir=True))
    first.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), saver)
    first.trainer.run(batches(), max_epochs=3)
    resumed = Script(5, **{**options, "seed": 99})
    state = torch.load(tmp_path / str(saver.last_checkpoint), weights_only=True)
    Checkpoint.load_objects(to_load=resumed.to_save, checkpoint=state)
    assert resumed.handler.update_index == 8
    resumed.attach()
    resumed.trainer.run(batches(), max_epochs=3)
    assert resumed.shown == whole.shown[8:] == momenta(range(9, 13))
    assert same(resumed.handler.state_dict(), whole.handler.state_dict())
    assert not same(resumed.handler.state_dict(), state["ema"])


def test_a_checkpoint_of_other_averages_loads_nothing() -> None:
    script = Script()
    state = EMABank(script.model, {"0.05": Constant(0.5)}).state_dict()
    before = script.handler.state_dict(clone=True)
    with pytest.raises(ValueError, match=r"'0\.05'.*'0\.10'"):
        script.handler.load_state_dict(state)
    with pytest.raises(ValueError, match=r"EMABank\.state_dict\(\)"):
        script.handler.load_state_dict(EMAHandler(script.model).state_dict())
    assert same(script.handler.state_dict(), before)
    with pytest.raises(ValueError, match="averages"):
        EMAHandler(script.model).load_state_dict(before)


@pytest.mark.parametrize("average", SCHEDULES)
def test_an_evaluator_sees_the_average_it_is_given(average: str) -> None:
    script = Script().attach()
    script.trainer.run(batches(), max_epochs=2)
    seen = []
    evaluator = Engine(lambda engine, batch: seen.append(script.model[1].weight.detach().clone()))
    script.handler.attach_swap(evaluator, average=average)
    online = script.model[1].weight.detach().clone()
    evaluator.run([0])
    (found,) = seen
    for name, ema in script.singles.items():
        weight = ema.state_dict()["weights"]["1.weight"]
        assert torch.equal(found, weight) == (name == average)
    assert torch.equal(script.model[1].weight, online)


def test_two_evaluators_see_an_average_each_in_one_training() -> None:
    script = Script().attach()
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in SCHEDULES}
    for name in SCHEDULES:
        evaluator = Engine(
            lambda engine, batch, name=name: seen[name].append(script.model[1].weight.clone())
        )
        script.handler.attach_swap(evaluator, average=name)
        script.trainer.add_event_handler(
            Events.EPOCH_COMPLETED, lambda _, evaluator=evaluator: evaluator.run([0])
        )
    script.trainer.run(batches(), max_epochs=2)
    for name, ema in script.singles.items():
        assert torch.equal(seen[name][-1], ema.ema_model[1].weight)
    assert_equal(script.handler.ema, script.singles)


def test_which_average_to_evaluate_has_to_be_told() -> None:
    handler = Script().handler
    evaluator = Engine(lambda engine, batch: None)
    with pytest.raises(ValueError, match=r"average=.*0\.05.*0\.10.*long"):
        handler.attach_swap(evaluator)
    for wrong in ("0.5", 0.05):
        with pytest.raises((KeyError, ValueError), match=r"0\.05.*0\.10.*long"):
            handler.attach_swap(evaluator, average=wrong)
    handler.attach_swap(evaluator, average="long")  # nothing was attached by those
    evaluator.run([0])
    single = EMAHandler(network())
    with pytest.raises((TypeError, ValueError), match="average"):
        single.attach_swap(Engine(lambda engine, batch: None), average="0.05")


def test_several_schedules_go_with_no_momentum_beside_them() -> None:
    for given in ({"momentum": 0.1}, {"momentum_warmup": 0.1, "warmup_iters": 3}):
        with pytest.raises((TypeError, ValueError), match="schedule"):
            EMAHandler(network(), **given, schedule=SCHEDULES)
    with pytest.raises(ValueError, match="schedules must"):
        EMAHandler(network(), schedule={})
    with pytest.raises(ValueError, match="ema_model"):
        EMAHandler(network(), schedule=SCHEDULES, ema_model=network())


def test_momentum_and_warm_up_are_not_those_of_one() -> None:
    handler = Script().handler
    assert handler.momentum is None
    assert handler.momentum_warmup is None
    assert handler.warmup_iters is None
    with pytest.raises((AttributeError, TypeError, ValueError), match="schedule"):
        handler.momentum = 0.1
    assert handler.schedule == SCHEDULES


def test_a_single_schedule_is_todays_handler() -> None:
    model = network()
    handler = EMAHandler(model, schedule=SCHEDULES["0.10"])
    trainer = Engine(sgd_step(model))
    handler.attach(trainer, name="momenta")
    trainer.run(batches(), max_epochs=1)
    assert isinstance(handler.ema, ModelEMA)
    assert trainer.state.momenta == 0.25
    with pytest.raises(TypeError, match="must be a function"):
        handler.schedule = SCHEDULES


class Overridden(EMAHandler):
    """As subclasses of Ignite's do, after which the handler counts the event."""

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        self.ema.update({**getattr(engine.state, name), "long": 0.5})


def test_a_subclass_may_update_with_other_momenta() -> None:
    model = network()
    handler, single = Overridden(model, schedule=SCHEDULES), ModelEMA(model)
    trainer = Engine(sgd_step(model))
    handler.attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: single.update(0.5))
    single.update_index = handler.ema["long"].update_index = 7  # as loaded from another run
    trainer.run(batches(), max_epochs=1)
    assert same(handler.ema["long"].state_dict()["weights"], single.state_dict()["weights"])
    assert [ema.update_index for ema in handler.ema.values()] == [4, 4, 11]


def test_sync_copies_into_every_average() -> None:
    script = Script().attach()
    script.trainer.run(batches(), max_epochs=1)
    script.handler.sync()
    for ema in script.handler.ema.values():
        assert torch.equal(ema.ema_model[1].weight, script.model[1].weight)


def test_an_update_inside_of_a_swap_stops_the_training() -> None:
    script = Script()
    script.trainer = Engine(lambda engine, batch: None)
    script.attach()
    with (
        script.handler.ema["long"].swapped(),
        pytest.raises(RuntimeError, match=r"update\(\) while .* swapped"),
    ):
        script.trainer.run(batches(), max_epochs=1)
    assert script.handler.update_index == 0
