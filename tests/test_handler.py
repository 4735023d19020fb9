"""The handler beside Ignite's: the same where Ignite is right, and none of its faults."""

from __future__ import annotations

import inspect
import io
import re
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

pytest.importorskip("ignite")

import ignite
from ignite.engine import Engine, EventEnum, Events
from ignite.handlers import Checkpoint, DiskSaver, LambdaStateScheduler
from ignite.handlers import EMAHandler as IgniteHandler

from ema_triton import EMAHandler, ModelEMA
from ema_triton.arguments import Options
from ema_triton.schedules import (
    Constant,
    CosineRamp,
    CountWarmup,
    ExponentialRamp,
    HalfLife,
    InverseDecay,
    LinearWarmup,
)

Handler = EMAHandler | IgniteHandler

# Negative controls: the same check on the version of Ignite that has the fault.
control = pytest.mark.skipif(
    ignite.__version__ != "0.5.5", reason="the fault is that of pytorch-ignite 0.5.5"
)

BATCHES = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network() -> nn.Sequential:
    """BatchNorm comes first, so that its statistics depend on the data alone."""
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 4, generator=generator, dtype=dtype) + index,
            torch.randint(0, 3, (6,), generator=generator),
        )
        for index in range(BATCHES)
    ]


def bare(model: nn.Module) -> nn.Module:
    """The network in its wrappers."""
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model


def sgd_step(model: nn.Module, net: nn.Module | None = None) -> Callable[[Engine, Any], float]:
    """One step of SGD on `model`, whose forward is called as `net`."""
    net = model if net is None else net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> float:
        device = next(model.parameters()).device
        net.train()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(batch[0].to(device)), batch[1].to(device))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


@dataclass
class Attached:
    """A handler's arguments, and what it showed and did in a training."""

    kwargs: dict[str, Any]
    name: str = "ema_momentum"
    event: Any = field(default_factory=lambda: Events.ITERATION_COMPLETED)
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    handler: Any = None
    momenta: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.momenta = []


@dataclass
class Training:
    model: nn.Module
    attached: list[Attached]
    peaks: dict[str, Tensor]


def train(
    cls: type,
    *specs: Attached,
    epochs: int = 3,
    calls: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Training:
    """A training from a fixed seed with handlers of the given class."""
    torch.manual_seed(0)
    model = network().to(dtype)
    specs = tuple(Attached(s.kwargs, s.name, s.event, s.wrap) for s in specs)
    for spec in specs:
        spec.handler = cls(spec.wrap(model), **spec.kwargs)
    teachers = [
        bare(s.handler.ema_model) for s in specs if s.kwargs.get("handle_buffers") == "ema_train"
    ]
    inner = sgd_step(model)
    peaks = {name: value.detach().abs().clone() for name, value in model.state_dict().items()}

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> float:
        loss = inner(engine, batch)
        for teacher in teachers:
            with torch.no_grad():
                teacher(batch[0])
        for name, value in model.state_dict().items():
            peaks[name] = torch.maximum(peaks[name], value.detach().abs())
        return loss

    engine = Engine(step)
    for spec in specs:
        spec.handler.attach(engine, name=spec.name, event=spec.event)

        def note(engine: Engine, spec: Attached) -> None:
            spec.momenta.append(getattr(engine.state, spec.name))

        engine.add_event_handler(spec.event, note, spec)
    for _ in range(calls):
        engine.run(batches(dtype), max_epochs=epochs)
    return Training(model, list(specs), peaks)


def assert_parity(ours: Training, theirs: Training) -> None:
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[name]), "the trainings differ"
    for our, their in zip(ours.attached, theirs.attached, strict=True):
        assert len(our.momenta) >= 2
        # At most three roundings of values up to 1 on either side: 6 * 2**-53.
        assert our.momenta == pytest.approx(their.momenta, rel=0, abs=2**-50)
        mine, ignites = our.handler.ema_model, their.handler.ema_model
        assert mine.training == ignites.training
        assert type(mine) is type(ignites)
        assert list(mine.state_dict()) == list(ignites.state_dict())
        expected = bare(ignites).state_dict()
        for name, value in bare(mine).state_dict().items():
            assert value.dtype == expected[name].dtype, name
            if not value.is_floating_point():
                assert torch.equal(value, expected[name]), name
                continue
            # With M the largest |value| so far, Ignite's update errs by up to 5 half eps of M (the
            # two factors, the two products and the sum are rounded), ours by one eps and half an
            # eps for the rounded momentum: 4 eps for each update, and later ones only shrink them.
            bound = 4 * len(our.momenta) * torch.finfo(value.dtype).eps * ours.peaks[name]
            error = (value - expected[name]).abs()
            assert bool((error <= bound).all()), f"{name}: {error.max().item():g}"


# --- The same interface and results as Ignite's ------------------------------------------------


