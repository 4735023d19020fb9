"""Code written for Ignite's handler, run with both: what Ignite's does, this one does."""

from __future__ import annotations

import gc
import io
import math
import pickle
import re
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("ignite")

from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, LambdaStateScheduler, ModelCheckpoint
from ignite.handlers import EMAHandler as IgniteHandler
from ignite.handlers.ema_handler import EMAWarmUp

from ema_triton import EMAHandler

both = pytest.mark.parametrize("cls", [EMAHandler, IgniteHandler], ids=["ours", "ignite"])

ITERATION, EPOCH = Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED
EVENTS = {"plain": ITERATION, "every 2": ITERATION(every=2), "list": ITERATION(every=2) | EPOCH}
CONSTANT = {"momentum": 0.1}
WARM = {"momentum": 0.1, "momentum_warmup": 0.5, "warmup_iters": 5}
kinds = pytest.mark.parametrize("kwargs", [CONSTANT, WARM], ids=["constant", "warm"])


def near(values: list[float]) -> Any:
    """Up to a few roundings of values of at most 1."""
    return pytest.approx(values, rel=0, abs=2**-50)


def cosine(index: int) -> float:
    return 0.3 + 0.2 * math.cos(index / 10)


def one() -> nn.Linear:
    """One weight of 1 in float64."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    return model


@dataclass
class Probe:
    """An engine whose step zeroes the EMA of a weight of 1: an update makes it the momentum."""

    handler: Any
    name: str = "ema_momentum"
    make: Callable[[Callable], Engine] = Engine
    applied: list[float] = field(default_factory=list)
    shown: list[float] = field(default_factory=list)

    running: bool = False

    def __post_init__(self) -> None:
        self.engine = self.make(self.step)
        self.engine.add_event_handler(Events.ITERATION_STARTED | Events.COMPLETED, self.note)

    def step(self, engine: Engine, batch: Any) -> None:
        self.running = True
        self.handler.ema_model.weight.data.zero_()

    def note(self, engine: Engine) -> None:
        if self.running:  # an iteration is over, with all that happened at its end
            self.applied.append(self.handler.ema_model.weight.item())
            self.shown.append(getattr(engine.state, self.name))
        self.running = False

    def attach(self, **kwargs: Any) -> Probe:
        self.handler.attach(self.engine, self.name, **kwargs)
        return self

    def run(self, batches: int, epochs: int = 1) -> Probe:
        self.engine.run(range(batches), max_epochs=epochs)
        return self


def overriding(cls: type, body: Callable) -> type:
    class Handler(cls):
        def _update_ema_model(self, engine: Engine, name: str) -> None:
            body(self, engine, name, super()._update_ema_model)

    return Handler


@torch.no_grad()
def own_loop(handler: Any, engine: Engine, name: str, update: Callable) -> None:
    momentum = min(0.3, getattr(engine.state, name))
    for ema, value in zip(handler.ema_model.parameters(), handler.model.parameters(), strict=True):
        ema.mul_(1.0 - momentum).add_(value.data, alpha=momentum)


def skips_two(handler: Any, engine: Engine, name: str, update: Callable) -> None:
    if engine.state.iteration > 2:
        update(engine, name)


def halves_it(handler: Any, engine: Engine, name: str, update: Callable) -> None:
    setattr(engine.state, name, getattr(engine.state, name) / 2)
    update(engine, name)


# The momenta of four iterations: constant, and warming up. A warm-up counts the events.
UPDATES: dict[Callable, tuple[list[float], list[float]]] = {
    own_loop: ([0.1] * 4, [0.3, 0.3, 0.3, 0.2]),
    skips_two: ([0, 0, 0.1, 0.1], [0, 0, 0.3, 0.2]),
    halves_it: ([0.05, 0.025, 0.0125, 0.00625], [0.25, 0.2, 0.15, 0.1]),
}


@both
@pytest.mark.parametrize("body", UPDATES, ids=lambda body: body.__name__)
@pytest.mark.parametrize("event", EVENTS)
@kinds
def test_an_overridden_update(cls: type, body: Callable, event: str, kwargs: Any) -> None:
    probe, ignites = (
        Probe(overriding(each, body)(one(), **kwargs)).attach(event=EVENTS[event]).run(5, 2)
        for each in (cls, IgniteHandler)
    )
    if event == "plain":
        assert probe.applied[:4] == near(UPDATES[body][kwargs is WARM])
    assert probe.applied == near(ignites.applied)
    assert probe.shown[4:] == near(ignites.shown[4:])  # before any update they may differ


@both
def test_a_method_put_on_the_handler_gets_the_engine_and_the_name(cls: type) -> None:
    handler, got = cls(one(), 0.1), []
    handler._update_ema_model = lambda engine, name: got.append((engine, name))
    probe = Probe(handler, name="mine").attach(event=EVENTS["list"]).run(3)
    assert got == [(probe.engine, "mine")] * 2
    assert probe.applied == [0.0] * 3


@both
@pytest.mark.parametrize("event", [ITERATION, ITERATION(every=2)], ids=["plain", "every 2"])
@kinds
def test_the_method_itself_is_registered(cls: type, event: Any, kwargs: Any) -> None:
    probe = Probe(cls(one(), **kwargs)).attach(event=event)
    method = probe.handler._update_ema_model
    assert probe.engine.has_event_handler(method, event)
    probe.engine.remove_event_handler(method, event)
    assert probe.run(2).applied == [0.0, 0.0]
    probe.engine.state.mine = 0.75
    method(probe.engine, "mine")  # by hand it reads the state too
    assert probe.handler.ema_model.weight.item() == 0.75


def by_name(self: Any, engine: Engine, name: str = "ema_momentum", event: Any = ITERATION) -> None:
    if not hasattr(engine.state, name):
        setattr(engine.state, name, self.momentum)
    if self._momentum_lambda_obj is not None:
        self.momentum_scheduler = LambdaStateScheduler(self._momentum_lambda_obj, param_name=name)
        self.momentum_scheduler.attach(engine, event)
    engine.add_event_handler(event, self._update_ema_model, name)


def by_super(self: Any, engine: Engine, *args: Any, **kwargs: Any) -> None:
    super(type(self), self).attach(engine, *args, **kwargs)
    engine.add_event_handler(Events.STARTED, lambda: None)


VERBATIM = IgniteHandler.attach  # writes every warm-up to engine.state.ema_momentum
ATTACHES = [(attach, "ema_momentum") for attach in (VERBATIM, by_super, by_name)]
ATTACHES += [(by_name, "mine")]


def attaching(cls: type, attach: Callable | None) -> type:
    return cls if attach is None else type("Handler", (cls,), {"attach": attach})


@both
@pytest.mark.parametrize(("attach", "name"), ATTACHES)
@pytest.mark.parametrize("event", EVENTS)
@kinds
def test_an_overridden_attach(cls: type, attach: Any, name: str, event: str, kwargs: Any) -> None:
    handler = attaching(cls, attach)(one(), **kwargs)
    probe = Probe(handler, name).attach(event=EVENTS[event])
    probe.run({"plain": 3, "every 2": 6, "list": 5}[event])
    momenta = [0.5, 0.4, 0.3] if kwargs is WARM else [0.1] * 3
    at = {"plain": [0, 1, 2], "every 2": [1, 3, 5], "list": [1, 3, 4]}[event]
    assert [probe.applied[index] for index in at] == near(momenta)
    assert [probe.shown[index] for index in at] == near(momenta)
    assert sum(probe.applied) == near(sum(momenta))
    assert getattr(handler, "update_index", 3) == 3
    if kwargs is WARM and attach is not by_super:
        assert handler.momentum_scheduler.event_index == 3


@both
def test_a_state_written_by_an_overridden_attach_is_read(cls: type) -> None:
    """A warm-up's schedule is there, and not what this attach uses."""

    def attach(self: Any, engine: Engine, name: str) -> None:
        scheduler = LambdaStateScheduler(lambda index: 0.5**index, name, create_new=True)
        scheduler.attach(engine, ITERATION)
        engine.add_event_handler(ITERATION, self._update_ema_model, name)

    probe = Probe(attaching(cls, attach)(one(), **WARM), "mine").attach().run(3)
    assert probe.applied == near([0.5, 0.25, 0.125])


