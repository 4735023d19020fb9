"""Attaching the handler to engines, detaching it, and what each leaves in `engine.state`."""

from __future__ import annotations

import io
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("ignite")

from ignite.engine import Engine, EventEnum, Events
from ignite.handlers import EMAHandler as IgniteHandler

from ema_triton import EMAHandler
from ema_triton.schedules import Constant
from tests.engines import EVENTS, control, counting, linear, probing_engine, same, unit_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["ema_momentum", "another"])
def test_attaching_twice_is_an_error(name: str) -> None:
    model, step = counting()
    handler = EMAHandler(model, momentum=0.5)
    engine = Engine(step)
    handler.attach(engine)
    with pytest.raises(RuntimeError, match=r"(?s)attached.*detach"):
        handler.attach(engine, name=name, event=Events.EPOCH_COMPLETED, warn_if_exists=False)
    assert not hasattr(engine.state, "another")
    engine.run([0])
    assert handler.ema_model.weight.item() == 1.5


@control
def test_control_ignite_updates_twice() -> None:
    model, step = counting()
    handler = IgniteHandler(model, momentum=0.5)
    engine = Engine(step)
    handler.attach(engine)
    handler.attach(engine, warn_if_exists=False)
    engine.run([0])
    assert handler.ema_model.weight.item() == 1.75


@pytest.mark.parametrize("event", [*EVENTS, "plain"])
def test_detach_stops_updates(event: str) -> None:
    model, step = counting()
    handler = EMAHandler(model, 0.5, 0.25, 30)
    other = EMAHandler(model, 0.5)
    engine = Engine(step)
    handler.attach(engine, "first", event=EVENTS.get(event, Events.ITERATION_COMPLETED))
    other.attach(engine, "second")
    engine.run(range(12))
    before, momentum = handler.ema_model.weight.item(), engine.state.first
    updates = handler.update_index
    assert updates >= 1
    handler.detach()
    engine.run(range(12))
    assert handler.ema_model.weight.item() == before
    assert handler.update_index == updates
    assert engine.state.first == momentum
    assert other.update_index == 24


@control
def test_control_ignite_cannot_detach() -> None:
    assert not hasattr(IgniteHandler(unit_model()), "detach")


def test_detach_from_within_a_run() -> None:
    model, step = counting()
    handler = EMAHandler(model, 0.5)
    engine = Engine(step)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), handler.detach)
    handler.attach(engine)
    after = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: after.append(1))
    engine.run(range(5))
    # Ignite goes through the list of handlers as it was when the event began.
    assert handler.update_index in (2, 3)
    assert len(after) == 5


def test_attaching_again_after_detaching() -> None:
    model, step = counting()
    handler = EMAHandler(model, 0.5)
    engine = Engine(step)
    handler.attach(engine)
    handler.detach()
    handler.attach(engine, warn_if_exists=False)
    engine.run([0])
    assert handler.ema_model.weight.item() == 1.5


def test_attaching_elsewhere_goes_on_with_the_warmup() -> None:
    handler = EMAHandler(unit_model(), 0.1, 0.5, 5)
    first, used = probing_engine(handler)
    second, more = probing_engine(handler)
    handler.attach(first)
    first.run(range(2))
    handler.detach()
    handler.attach(second, name="other")
    second.run(range(4))
    first.run(range(1))
    assert used[0] + more[0] == same([*linear(0.5, 0.1, 5, 2), 0.0, *linear(0.5, 0.1, 5, 6)[2:]])


def test_two_engines_update_one_ema() -> None:
    model, step = counting()
    handler = EMAHandler(model, 0.5)
    first, second = Engine(step), Engine(step)
    handler.attach(first)
    handler.attach(second)
    first.run([0])
    second.run([0])
    assert handler.ema_model.weight.item() == 2.25  # 1 -> 1.5 by 2 -> 2.25 by 3
    handler.detach()
    first.run([0])
    second.run([0])
    assert handler.update_index == 2


class Steps(EventEnum):
    OPTIMIZER_STEPPED = "optimizer_stepped"


BAD_ATTACHMENTS = {
    "unknown event": {"event": "no_such_event"},
    "unregistered event": {"event": Steps.OPTIMIZER_STEPPED},
    "half a list": {"event": Events.ITERATION_COMPLETED | Steps.OPTIMIZER_STEPPED},
    "no event": {"event": 5},
    "no name": {"name": 5},
}