@pytest.mark.parametrize("method", ["__init__", "attach"])
def test_leading_parameters_are_ignites(method: str) -> None:
    def leading(cls: type) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(getattr(cls, method)).parameters.values()
        return [(p.name, p.default, p.kind) for p in parameters]

    theirs, ours = leading(IgniteHandler), leading(EMAHandler)
    assert len(theirs) >= 5
    assert ours[: len(theirs)] == theirs
    more = [(default, kind) for _, default, kind in ours[len(theirs) :]]
    options = (inspect.Parameter.empty, inspect.Parameter.VAR_KEYWORD)
    assert more == ([(None, inspect.Parameter.KEYWORD_ONLY), options] if more else [])


def test_positional_arguments_arrive() -> None:
    handler = EMAHandler(network(), 0.1, 0.2, 30, "update")
    assert (handler.momentum, handler.momentum_warmup, handler.warmup_iters) == (0.1, 0.2, 30)
    assert handler.handle_buffers == "update"


def test_attributes() -> None:
    model = network()
    handler = EMAHandler(model)
    assert handler.model is model
    assert handler.ema_model is handler.ema.ema_model
    assert handler.ema_model is not model
    assert type(handler.ema_model) is type(model)
    assert (handler.momentum, handler.handle_buffers) == (0.0002, "copy")
    assert handler.momentum_warmup is None
    assert handler.warmup_iters is None
    assert handler.ema.backend in ("triton", "foreach")


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
def test_modes_are_ignites(handle_buffers: str) -> None:
    model = network().train()
    handler = EMAHandler(model, handle_buffers=handle_buffers)
    theirs = IgniteHandler(network(), handle_buffers=handle_buffers)
    modes = [module.training for module in handler.ema_model.modules()]
    assert modes == [module.training for module in theirs.ema_model.modules()]
    assert model.training
    assert not any(parameter.requires_grad for parameter in handler.ema_model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


WARMUPS = {
    "default": {},
    "constant": {"momentum": 0.1},
    "up": {"momentum": 0.3, "momentum_warmup": 0.01, "warmup_iters": 7},
    "down": {"momentum": 0.02, "momentum_warmup": 0.9, "warmup_iters": 7},
    "one": {"momentum": 0.2, "momentum_warmup": 0.5, "warmup_iters": 1},
    "longer than the run": {"momentum": 0.2, "momentum_warmup": 0.5, "warmup_iters": 1000},
}


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
@pytest.mark.parametrize("warmup", WARMUPS)
def test_parity(warmup: str, handle_buffers: str) -> None:
    spec = Attached(WARMUPS[warmup] | {"handle_buffers": handle_buffers})
    assert_parity(train(EMAHandler, spec), train(IgniteHandler, spec))


# Each ends with an update: in between, Ignite's copied buffers are the online model's own.
EVENTS = {
    "every 2": Events.ITERATION_COMPLETED(every=2),
    "every 3": Events.ITERATION_COMPLETED(every=3),
    "filter": Events.ITERATION_COMPLETED(event_filter=lambda _, event: event in (1, 5, 6, 12)),
    "epoch": Events.EPOCH_COMPLETED,
    "list": Events.ITERATION_COMPLETED(every=3) | Events.EPOCH_COMPLETED,
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("warmup", ["constant", "down"])
def test_parity_at_events(event: str, warmup: str) -> None:
    spec = Attached(WARMUPS[warmup] | {"handle_buffers": "update"}, event=EVENTS[event])
    assert_parity(train(EMAHandler, spec), train(IgniteHandler, spec))


@pytest.mark.parametrize("warmup", ["constant", "up", "down"])
def test_parity_over_several_runs(warmup: str) -> None:
    spec = Attached(WARMUPS[warmup])
    ours = train(EMAHandler, spec, epochs=1, calls=3)
    assert_parity(ours, train(IgniteHandler, spec, epochs=1, calls=3))
    assert ours.attached[0].handler.update_index == 3 * BATCHES


def test_parity_of_two_handlers_on_one_engine() -> None:
    specs = [
        Attached({"momentum": 0.1, "handle_buffers": "update"}, "fast"),
        Attached({"momentum": 0.6}, "slow", Events.ITERATION_COMPLETED(every=2)),
    ]
    ours = train(EMAHandler, *specs)
    assert_parity(ours, train(IgniteHandler, *specs))
    assert [len(spec.momenta) for spec in ours.attached] == [12, 6]


def test_parity_under_data_parallel() -> None:
    spec = Attached(WARMUPS["down"] | {"handle_buffers": "update"}, wrap=data_parallel)
    ours = train(EMAHandler, spec)
    assert_parity(ours, train(IgniteHandler, spec))
    assert isinstance(ours.attached[0].handler.ema_model, DataParallel)
    assert isinstance(ours.attached[0].handler.model, DataParallel)


def test_parity_in_float64() -> None:
    spec = Attached(WARMUPS["up"] | {"handle_buffers": "update"})
    ours = train(EMAHandler, spec, dtype=torch.float64)
    assert_parity(ours, train(IgniteHandler, spec, dtype=torch.float64))


def test_parity_check_can_fail() -> None:
    ours = train(EMAHandler, Attached({"momentum": 0.1}))
    theirs = train(IgniteHandler, Attached({"momentum": 0.1}))
    with torch.no_grad():
        theirs.attached[0].handler.ema_model[1].bias.mul_(1 + 1e-4)
    with pytest.raises(AssertionError, match="bias"):
        assert_parity(ours, theirs)
    other = train(IgniteHandler, Attached({"momentum": 0.1 + 1e-9}))
    with pytest.raises(AssertionError):
        assert_parity(ours, other)


def test_triton_backend(kernel_device: torch.device) -> None:
    pytest.importorskip("triton")
    model = nn.Linear(3, 2).to(kernel_device)
    handler = EMAHandler(model, 0.25, backend="triton")
    before = deepcopy(handler.ema_model.state_dict())
    engine = Engine(lambda engine, batch: model.weight.data.add_(1.0))
    handler.attach(engine)
    engine.run([0])
    assert handler.ema.backend == "triton"
    # The difference is 1 up to one rounding; the update rounds once more.
    eps = torch.finfo(torch.float32).eps
    bound = 2 * eps * (before["weight"].abs() + 1)
    assert bool(((handler.ema_model.weight - before["weight"] - 0.25).abs() <= bound).all())
    assert torch.equal(handler.ema_model.bias, before["bias"])


# --- engine.state ------------------------------------------------------------------------------


def unit_model() -> nn.Linear:
    """One weight of 1 in float64. An EMA of 0 becomes the momentum by one update."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    return model


def probing_engine(*handlers: Handler) -> tuple[Engine, list[list[float]]]:
    """An engine that shows which momentum was really applied at each of its iterations.

    Its step zeroes the EMA. After a run, the second result holds the EMA's weight at the end of
    each iteration, for every handler: the momentum, or 0.0 where no update was made.
    """
    used: list[list[float]] = [[] for _ in handlers]
    running = False

    def step(engine: Engine, batch: Any) -> None:
        nonlocal running
        running = True
        for handler in handlers:
            handler.ema_model.weight.data.zero_()

    def note() -> None:
        nonlocal running
        if running:
            for values, handler in zip(used, handlers, strict=True):
                values.append(handler.ema_model.weight.item())
        running = False

    engine = Engine(step)
    engine.add_event_handler(Events.ITERATION_STARTED | Events.COMPLETED, note)
    return engine, used


# Above a half, 1 - (1 - momentum) is the momentum up to one rounding.
def same(momenta: list[float]) -> Any:
    return pytest.approx(momenta, rel=0, abs=2**-52)


def linear(start: float, end: float, iters: int, updates: int) -> list[float]:
    return [
        start + (end - start) * min(index, iters - 1) / max(1, iters - 1)
        for index in range(updates)
    ]


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


# --- Faults of Ignite 0.5.5: warm-up -----------------------------------------------------------


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


SCHEDULES = [
    Constant(0.3),
    LinearWarmup(0.9, 0.1, 5),
    InverseDecay(),
    CountWarmup(0.8),
    ExponentialRamp(0.9, tau=4),
    CosineRamp(0.6, updates=9),
    HalfLife(3.0, every=2),
]


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


# --- Faults of Ignite 0.5.5: buffers -----------------------------------------------------------


class Buffered(nn.Module):
    """BatchNorm, and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("total", torch.ones(2, dtype=torch.float16))
        self.register_buffer("count", torch.zeros(2, dtype=torch.int32))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        self.total += 1
        self.count += 1
        self.seen |= x[0] > 0
        self.scratch += 1
        return self.norm(x)


def buffered(cls: type, handle_buffers: str) -> Any:
    """A handler after two updates."""
    torch.manual_seed(0)
    model = Buffered()
    handler = cls(model, momentum=0.5, handle_buffers=handle_buffers)
    engine = Engine(lambda engine, batch: model(batch))
    handler.attach(engine)
    engine.run(list(torch.randn(2, 5, 3)))
    return handler


def shared_storage(handler: Any) -> list[str]:
    online = {
        tensor.untyped_storage().data_ptr()
        for tensor in [*handler.model.parameters(), *handler.model.buffers()]
    }
    named = [*handler.ema_model.named_parameters(), *handler.ema_model.named_buffers()]
    return [name for name, tensor in named if tensor.untyped_storage().data_ptr() in online]


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
def test_no_tensor_shares_storage_with_the_online_model(handle_buffers: str) -> None:
    assert shared_storage(buffered(EMAHandler, handle_buffers)) == []


@control
@pytest.mark.parametrize(
    ("handle_buffers", "shared"),
    [("copy", "norm.running_mean"), ("copy", "count"), ("update", "count"), ("update", "seen")],
)
def test_control_ignites_buffers_share_storage(handle_buffers: str, shared: str) -> None:
    assert shared in shared_storage(buffered(IgniteHandler, handle_buffers))


def values(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def changed(before: dict[str, Tensor], model: nn.Module) -> list[str]:
    after = values(model)
    assert list(after) == list(before)
    return [name for name in before if not torch.equal(before[name], after[name])]


BUFFERS = ["count", "total", "norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]


def after_online_forward(handler: Any) -> list[str]:
    before = values(handler.ema_model)
    handler.model.train()(torch.randn(5, 3) + 3)
    return changed(before, handler.ema_model)


def after_ema_forward(handler: Any) -> list[str]:
    before = values(handler.model)
    handler.ema_model.train()(torch.randn(5, 3) + 3)
    return changed(before, handler.model)


def after_loading_into_ema(handler: Any) -> list[str]:
    before = values(handler.model)
    state = {name: value + 1 for name, value in deepcopy(handler.ema_model.state_dict()).items()}
    handler.ema_model.load_state_dict(state)
    return changed(before, handler.model)


CROSSINGS = [after_online_forward, after_ema_forward, after_loading_into_ema]


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
@pytest.mark.parametrize("crossing", CROSSINGS)
def test_one_model_leaves_the_other_alone(
    crossing: Callable[[Any], list[str]], handle_buffers: str
) -> None:
    assert crossing(buffered(EMAHandler, handle_buffers)) == []


@control
@pytest.mark.parametrize("crossing", CROSSINGS)
def test_control_ignites_models_change_each_other(crossing: Callable[[Any], list[str]]) -> None:
    assert set(BUFFERS) <= set(crossing(buffered(IgniteHandler, "copy")))


def saved_alias(cls: type, path: Path) -> bool:
    handler = buffered(cls, "copy")
    torch.save({"model": handler.model, "ema": handler.ema_model}, path)
    loaded = torch.load(path, weights_only=False)
    online = loaded["model"].norm.running_mean.untyped_storage()
    return loaded["ema"].norm.running_mean.untyped_storage().data_ptr() == online.data_ptr()


def test_no_alias_after_saving_both_models(tmp_path: Path) -> None:
    assert not saved_alias(EMAHandler, tmp_path / "both.pt")


@control
def test_control_ignites_alias_is_saved(tmp_path: Path) -> None:
    assert saved_alias(IgniteHandler, tmp_path / "both.pt")


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
def test_buffers_of_every_kind(handle_buffers: str) -> None:
    handler = buffered(EMAHandler, handle_buffers)
    online, ema = values(handler.model), values(handler.ema_model)
    start = values(Buffered())
    assert len(ema) == 9
    for name in set(ema) - {"norm.weight", "norm.bias"}:
        assert ema[name].dtype == online[name].dtype
        if handle_buffers == "ema_train":
            assert torch.equal(ema[name], start[name]), name
        elif handle_buffers == "copy" or not ema[name].is_floating_point():
            assert torch.equal(ema[name], online[name]), name
    if handle_buffers == "update":
        # total: 1, then online 2 and 3 with a momentum of a half; scratch: 0, then 1 and 2. Exact.
        assert ema["total"].tolist() == [2.25] * 2
        assert ema["scratch"].tolist() == [1.25] * 4
    else:
        assert ema["total"].tolist() == [3.0 if handle_buffers == "copy" else 1.0] * 2


def test_the_online_models_buffers_stay_its_own() -> None:
    model = Buffered()
    pointers = [buffer.data_ptr() for buffer in model.buffers()]
    handler = EMAHandler(model, momentum=0.5)
    engine = Engine(lambda engine, batch: model(batch))
    handler.attach(engine)
    engine.run(list(torch.randn(3, 5, 3)))
    assert [buffer.data_ptr() for buffer in model.buffers()] == pointers


def test_integer_parameters_are_copied() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.levels = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.ones(3))

    def run(cls: type) -> nn.Module:
        model = Quantized()
        handler = cls(model, momentum=0.5)

        def step(engine: Engine, batch: Any) -> None:
            model.levels.data += 1
            model.scale.data += 1

        engine = Engine(step)
        handler.attach(engine)
        engine.run(range(2))
        return handler.ema_model

    ema = run(EMAHandler)
    assert ema.levels.tolist() == [3, 3, 3]
    assert ema.scale.tolist() == [2.25] * 3
    if ignite.__version__ == "0.5.5":
        with pytest.raises(RuntimeError):
            run(IgniteHandler)


# --- Faults of Ignite 0.5.5: low precision -----------------------------------------------------

LOW = [torch.bfloat16, torch.float16]
UPDATES = 2000


def low_precision(cls: type, dtype: torch.dtype, **kwargs: Any) -> nn.Module:
    """The EMA model after so many updates from 1.0 towards 1.5 at the default momentum."""
    model = nn.Linear(4, 2).to(dtype)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    handler = cls(model, **kwargs)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1.5)
    engine = Engine(lambda engine, batch: None)
    handler.attach(engine)
    engine.run(range(UPDATES))
    return handler.ema_model


@pytest.mark.parametrize("dtype", LOW)
def test_fp32_ema_of_a_low_precision_model_does_not_stall(dtype: torch.dtype) -> None:
    ema = low_precision(EMAHandler, dtype, ema_dtype=torch.float32)
    truth = 1.5 - 0.5 * (1 - 0.0002) ** UPDATES
    # One eps of at most 1.5 per update, and half an eps (relative) of the momentum, whose effect
    # on the truth is at most 0.5 * UPDATES * 0.0002 * eps / 2.
    bound = UPDATES * torch.finfo(torch.float32).eps * 1.5 + torch.finfo(torch.float32).eps
    assert bound < 0.001 < truth - 1.16
    for parameter in ema.parameters():
        assert parameter.dtype == torch.float32
        assert bool(((parameter.double() - truth).abs() <= bound).all())


@control
@pytest.mark.parametrize("dtype", LOW)
def test_control_ignite_stalls_in_low_precision(dtype: torch.dtype) -> None:
    for parameter in low_precision(IgniteHandler, dtype).parameters():
        assert bool((parameter == 1.0).all())


@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
@pytest.mark.parametrize("dtype", LOW)
def test_ema_dtype_is_that_of_buffers_too(dtype: torch.dtype, handle_buffers: str) -> None:
    model = network().to(dtype)
    handler = EMAHandler(model, 0.25, handle_buffers=handle_buffers, ema_dtype=torch.float32)
    start = values(model)
    engine = Engine(lambda engine, batch: model(batch))
    handler.attach(engine)
    engine.run([torch.randn(6, 4).to(dtype)])
    ema, online = values(handler.ema_model), values(model)
    assert ema["0.running_mean"].dtype == torch.float32
    assert ema["0.num_batches_tracked"].dtype == torch.int64
    new, old = online["0.running_mean"].float(), start["0.running_mean"].float()
    assert not torch.equal(new, old)
    if handle_buffers == "copy":
        assert torch.equal(ema["0.running_mean"], new)
    else:
        # From zeros, a quarter of a float is exact.
        assert torch.equal(ema["0.running_mean"], new / 4)
    assert all(p.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize(
    ("dtype", "resolution"),
    [(LOW[0], r"0\.0(039|078)"), (LOW[1], r"0\.000(4[89]|9[78])")],
)
@pytest.mark.parametrize("warmup", [{}, {"momentum_warmup": 0.5, "warmup_iters": 2}])
def test_rounding_to_nearest_in_low_precision_warns(
    dtype: torch.dtype, resolution: str, warmup: dict[str, Any]
) -> None:
    def run() -> None:
        handler = EMAHandler(nn.Linear(4, 2).to(dtype), precision="nearest", **warmup)
        engine = Engine(lambda engine, batch: None)
        handler.attach(engine)
        engine.run(range(4))

    with pytest.warns(UserWarning, match=r"0\.0002|2e-0?4") as caught:
        run()
    text = str(caught[0].message)
    assert len(caught) == 1, [str(one.message) for one in caught]
    assert str(dtype).removeprefix("torch.") in text
    assert re.search(resolution, text), text
    assert "precision='exact'" in text  # the remedy


@pytest.mark.parametrize("dtype", LOW)
def test_a_momentum_that_low_precision_resolves_does_not_warn(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 2).to(dtype)
    handler = EMAHandler(model, 0.25)  # a warning would be an error here
    old = values(model)
    engine = Engine(lambda engine, batch: model.weight.data.add_(1.0))
    handler.attach(engine)
    engine.run(range(1))
    assert handler.ema_model.weight.dtype == dtype
    expected = old["weight"].double() + 0.25 * (model.weight.double() - old["weight"].double())
    # One eps of the larger value, see tolerances.update_bound.
    bound = torch.finfo(dtype).eps * torch.maximum(old["weight"].abs(), model.weight.abs()).double()
    assert bool(((handler.ema_model.weight.double() - expected).abs() <= bound).all())


# --- Faults of Ignite 0.5.5: attaching and detaching -------------------------------------------


def counting() -> tuple[nn.Linear, Callable[[Engine, Any], None]]:
    """A weight of 1 and a step that adds 1 to it."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)

    def step(engine: Engine, batch: Any) -> None:
        model.weight.data.add_(1.0)

    return model, step


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


# --- Faults of Ignite 0.5.5: arguments ---------------------------------------------------------

BAD_ARGUMENTS: list[tuple[dict[str, Any], list[str]]] = [
    ({"momentum": 1.5}, ["Invalid momentum", "1.5", "[0, 1]"]),
    ({"momentum": -0.1}, ["Invalid momentum", "-0.1", "[0, 1]"]),
    ({"momentum": float("nan")}, ["momentum", "nan", "[0, 1]"]),
    ({"momentum": "0.1"}, ["momentum", "'0.1'"]),
    ({"momentum_warmup": 5.0, "warmup_iters": 10}, ["momentum_warmup", "5.0", "[0, 1]"]),
    ({"momentum_warmup": -1e-9, "warmup_iters": 10}, ["momentum_warmup", "-1e-09", "[0, 1]"]),
    ({"momentum_warmup": 5.0}, ["momentum_warmup", "5.0", "[0, 1]"]),
    ({"momentum_warmup": 0.1, "warmup_iters": -3}, ["warmup_iters", "-3", "at least 0"]),
    ({"momentum_warmup": 0.1, "warmup_iters": 2.5}, ["warmup_iters", "2.5"]),
    ({"warmup_iters": 2.5}, ["warmup_iters", "2.5"]),
    ({"handle_buffers": "bogus"}, ["handle_buffers", "copy", "update", "ema_train", "bogus"]),
    ({"backend": "bogus"}, ["backend", "auto", "triton", "foreach", "bogus"]),
    ({"ema_dtype": torch.int32}, ["ema_dtype", "int32"]),
    ({"ema_dtype": "float32"}, ["ema_dtype", "float32"]),
    ({"schedule": 0.5}, ["schedule", "0.5"]),
    ({"schedule": Constant(0.1), "momentum": 0.3}, ["schedule", "momentum"]),
    (
        {"schedule": Constant(0.1), "momentum_warmup": 0.3, "warmup_iters": 5},
        ["schedule", "momentum_warmup"],
    ),
    ({"model": "a string"}, ["model should be an instance of nn.Module", "str"]),
    ({"model": nn.Linear}, ["model should be an instance of nn.Module", "type"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_ARGUMENTS, ids=lambda value: str(value)[:60])
def test_bad_arguments_are_errors_at_construction(
    arguments: dict[str, Any], words: list[str]
) -> None:
    arguments = {"model": unit_model()} | arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half a warm-up warns besides
        with pytest.raises((ValueError, TypeError)) as error:
            EMAHandler(**arguments)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in {str(error.value)!r}"


def test_unknown_keywords_are_errors_that_list_the_known_ones() -> None:
    with pytest.raises(TypeError) as error:
        EMAHandler(unit_model(), momentum_warm_up=0.1)  # type: ignore[call-arg]
    text = str(error.value)
    assert text.startswith("EMAHandler got an unexpected keyword argument 'momentum_warm_up'")
    known = {*inspect.signature(ModelEMA).parameters, *inspect.signature(EMAHandler).parameters}
    assert {*text.rpartition("It takes: ")[2].rstrip(".").split(", ")} == known - {"options"}


def test_the_typed_options_are_those_of_model_ema() -> None:
    signature = inspect.signature(ModelEMA).parameters
    named = {name: one.annotation for name, one in signature.items()}
    del named["model"], named["handle_buffers"]  # EMAHandler names these itself
    assert {name: one.__forward_arg__ for name, one in Options.__annotations__.items()} == named
    assert {*named} <= {*re.findall(r"`(\w+)`", inspect.getdoc(EMAHandler) or "")}


@pytest.mark.parametrize("momentum", [0.0, 1.0, 0, 1])
def test_the_ends_of_the_range_are_valid(momentum: float) -> None:
    model, step = counting()
    handler = EMAHandler(model, momentum)
    engine = Engine(step)
    handler.attach(engine)
    engine.run(range(2))
    assert handler.ema_model.weight.item() == 1.0 + 2 * momentum


@pytest.mark.parametrize("value", [2.0, -0.5, float("nan"), None, "a"])
def test_a_schedule_out_of_range_is_an_error(value: Any) -> None:
    model, step = counting()
    handler = EMAHandler(model, schedule=lambda index: 0.5 if index == 1 else value)
    engine = Engine(step)
    handler.attach(engine)
    with pytest.raises((ValueError, TypeError), match=rf"(?s)momentum.*{value}"):
        engine.run(range(2))
    assert handler.ema_model.weight.item() == 1.5
    assert handler.update_index == 1


def test_lazy_parameters_are_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"(?si)weight.*(lazy|uninitialized|forward)"):
        EMAHandler(nn.LazyLinear(3))


# --- Faults of Ignite 0.5.5: wrappers ----------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A distributed world of this one process."""
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def data_parallel(model: nn.Module) -> nn.Module:
    """On one GPU, or on the CPU."""
    return DataParallel(model, device_ids=[0] if torch.cuda.is_available() else None)


def compiled(model: nn.Module) -> nn.Module:
    wrapped = torch.compile(model, backend="eager")
    assert isinstance(wrapped, OptimizedModule)
    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "compiled": compiled,
    "ddp": DistributedDataParallel,
    "ddp of compiled": lambda model: DistributedDataParallel(compiled(model)),
    "compiled ddp": lambda model: compiled(DistributedDataParallel(model)),
    "dp": data_parallel,
    "dp of compiled": lambda model: data_parallel(compiled(model)),
    "compiled dp": lambda model: compiled(data_parallel(model)),
}


def names_in(state: Any) -> set[str]:
    """All keys in nested mappings."""
    if not isinstance(state, dict):
        return set()
    return {str(key) for key in state}.union(*(names_in(value) for value in state.values()))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_taken_off(wrapper: str) -> None:
    model = network()
    online = WRAPPERS[wrapper](model)
    modules = [type(module) for module in online.modules()]
    handler = EMAHandler(online, 0.25, handle_buffers="update")
    parallel = "dp" in wrapper.split()
    expected = list((data_parallel(network()) if parallel else network()).state_dict())
    assert list(handler.ema_model.state_dict()) == expected
    assert isinstance(handler.ema_model, DataParallel) is parallel
    assert not any(
        isinstance(module, OptimizedModule | DistributedDataParallel)
        for module in handler.ema_model.modules()
    )
    assert isinstance(handler.model, DataParallel) is parallel
    assert not isinstance(handler.model, OptimizedModule | DistributedDataParallel)
    if not parallel:
        assert handler.model is model
    # The online model keeps its wrappers.
    assert [type(module) for module in online.modules()] == modules

    engine = Engine(sgd_step(model, online))
    handler.attach(engine)
    before = values(bare(handler.ema_model))
    engine.run(batches()[:1])
    after, now = values(bare(handler.ema_model)), values(model)
    for name, old in before.items():
        if not old.is_floating_point():
            assert torch.equal(after[name], now[name])
            continue
        assert not torch.equal(now[name], old), "the training moved nothing"
        truth = torch.lerp(old.double(), now[name].double(), 0.25)
        # One eps of the larger value, see tolerances.update_bound.
        bound = torch.finfo(old.dtype).eps * torch.maximum(old.abs(), now[name].abs()).double()
        assert bool(((after[name].double() - truth).abs() <= bound).all()), name
    assert not any("_orig_mod" in name for name in names_in(handler.state_dict()))
    assert "1.weight" in " ".join(names_in(handler.state_dict()))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", ["compiled", "ddp", "ddp of compiled", "dp of compiled"])
def test_states_fit_whatever_the_wrapper(wrapper: str) -> None:
    handler = EMAHandler(WRAPPERS[wrapper](network()), 0.25)
    with torch.no_grad():
        for value in handler.ema_model.parameters():
            value.add_(1.0)
    plain = EMAHandler(WRAPPERS["dp" if wrapper.startswith("dp") else "none"](network()), 0.25)
    plain.load_state_dict(handler.state_dict())
    assert changed(values(bare(handler.ema_model)), bare(plain.ema_model)) == []


@control
@pytest.mark.parametrize("wrapper", ["compiled", "dp of compiled", "compiled dp"])
def test_control_ignites_names_are_not_clean(wrapper: str) -> None:
    handler = IgniteHandler(WRAPPERS[wrapper](network()))
    assert all("_orig_mod" in name for name in handler.ema_model.state_dict())


@pytest.mark.usefixtures("process_group")
def test_a_model_that_was_sharded_meanwhile_is_a_clear_error() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    handler = EMAHandler(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="Build the EMA after the model is sharded"):
        handler.ema.update(0.5)
    again = EMAHandler(model)
    with pytest.raises(RuntimeError, match="there is no ema_model"):
        _ = again.ema_model


# --- Faults of Ignite 0.5.5: tensors that change -----------------------------------------------


def with_shape(model: nn.Module) -> None:
    model.weight = nn.Parameter(torch.zeros(5, 4))


def with_buffer_shape(model: nn.Module) -> None:
    model.extra = torch.zeros(5)


def without(model: nn.Module) -> None:
    del model.bias


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_shape, ["weight", "3, 4", "5, 4"]),
        (with_buffer_shape, ["extra", "2", "5"]),
        (without, ["bias"]),
    ],
)
@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
def test_a_changed_shape_is_an_error_naming_it(
    change: Callable[[nn.Module], None], words: list[str], handle_buffers: str
) -> None:
    model = nn.Linear(4, 3)
    model.register_buffer("extra", torch.ones(2))
    handler = EMAHandler(model, 0.5, 0.25, 3, handle_buffers)

    def step(engine: Engine, batch: int) -> None:
        if batch == 1:
            change(model)
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data.add_(1.0)

    engine = Engine(step)
    handler.attach(engine)
    engine.run([0])
    before = values(handler.ema_model)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - its text is checked below
        engine.run([1])
    for word in words:
        assert word in str(error.value), f"{word!r} is not in {str(error.value)!r}"
    assert changed(before, handler.ema_model) == []
    assert handler.update_index == 1