@both
def test_the_warmup_as_an_attribute(cls: type) -> None:
    assert cls(one(), 0.1)._momentum_lambda_obj is None
    warmup = cls(one(), **WARM)._momentum_lambda_obj
    assert [warmup(index) for index in range(1, 7)] == near([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    assert (warmup.momentum, warmup.momentum_warmup, warmup.warmup_iters) == (0.1, 0.5, 5)


@both
@pytest.mark.parametrize("lambda_obj", [EMAWarmUp(0.25, 3, 0.05), cosine])
@pytest.mark.parametrize("attach", [None, VERBATIM, by_name])
@kinds
def test_an_assigned_lambda_obj(cls: type, lambda_obj: Any, attach: Any, kwargs: Any) -> None:
    handler = attaching(cls, attach)(one(), **kwargs)
    handler._momentum_lambda_obj = lambda_obj
    for each in (deepcopy(handler), handler):
        probe = Probe(each).attach().run(4)
        assert probe.applied == near([lambda_obj(index) for index in (1, 2, 3, 4)])
        assert probe.shown == near(probe.applied)
    if cls is EMAHandler and attach is None:
        again = cls(one(), **kwargs)
        again._momentum_lambda_obj = lambda_obj
        again.load_state_dict(handler.state_dict())
        assert Probe(again).attach().run(1).applied == near([lambda_obj(5)])


def test_the_handler_is_saved_in_place_of_its_momentum_scheduler() -> None:
    """Ignite's scheduler knows where the warm-up stands; here the handler does, as the docs say."""
    handler, again = EMAHandler(one(), **WARM), EMAHandler(one(), **WARM)
    assert handler.momentum_scheduler is None
    Probe(handler).attach().run(2)
    again.load_state_dict(handler.state_dict())
    assert Probe(again).attach().run(2).applied == near([0.3, 0.2])
    page = (Path(__file__).parents[1] / "docs" / "migration.md").read_text("utf-8")
    assert "Save the handler" in page
    assert "`handler.momentum_scheduler`" in page


def test_no_lambda_obj_is_no_warmup() -> None:
    handler = EMAHandler(one(), **WARM)
    handler._momentum_lambda_obj = None
    assert Probe(handler).attach().run(2).applied == near([0.1, 0.1])
    own = EMAHandler(one(), schedule=cosine)
    with pytest.raises(TypeError, match="Invalid momentum: None"):
        own._momentum_lambda_obj = None


@dataclass
class Trainer(Engine):
    """Cannot be hashed, and all are equal."""

    process: Callable = field(compare=False)

    def __post_init__(self) -> None:
        super().__init__(self.process)


ENGINES = {
    "plain": Engine,
    "dataclass": Trainer,
    "equal": type("Equal", (Engine,), {"__eq__": lambda self, other: True}),
    "incomparable": type("Incomparable", (Engine,), {"__eq__": lambda self, other: 1 / 0}),
    "empty": type("Empty", (Engine,), {"__len__": lambda self: 0}),
}
engines = pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES)


@engines
def test_engines_are_told_apart(make: type) -> None:
    model = one()
    handler = EMAHandler(model, 0.5)
    handler.ema_model.weight.data.fill_(2.0)
    first, second, evaluator = (make(lambda *_: model.weight.item()) for _ in range(3))
    handler.attach(first)
    handler.attach(second, "mine")
    handler.attach_swap(evaluator)
    for engine in (first, second):
        with pytest.raises(RuntimeError, match=r"(?s)attached.*detach"):
            handler.attach(engine, warn_if_exists=False)
        with pytest.raises(RuntimeError, match="updates on this engine already"):
            handler.attach_swap(engine)
    with pytest.raises(RuntimeError, match="swaps on this engine already"):
        handler.attach_swap(evaluator)
    assert [engine.run([0]).output for engine in (evaluator, first, second)] == [2.0, 1.0, 1.0]
    assert handler.ema_model.weight.item() == 1.25
    handler.detach()
    assert [engine.run([0]).output for engine in (evaluator, first, second)] == [1.0] * 3
    assert handler.update_index == 2


@engines
@pytest.mark.parametrize("copy", [deepcopy, lambda handler: pickle.loads(pickle.dumps(handler))])
def test_an_attached_handler_is_copied_without_its_engine(make: type, copy: Callable) -> None:
    probe = Probe(EMAHandler(one(), **WARM), make=make).attach().run(2)
    probe.handler.attach_swap(make(lambda engine, batch: None))
    twin = copy(probe.handler)
    assert probe.engine.run([0], max_epochs=1)
    assert (probe.handler.update_index, twin.update_index) == (3, 2)
    assert Probe(twin, make=make).attach().run(2).applied == near([0.3, 0.2])


@both
@engines
@pytest.mark.parametrize("attach", [None, by_name])
def test_an_engine_is_not_kept_alive(cls: type, make: type, attach: Any) -> None:
    handler = attaching(cls, attach)(one(), 0.1)
    for _ in range(3):  # later engines may lie where earlier ones lay
        probe, evaluator = Probe(handler, make=make).attach().run(2), make(lambda engine, batch: 0)
        assert probe.applied == near([0.1, 0.1])
        if cls is EMAHandler:
            handler.attach_swap(evaluator)
        dead = [weakref.ref(probe.engine), weakref.ref(evaluator)]
        del probe, evaluator
        gc.collect()
        assert [engine() for engine in dead] == [None, None]
    if cls is EMAHandler:
        handler.detach()


@both
@pytest.mark.parametrize("name", ["ema_momentum", "mine"])
def test_an_assigned_momentum_takes_effect(cls: type, name: str) -> None:
    handler = cls(one(), 0.1)
    handler.momentum = 0.2
    probe = Probe(handler, name, Trainer).attach().run(1)
    if cls is EMAHandler:  # in Ignite it is too late
        handler.momentum = 0.4
        probe.run(1)
        once = Events.ITERATION_STARTED(once=2)
        probe.engine.add_event_handler(once, lambda: setattr(handler, "momentum", 0.75))
        assert probe.run(2).applied == near([0.2, 0.4, 0.4, 0.75])
        assert probe.shown == near(probe.applied)
    setattr(probe.engine.state, name, 0.3)
    probe.run(1)
    assert probe.applied[-1] == near(0.3)


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan, math.inf, "0.1", None])
def test_an_impossible_momentum_is_not_assigned(value: Any) -> None:
    probe = Probe(EMAHandler(one(), 0.1)).attach()
    with pytest.raises((ValueError, TypeError), match=f"(?s)momentum.*{re.escape(str(value))}"):
        probe.handler.momentum = value
    assert probe.handler.momentum == 0.1
    assert probe.run(2).applied == near([0.1, 0.1])