@pytest.mark.parametrize("case", BAD_ATTACHMENTS)
@pytest.mark.parametrize("exists", [False, True])
def test_an_error_in_attach_leaves_the_engine_alone(case: str, exists: bool) -> None:
    model, step = counting()
    handler = EMAHandler(model, 0.5, 0.25, 3)
    engine = Engine(step)
    if exists:
        engine.state.ema_momentum = 0.75
    before = dict(vars(engine.state))
    with pytest.raises((ValueError, TypeError)):
        handler.attach(engine, warn_if_exists=False, **BAD_ATTACHMENTS[case])
    assert vars(engine.state) == before
    engine.run([0])
    assert handler.update_index == 0
    assert handler.ema_model.weight.item() == 1.0
    handler.attach(engine, warn_if_exists=False)
    engine.run([0])
    assert handler.update_index == 1


def test_unknown_event_is_named() -> None:
    with pytest.raises(ValueError, match="no_such_event"):
        EMAHandler(unit_model()).attach(Engine(lambda engine, batch: None), event="no_such_event")


@pytest.mark.parametrize("kind", ["enum", "string"])
def test_custom_event_counts_optimizer_steps(kind: str) -> None:
    event: Any = Steps.OPTIMIZER_STEPPED if kind == "enum" else "stepped"
    model = unit_model()
    handler = EMAHandler(model, 0.1, 0.5, 3)

    def step(engine: Engine, batch: int) -> None:
        if engine.state.iteration % 4 == 0:
            model.weight.data.add_(1.0)
            engine.fire_event(event)

    engine = Engine(step)
    engine.register_events(event)
    handler.attach(engine, event=event)
    engine.run(range(8))
    assert handler.update_index == 2
    # 1 -> 1 + 0.5 * (2 - 1) -> 1.5 + 0.3 * (3 - 1.5), rounded at 2.
    assert handler.ema_model.weight.item() == pytest.approx(1.95, rel=0, abs=2 * 2**-51)


def test_a_new_schedule_counts_on_every_engine() -> None:
    model = nn.Linear(1, 1, bias=False)
    handler = EMAHandler(model, 0.1)
    engines = [Engine(lambda engine, batch: None) for _ in range(2)]
    for engine in engines:
        handler.attach(engine)
    handler.schedule = Constant(0.5)
    model.weight.data.fill_(1.0)
    for engine in engines:
        handler.ema_model.weight.data.fill_(0.0)
        engine.run([0])
        assert handler.ema_model.weight.item() == 0.5


@pytest.mark.parametrize("follower_first", [True, False])
def test_one_handler_may_follow_anothers_momentum(follower_first: bool) -> None:
    handlers = {"g": EMAHandler(nn.Linear(1, 1), 0.5), "d": EMAHandler(nn.Linear(1, 1), 0.1)}
    engine = Engine(lambda engine, batch: None)
    for name in ("d", "g") if follower_first else ("g", "d"):
        handlers[name].attach(engine, name)

    @engine.on(Events.ITERATION_STARTED)
    def follow() -> None:
        engine.state.d = engine.state.g

    used: list[float] = []
    update = handlers["d"].ema.update
    handlers["d"].ema.update = lambda momentum: (used.append(momentum), update(momentum))
    engine.run([0, 0])
    assert used == [0.5, 0.5]


def test_an_attached_handler_is_copied_unattached() -> None:
    model = nn.Linear(1, 1, bias=False)
    handler = EMAHandler(model, 0.5)
    engine = Engine(lambda engine, batch: None)
    handler.attach(engine)
    file = io.BytesIO()
    torch.save(handler, file)
    file.seek(0)
    for twin in (deepcopy(handler), torch.load(file, weights_only=False)):
        assert isinstance(twin, EMAHandler)
        before = twin.ema_model.weight.clone()
        engine.run([0])
        assert twin.update_index == 0
        other = Engine(lambda engine, batch: None)
        twin.attach(other)
        twin.model.weight.data = before + 1
        other.run([0])
        assert torch.equal(twin.ema_model.weight, torch.lerp(before, before + 1, 0.5))


@pytest.mark.parametrize("name", ["iteration", "epoch", "output", "metrics"])
def test_the_engines_own_names_are_refused(name: str) -> None:
    engine = Engine(lambda engine, batch: None)
    before = getattr(engine.state, name)
    with pytest.raises(ValueError, match=rf"engine.state.{name}.*another name"):
        EMAHandler(nn.Linear(1, 1)).attach(engine, name, False)
    assert getattr(engine.state, name) == before


def test_what_is_no_engine_and_no_schedule_is_refused() -> None:
    handler = EMAHandler(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"must be an Ignite Engine.*got str"):
        handler.attach("trainer")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"schedule must be a function .* got 0\.5"):
        handler.schedule = 0.5  # type: ignore[assignment]