def test_a_failed_update_shows_the_momentum_that_it_would_have_had() -> None:
    model = nn.Linear(4, 3)
    handler = EMAHandler(model, 0.5, 0.25, 3)
    engine = Engine(lambda engine, batch: with_shape(model) if batch == 1 else None)
    handler.attach(engine)
    engine.run([0])
    assert engine.state.ema_momentum == 0.25
    with pytest.raises(ValueError, match="weight"):
        engine.run([1])
    assert engine.state.ema_momentum == 0.375  # written first, as in Ignite
    assert handler.update_index == 1


@control
def test_control_ignite_swallows_a_changed_buffer() -> None:
    model = nn.Linear(4, 3)
    model.register_buffer("extra", torch.ones(2))
    handler = IgniteHandler(model, 0.5, handle_buffers="update")
    engine = Engine(lambda engine, batch: with_buffer_shape(model))
    handler.attach(engine)
    engine.run([0])
    assert handler.ema_model.extra.shape == (5,)


def by_parameter(model: nn.Module) -> None:
    model.weight = nn.Parameter(torch.full((3, 4), 2.0))


def by_data(model: nn.Module) -> None:
    model.weight.data = torch.full((3, 4), 2.0)


def by_assign(model: nn.Module) -> None:
    state = {"weight": torch.full((3, 4), 2.0), "bias": model.bias.detach().clone()}
    model.load_state_dict(state, assign=True)


