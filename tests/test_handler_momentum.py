"""The momentum that `engine.state` shows and the handler applies: constant, warm-up, schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("ignite")

from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler as IgniteHandler
from ignite.handlers import LambdaStateScheduler

from ema_triton import EMAHandler
from ema_triton.schedules import Constant, LinearWarmup
from tests.engines import SCHEDULES, control, linear, probing_engine, same, unit_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_probe_sees_what_is_applied() -> None:
    handler = EMAHandler(unit_model(), momentum=0.25)
    engine, used = probing_engine(handler)
    handler.attach(engine, event=Events.ITERATION_COMPLETED(every=2))
    engine.run(range(5))
    assert used == [[0.0, 0.25, 0.0, 0.25, 0.0]]


def test_state_shows_the_constant_momentum() -> None:
    handler = EMAHandler(unit_model(), momentum=0.002)
    engine, used = probing_engine(handler)
    assert not hasattr(engine.state, "mine")
    handler.attach(engine, name="mine")
    assert engine.state.mine == 0.002
    assert not hasattr(engine.state, "ema_momentum")
    engine.run(range(3))
    assert engine.state.mine == 0.002
    assert used == [[0.002] * 3]


def test_state_keeps_the_last_momentum_between_updates() -> None:
    handler = EMAHandler(unit_model(), 0.1, 0.5, 5)
    engine, used = probing_engine(handler)
    handler.attach(engine, event=Events.ITERATION_COMPLETED(every=2))
    shown = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: shown.append(engine.state.ema_momentum)
    )
    engine.run(range(7))
    first, second, third = linear(0.5, 0.1, 5, 3)
    assert shown[1:] == same([first, first, second, second, third, third])
    assert used[0] == same([0, first, 0, second, 0, third, 0])


@pytest.mark.parametrize("cls", [EMAHandler, IgniteHandler])
def test_a_write_to_the_state_drives_a_constant_momentum(cls: type) -> None:
    handler = cls(unit_model(), momentum=0.1)
    engine, used = probing_engine(handler)
    handler.attach(engine, name="mine")

    @engine.on(Events.ITERATION_STARTED(once=3))
    def write() -> None:
        engine.state.mine = 0.25

    engine.run(range(4))
    assert used[0] == same([0.1, 0.1, 0.25, 0.25])


@pytest.mark.parametrize("cls", [EMAHandler, IgniteHandler])
def test_a_state_scheduler_drives_a_constant_momentum(cls: type) -> None:
    handler = cls(unit_model(), momentum=0.1)
    engine, used = probing_engine(handler)
    scheduler = LambdaStateScheduler(lambda index: 0.5**index, param_name="mine", create_new=True)
    scheduler.attach(engine, Events.ITERATION_COMPLETED)
    handler.attach(engine, name="mine", warn_if_exists=False)
    engine.run(range(4))
    assert used[0] == same([0.5, 0.25, 0.125, 0.0625])


def test_an_impossible_momentum_in_the_state_is_an_error() -> None:
    model = unit_model()
    handler = EMAHandler(model, momentum=0.5)
    engine = Engine(lambda engine, batch: model.weight.data.add_(1.0))
    handler.attach(engine)
    engine.state.ema_momentum = 1.5
    with pytest.raises(ValueError, match=r"momentum.*1\.5"):
        engine.run([0])
    assert handler.ema_model.weight.item() == 1.0
    assert handler.update_index == 0


@pytest.mark.parametrize("cls", [EMAHandler, IgniteHandler])
def test_a_name_in_use_warns_and_keeps_its_value(cls: type) -> None:
    handler = cls(unit_model(), momentum=0.1)
    engine, used = probing_engine(handler)
    engine.state.mine = 0.75
    with pytest.warns(UserWarning, match="Attribute 'mine' already exists"):
        handler.attach(engine, name="mine")
    engine.run(range(2))
    assert used[0] == same([0.75, 0.75])


def test_a_name_in_use_does_not_warn_on_request() -> None:
    handler = EMAHandler(unit_model(), 0.1, 0.2, 3)
    engine, used = probing_engine(handler)
    engine.state.mine = 0.75
    handler.attach(engine, "mine", False)
    engine.run(range(3))
    assert used[0] == same([0.2, 0.15, 0.1])


@pytest.mark.parametrize("cls", [EMAHandler, IgniteHandler])
def test_momentum_of_a_loaded_engine_state_goes_on(cls: type) -> None:
    trainer = Engine(lambda engine, batch: None)
    trainer.state_dict_user_keys.append("mine")
    trainer.state.mine = 0.75
    trainer.run(range(2), max_epochs=1)

    handler = cls(unit_model(), momentum=0.1)
    engine, _ = probing_engine(handler)
    engine.state_dict_user_keys.append("mine")
    engine.load_state_dict(trainer.state_dict())
    handler.attach(engine, name="mine", warn_if_exists=False)
    engine.run(range(2), max_epochs=2)
    assert engine.state.mine == 0.75
    assert handler.ema_model.weight.item() == 0.75


def warm_under_custom_name(cls: type) -> tuple[list[float], list[float]]:
    handler = cls(unit_model(), 0.002, 0.2, 5)
    engine, used = probing_engine(handler)
    handler.attach(engine, name="gen_ema")
    shown = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: shown.append(engine.state.gen_ema))
    engine.run(range(7))
    return used[0], shown


def test_warmup_under_a_custom_name() -> None:
    used, shown = warm_under_custom_name(EMAHandler)
    assert used == same(linear(0.2, 0.002, 5, 7))
    assert shown == same(linear(0.2, 0.002, 5, 7))


@control
def test_control_ignite_has_no_warmup_under_a_custom_name() -> None:
    with pytest.warns(UserWarning, match="is not defined"):
        used, shown = warm_under_custom_name(IgniteHandler)
    assert used == shown == [0.002] * 7


def warm_two(cls: type) -> tuple[list[list[float]], dict[str, Any]]:
    first, second = cls(unit_model(), 0.1, 0.5, 5), cls(unit_model(), 0.3, 0.0, 3)
    engine, used = probing_engine(first, second)
    first.attach(engine, name="first")
    second.attach(engine, name="second", event=Events.ITERATION_COMPLETED(every=2))
    engine.run(range(8))
    return used, vars(engine.state)


def test_two_warmups_are_apart() -> None:
    used, state = warm_two(EMAHandler)
    assert used[0] == same(linear(0.5, 0.1, 5, 8))
    assert used[1][1::2] == same(linear(0.0, 0.3, 3, 4))
    assert [state["first"], state["second"]] == same([0.1, 0.3])
    assert "ema_momentum" not in state


def test_two_warmups_under_one_name_are_apart() -> None:
    first, second = EMAHandler(unit_model(), 0.1, 0.5, 5), EMAHandler(unit_model(), 0.3, 0.0, 3)
    engine, used = probing_engine(first, second)
    first.attach(engine)
    with pytest.warns(UserWarning, match="Attribute 'ema_momentum' already exists"):
        second.attach(engine)
    engine.run(range(7))
    assert used[0] == same(linear(0.5, 0.1, 5, 7))
    assert used[1] == same(linear(0.0, 0.3, 3, 7))


@control
def test_control_ignite_mixes_two_warmups_up() -> None:
    with pytest.warns(UserWarning, match="is not defined"):
        used, state = warm_two(IgniteHandler)
    assert used[0] == [0.1] * 8
    assert used[1][1::2] == [0.3] * 4
    assert "ema_momentum" in state


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [({"momentum_warmup": 0.5}, "warmup_iters"), ({"warmup_iters": 10}, "momentum_warmup")],
)
def test_half_a_warmup_warns_and_is_none(arguments: dict[str, Any], missing: str) -> None:
    with pytest.warns(UserWarning, match=missing) as caught:
        handler = EMAHandler(unit_model(), 0.1, **arguments)
    assert len(caught) == 1
    assert next(iter(arguments)) in str(caught[0].message)
    engine, used = probing_engine(handler)
    handler.attach(engine)
    engine.run(range(3))
    assert used == [[0.1] * 3]


@control
def test_control_ignite_takes_half_a_warmup_silently() -> None:
    IgniteHandler(unit_model(), 0.1, warmup_iters=10)  # a warning would be an error here
    IgniteHandler(unit_model(), 0.1, 5.0, 10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_schedules_count_updates(schedule: Callable[[int], float]) -> None:
    handler = EMAHandler(unit_model(), schedule=schedule)
    engine, used = probing_engine(handler)
    handler.attach(engine, event=Events.ITERATION_COMPLETED(every=2))
    engine.run(range(8))
    expected = [schedule(index) for index in (1, 2, 3, 4)]
    assert used[0][1::2] == same(expected)
    assert used[0][::2] == [0.0] * 4
    assert engine.state.ema_momentum == expected[-1]
    assert handler.update_index == 4


def test_any_function_is_a_schedule() -> None:
    handler = EMAHandler(unit_model(), schedule=lambda index: 1 / (1 + index))
    engine, used = probing_engine(handler)
    handler.attach(engine)
    engine.run(range(3))
    assert used[0] == same([1 / 2, 1 / 3, 1 / 4])


def test_assigning_a_schedule_changes_it() -> None:
    handler = EMAHandler(unit_model(), 0.1, 0.2, 3)
    engine, used = probing_engine(handler)
    handler.attach(engine)
    engine.run(range(2))
    handler.schedule = LinearWarmup(0.5, 0.25, 4)
    engine.run(range(2))
    assert used[0] == same([0.2, 0.15, LinearWarmup(0.5, 0.25, 4)(3), 0.25])


@pytest.mark.parametrize("before", [Constant(0.1), LinearWarmup(0.2, 0.1, 3)], ids=repr)
def test_assigning_a_constant_schedule_changes_it(before: Callable[[int], float]) -> None:
    handler = EMAHandler(unit_model(), schedule=before)
    engine, used = probing_engine(handler)
    handler.attach(engine)
    engine.run(range(1))
    handler.schedule = Constant(0.25)
    engine.run(range(2))
    assert used[0] == same([before(1), 0.25, 0.25])
    assert engine.state.ema_momentum == 0.25