def test_the_momentum_of_a_warmup_is_changed_or_refused_but_told() -> None:
    handler = EMAHandler(one(), **WARM)
    try:
        handler.momentum = 0.2
    except (AttributeError, ValueError) as error:
        assert "schedule" in str(error)  # noqa: PT017
        assert handler.momentum == 0.1
    probe = Probe(handler).attach().run(8)
    assert probe.applied == near([EMAWarmUp(0.5, 5, handler.momentum)(i) for i in range(1, 9)])


@pytest.mark.parametrize("attach", [None, by_name])
def test_a_schedule_without_momentum_refuses_one(attach: Any) -> None:
    handler = attaching(EMAHandler, attach)(one(), schedule=cosine)
    with pytest.raises((AttributeError, ValueError), match=r"(?s)momentum.*schedule"):
        handler.momentum = 0.2
    assert handler.schedule is cosine
    assert Probe(handler).attach().run(2).applied == near([cosine(1), cosine(2)])


@pytest.mark.parametrize("attribute", ["model", "ema_model", "handle_buffers"])
def test_what_cannot_be_assigned_says_what_to_do_instead(attribute: str) -> None:
    handler, other = EMAHandler(one()), EMAHandler(one(), handle_buffers="update")
    before = getattr(handler, attribute)
    with pytest.raises(AttributeError, match=attribute) as error:
        setattr(handler, attribute, getattr(other, attribute))
    assert re.search("no setter|can't set", str(error.value)) is None
    assert re.search(r"EMAHandler\(|\bnew\b|another|load|instead|pass|give", str(error.value))
    assert getattr(handler, attribute) is before