def by_cast(model: nn.Module) -> None:
    model.to(torch.float64)
    nn.init.constant_(model.weight, 2.0)


def by_cast_down(model: nn.Module) -> None:
    model.to(torch.bfloat16)
    nn.init.constant_(model.weight, 2.0)


def by_strides(model: nn.Module) -> None:
    model.weight.data = torch.full((4, 3), 2.0).t()


@pytest.mark.parametrize(
    "change", [by_parameter, by_data, by_assign, by_cast, by_cast_down, by_strides]
)
def test_replaced_tensors_are_followed(change: Callable[[nn.Module], None]) -> None:
    model = nn.Linear(4, 3)
    nn.init.ones_(model.weight)
    handler = EMAHandler(model, 0.5)
    engine = Engine(lambda engine, batch: change(model) if batch == 1 else None)
    handler.attach(engine)
    engine.run([0, 1, 0])
    assert handler.ema_model.weight.dtype == torch.float32
    assert handler.ema_model.weight.tolist() == [[1.75] * 4] * 3  # 1 -> 1.5 -> 1.75


@pytest.mark.gpu
def test_moved_models_are_followed() -> None:
    model = nn.Linear(4, 3)
    nn.init.ones_(model.weight)
    handler = EMAHandler(model, 0.5)

    def step(engine: Engine, batch: str) -> None:
        nn.init.constant_(model.to(batch).weight, 2.0)

    engine = Engine(step)
    handler.attach(engine)
    engine.run(["cpu", "cuda", "cpu"])
    assert handler.ema_model.weight.device.type == "cpu"
    assert handler.ema_model.weight.tolist() == [[1.875] * 4] * 3


