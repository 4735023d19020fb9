"""The handler beside Ignite's: the same interface, the same results, and clear errors."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

pytest.importorskip("ignite")

from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler as IgniteHandler

from ema_triton import EMAHandler, ModelEMA
from ema_triton.arguments import Options, check_options
from ema_triton.schedules import Constant
from tests.engines import (
    BATCHES,
    EVENTS,
    bare,
    batches,
    counting,
    data_parallel,
    network,
    sgd_step,
    unit_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_the_model_is_no_option_of_what_does_not_take_one() -> None:
    class WithoutModel:
        def __init__(self, schedule: object, **options: object) -> None: ...

    with pytest.raises(TypeError, match="unexpected keyword argument 'model'") as error:
        check_options(WithoutModel, {"model": unit_model(), "seed": 1}, ModelEMA)
    known = {*inspect.signature(ModelEMA).parameters, "schedule"} - {"model"}
    assert {*str(error.value).rpartition("It takes: ")[2].rstrip(".").split(", ")} == known


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