def save(form: str, engine: Engine, event: Any, objects: Any, folder: Path) -> None:
    saver = ModelCheckpoint(folder, "m", n_saved=None)
    if form == "constructor":
        engine.add_event_handler(event, Checkpoint(objects, lambda *_: None))
    elif form == "positional":
        engine.add_event_handler(event, saver, objects)
    else:
        engine.add_event_handler(event, saver, to_save=objects)


forms = pytest.mark.parametrize("form", ["constructor", "positional", "keyword"])


@forms
@pytest.mark.parametrize("what", ["handler", "ema", "ema_model"])
@pytest.mark.parametrize(
    ("of_checkpoint", "of_handler", "together"),
    [
        (ITERATION, ITERATION, True),
        (ITERATION(every=2), ITERATION, True),
        (EPOCH, ITERATION(every=2) | EPOCH, True),
        (EPOCH, ITERATION, False),
    ],
)
def test_a_checkpoint_before_the_update_is_warned_of(
    form: str, what: str, of_checkpoint: Any, of_handler: Any, together: bool, tmp_path: Path
) -> None:
    handler, engine = EMAHandler(one(), 0.5), Engine(lambda engine, batch: None)
    it = getattr(handler, what, handler)
    save(form, engine, of_checkpoint, {"model": one(), "it": it}, tmp_path)
    with pytest.warns(UserWarning, match="the same event") if together else nullcontext():
        handler.attach(engine, event=of_handler)
    engine.run(range(4))
    assert handler.update_index >= 1