def reordered(cls: type) -> nn.Module:
    """Layers of one shape change places in the order of registration."""
    model = nn.Module()
    model.first, model.second = nn.Linear(2, 2), nn.Linear(2, 2)
    for value, layer in ((1.0, model.first), (5.0, model.second)):
        nn.init.constant_(layer.weight, value)
    handler = cls(model, 0.5)
    first = model.first
    del model.first
    model.first = first
    assert [name for name, _ in model.named_children()] == ["second", "first"]
    engine = Engine(lambda engine, batch: None)
    handler.attach(engine)
    engine.run([0])
    return handler.ema_model


def test_parameters_are_paired_by_name() -> None:
    ema = reordered(EMAHandler)
    assert ema.first.weight.unique().tolist() == [1.0]
    assert ema.second.weight.unique().tolist() == [5.0]


@control
def test_control_ignite_pairs_by_position() -> None:
    assert reordered(IgniteHandler).first.weight.unique().tolist() == [3.0]


def test_requires_grad_of_the_ema_is_harmless() -> None:
    model, step = counting()
    handler = EMAHandler(model, 0.5)
    handler.ema_model.requires_grad_(True)
    engine = Engine(step)
    handler.attach(engine)
    engine.run(range(2))
    assert handler.ema_model.weight.item() == 2.25
    assert handler.ema_model.weight.is_leaf
    handler.ema_model(torch.ones(1, 1)).sum().backward()
    assert handler.ema_model.weight.grad.item() == 1.0
    assert model.weight.grad is None