@forms
def test_a_checkpoint_is_not_warned_of_where_it_does_no_harm(form: str, tmp_path: Path) -> None:
    model = one()
    handler, other = EMAHandler(model, 0.5), EMAHandler(model, 0.1)
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(ITERATION, lambda engine, objects: None, {"it": handler.ema_model})
    engine.add_event_handler(ITERATION, lambda engine, values: None, torch.ones(2))
    save(form, engine, ITERATION, {"it": model, "other": other.ema_model}, tmp_path / "others")
    handler.attach(engine)
    save(form, engine, ITERATION, {"it": handler.ema_model, "all": handler}, tmp_path / "after")
    engine.run(range(2))
    assert handler.update_index == 2


ITERS = [0, 0.0, 1, 1.0, 5, 5.0, 1e4, 0.1 * 30]
ITERS += [np.int64(5), np.int32(0), np.float64(5.0), np.float32(5.0), np.float16(0.0)]
NO_ITERS = [2.5, 0.5, 0.1 * 3, 2.0001, 1e6 + 0.5, -1, -1.0, math.nan, math.inf, -math.inf]
NO_ITERS += [True, "3", np.float64(2.5), np.float32("nan"), np.int64(-1), [3]]


@both
@pytest.mark.parametrize("iters", [0, 0.0, 1])
def test_a_warmup_of_nothing(cls: type, iters: float) -> None:
    probe = Probe(cls(one(), 1e-4, 0.0, iters)).attach().run(3)
    assert probe.applied == near([0.0, 1e-4, 1e-4])


@both
@pytest.mark.parametrize("iters", [0, 0.0])
def test_no_iterations_alone_are_no_warmup(cls: type, iters: float) -> None:
    assert Probe(cls(one(), 0.1, warmup_iters=iters)).attach().run(3).applied == near([0.1] * 3)