@control
def test_control_ignite_needs_requires_grad_off() -> None:
    model, step = counting()
    handler = IgniteHandler(model, 0.5)
    handler.ema_model.requires_grad_(True)
    engine = Engine(step)
    handler.attach(engine)
    with pytest.raises(RuntimeError, match="leaf"):
        engine.run([0])


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
def test_sync_takes_a_model_loaded_later(handle_buffers: str) -> None:
    model = network()
    handler = EMAHandler(model, 0.5, handle_buffers=handle_buffers)
    other = network()
    other(torch.randn(6, 4) + 3)  # statistics and a count of its own
    model.load_state_dict(other.state_dict())
    assert changed(values(model), handler.ema_model) != []
    handler.sync()
    assert changed(values(model), handler.ema_model) == []
    assert shared_storage(handler) == []
    engine = Engine(lambda engine, batch: model[1].weight.data.add_(1.0))
    handler.attach(engine)
    engine.run([0])
    truth = other[1].weight.double() + 0.5
    # One eps of the larger value, see tolerances.update_bound, and one for the step's own rounding.
    bound = 2 * torch.finfo(torch.float32).eps * (other[1].weight.abs().double() + 1)
    assert bool(((handler.ema_model[1].weight.double() - truth).abs() <= bound).all())


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_into_the_ema_go_on(assign: bool) -> None:
    model, step = counting()
    handler = EMAHandler(model, 0.5)
    engine = Engine(step)
    handler.attach(engine)
    engine.run([0])
    handler.ema_model.load_state_dict({"weight": torch.tensor([[7.0]])}, assign=assign)
    engine.run([0])
    assert handler.ema_model.weight.item() == 5.0  # between 7 and 3


def test_a_frozen_parameter_is_averaged() -> None:
    model, step = counting()
    model.requires_grad_(False)
    handler = EMAHandler(model, 0.5)
    engine = Engine(step)
    handler.attach(engine)
    engine.run(range(2))
    assert handler.ema_model.weight.item() == 2.25


# --- Checkpoints -------------------------------------------------------------------------------


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
    # Of a single object, Ignite saves the state itself, and looks for the key in it when loading.
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