@pytest.mark.parametrize("iters", ITERS, ids=repr)
@pytest.mark.parametrize(("momentum", "start"), [(0.1, 0.5), (0.3, 0.0)])
def test_numbers_of_iterations_that_ignite_takes(iters: Any, momentum: float, start: float) -> None:
    ours, theirs = (
        Probe(cls(one(), momentum, start, count)).attach().run(8, 4)
        for cls, count in ((EMAHandler, iters), (IgniteHandler, float(iters)))  # not in fp32
    )
    assert theirs.applied[0] == start != theirs.applied[1]
    assert ours.applied == near(theirs.applied)
    assert ours.shown == near(theirs.shown)


@pytest.mark.parametrize("iters", NO_ITERS, ids=repr)
def test_what_is_no_number_of_iterations(iters: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"Invalid warmup_iters") as error:
        EMAHandler(one(), 0.1, 0.5, iters)
    assert str(iters) in str(error.value)


@pytest.mark.parametrize("iters", [5.0, np.int64(5), np.float32(5.0)], ids=repr)
def test_a_number_of_iterations_is_saved_as_a_plain_one(iters: Any) -> None:
    cut, file = EMAHandler(one(), 0.1, 0.5, iters), io.BytesIO()
    Probe(cut).attach().run(2)
    torch.save(cut.state_dict(), file)
    for again in (EMAHandler(one(), 0.1, 0.5, 5), EMAHandler(one(), 0.1, 0.5, iters)):
        file.seek(0)
        again.load_state_dict(torch.load(file, weights_only=True))  # and does not warn
        assert Probe(again).attach().run(2).applied == near([0.3, 0.2])


@both
@kinds
def test_the_state_shows_the_first_momentum_before_the_first_update(cls: type, kwargs: Any) -> None:
    probe = Probe(cls(one(), **kwargs)).attach(event=ITERATION(every=2)).run(5)
    first, second = (0.5, 0.4) if kwargs is WARM else (0.1, 0.1)
    shown = [first if cls is EMAHandler else 0.1, first, first, second, second]
    assert probe.shown == near(shown)  # Ignite's shows the last momentum of the warm-up first


@both
def test_statistics_are_those_of_the_last_update(cls: type) -> None:
    model = nn.BatchNorm1d(1)
    handler, means = cls(model, 0.1), []
    engine = Engine(lambda engine, batch: model(torch.full((4, 1), float(batch))))
    handler.attach(engine, event=ITERATION(every=2))
    engine.add_event_handler(ITERATION, lambda: means.append(handler.ema_model.running_mean.item()))
    engine.run([10, 20, 30])
    online = [1.0, 2.9, 5.61]  # 0.9 * mean + 0.1 * batch
    expected = [0.0, 2.9, 2.9] if cls is EMAHandler else [0.0, 2.9, 5.61]
    assert means == pytest.approx(expected, rel=1e-6)
    assert model.running_mean.item() == pytest.approx(online[-1], rel=1e-6)


def test_in_bf16_the_ema_model_alone_is_not_all() -> None:
    """Resumed from the handler a run goes on bit by bit; from `ema_model` it has lost digits."""

    def train(handler: EMAHandler, updates: int) -> EMAHandler:
        engine = Engine(lambda engine, batch: handler.model.weight.data.fill_(2.0))
        handler.attach(engine)
        engine.run(range(updates))
        handler.detach()
        return handler

    def fresh() -> EMAHandler:
        return EMAHandler(one().bfloat16(), 0.001)

    whole, cut, by_handler, by_model = (fresh() for _ in range(4))
    train(whole, 100)
    train(cut, 52)
    by_handler.load_state_dict(cut.state_dict())
    by_model.ema_model.load_state_dict(cut.ema_model.state_dict())
    train(by_handler, 48)
    train(by_model, 48)
    assert torch.equal(by_handler.ema_model.weight, whole.ema_model.weight)
    resumed = (whole, by_handler, by_model)
    digits = [handler.state_dict()["residuals"]["weight"] for handler in resumed]
    assert torch.equal(digits[0], digits[1])
    assert not torch.equal(digits[0], digits[2])


def test_old_checkpoints_of_compiled_models_are_read() -> None:
    handler = EMAHandler(one())
    handler.ema.load_weights({"_orig_mod.weight": torch.full((1, 1), 3.0, dtype=torch.float64)})
    assert handler.ema_model.weight.item() == 3.0
