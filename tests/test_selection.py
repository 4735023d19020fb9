"""What is averaged, what is copied, and with which momentum: chosen by name."""

from __future__ import annotations

import copy
import re
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA
from tests.states import accumulated

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def handler_of(model: nn.Module, *arguments: object, **options: object) -> Any:
    """An `EMAHandler`, where ignite is installed."""
    pytest.importorskip("ignite")
    from ema_triton import EMAHandler

    return EMAHandler(model, *arguments, **options)


class Net(nn.Module):
    """Names that begin alike, names inside names, and a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.layer10 = nn.Linear(2, 2)
        self.inner = nn.ModuleDict({"layer1": nn.Linear(2, 2)})
        self.head = nn.Linear(2, 2)
        self.tied = self.layer10.weight


BLOCK = {f"layer1.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
TEN = {"layer10.weight", "layer10.bias", "tied"}
INNER = {"inner.layer1.weight", "inner.layer1.bias"}
HEAD = {"head.weight", "head.bias"}
ALL = BLOCK | TEN | INNER | HEAD
BIASES = {name for name in ALL if name.endswith("bias")}
TIE = {"tied", "layer10.weight"}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def moved(ema: ModelEMA, momentum: float = 0.25) -> dict[str, float]:
    """The way that each parameter went from 0 to 1, read from its first element."""
    with torch.no_grad():
        for tensor in ema.model.parameters():
            tensor.fill_(1.0)
        for tensor in ema.ema_model.parameters():
            tensor.fill_(0.0)
    ema.update(momentum)
    found = parameters(ema.ema_model)
    assert all(bool((tensor == tensor.flatten()[0]).all()) for tensor in found.values())
    return {name: float(tensor.flatten()[0]) for name, tensor in found.items()}


SELECTIONS = [  # include, exclude, what is averaged
    (None, (), ALL),
    ("layer1", (), BLOCK),  # and neither layer10 nor inner.layer1
    ("layer1*", (), BLOCK | TEN),
    ("*layer1", (), BLOCK | INNER),
    ("layer1.0", (), {"layer1.0.weight", "layer1.0.bias"}),
    ("layer1?", (), TEN),
    ("layer1.[1-9]", (), {"layer1.1.weight", "layer1.1.bias"}),
    ("[!l]*", (), INNER | HEAD | TIE),
    ("head.weight", (), {"head.weight"}),
    (["head", "*.bias"], (), HEAD | BIASES),
    (("inner", "head.bias"), (), INNER | {"head.bias"}),
    (None, "layer1", ALL - BLOCK),
    (None, "*.bias", ALL - BIASES),
    (None, ["head", "inner"], ALL - HEAD - INNER),
    (None, "tied", ALL - TIE),  # and so its twin
    (None, "layer10", ALL - TEN),
    ("tied", (), TIE),
    ("layer1", "*.bias", {"layer1.0.weight", "layer1.1.weight"}),
    (["layer1", "head"], ["layer1.1", "head.bias"], {"layer1.0.weight", "layer1.0.bias"}
     | {"head.weight"}),
]  # fmt: skip


@pytest.mark.parametrize(("include", "exclude", "averaged"), SELECTIONS)
def test_patterns_choose_what_is_averaged(
    include: object, exclude: object, averaged: set[str], backend: str, device: torch.device
) -> None:
    model = Net().to(device)
    ema = ModelEMA(model, include=include, exclude=exclude, backend=backend)
    found = moved(ema)
    assert {name for name, share in found.items() if share == 0.25} == averaged
    assert {name for name, share in found.items() if share == 1.0} == ALL - averaged
    assert ema.ema_model.tied is ema.ema_model.layer10.weight


@pytest.mark.parametrize(("include", "exclude"), [([], ()), ("0.head", "*"), ("*running_mean", ())])
def test_nothing_left_to_average_is_an_error(include: object, exclude: object) -> None:
    model = nn.Sequential(Net(), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="leaves nothing to average"):
        ModelEMA(model, include=include, exclude=exclude)


SCALES = [  # momentum_scale, the momentum, the share of each group
    ({"layer1": 0.5}, 0.25, {"layer1.0.weight": 0.125, "layer10.bias": 0.25, "head.bias": 0.25}),
    ({"*.bias": 0.5, "head": 2}, 0.25, {"head.bias": 0.125, "head.weight": 0.5}),
    ({"head": 2, "*.bias": 0.5}, 0.25, {"head.bias": 0.5, "layer10.bias": 0.125}),
    ({"head.weight": 1, "head*": 0}, 0.25, {"head.weight": 0.25, "head.bias": 0.0}),
    ({"head": 0.0}, 0.5, {"head.weight": 0.0, "layer10.bias": 0.5}),
    ({"head": 0.5}, 1.0, {"head.weight": 1.0, "layer10.bias": 1.0}),  # a copy is a copy
    ({"head": 100}, 0.25, {"head.weight": 1.0, "layer10.bias": 0.25}),
    ({"tied": 0.5}, 0.5, {"tied": 0.25, "layer10.weight": 0.25, "layer10.bias": 0.5}),
    ({"layer10.weight": 4, "tied": 0.5}, 0.125, {"tied": 0.5, "layer10.weight": 0.5}),
]


@pytest.mark.parametrize(("scales", "momentum", "shares"), SCALES)
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_the_first_pattern_that_matches_scales_the_momentum(
    scales: dict, momentum: float, shares: dict, kind: type, backend: str, device: torch.device
) -> None:
    model = Net().to(device)
    weight = kind(momentum)
    if isinstance(weight, Tensor):
        weight = weight.to(device)
    found = moved(ModelEMA(model, momentum_scale=scales, backend=backend), weight)
    assert {name: found[name] for name in shares} == shares


def test_what_is_excluded_has_no_momentum_to_scale() -> None:
    found = moved(ModelEMA(Net(), exclude="head", momentum_scale={"head.bias": 0.0}))
    assert (found["head.bias"], found["inner.layer1.bias"]) == (1.0, 0.25)


@pytest.mark.parametrize("precision", ["exact", "stochastic", "nearest"])
@pytest.mark.parametrize("online_dtype", FLOATS)
@pytest.mark.parametrize("ema_dtype", [None, *FLOATS])
def test_what_is_excluded_is_the_online_tensor_converted(
    ema_dtype: torch.dtype | None,
    online_dtype: torch.dtype,
    precision: str,
    backend: str,
    device: torch.device,
) -> None:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(online_dtype)

    shapes = {"odd": randn(7, 3), "turned": randn(5, 4).t(), "gaps": randn(9, 4)[:, ::2]}
    model = nn.ParameterDict({**shapes, "single": randn(), "averaged": randn(9)}).to(device)
    kind = {"ema_dtype": ema_dtype, "precision": precision, "backend": backend}
    ema = ModelEMA(model, exclude=[*shapes, "single"], **kind)
    for momentum in (0.0, 0.5):
        with torch.no_grad():
            for tensor in model.values():
                tensor.add_(1 / 3)
            model["odd"][0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
            model["turned"][0, 0] = torch.finfo(online_dtype).max
        before = ema.ema_model["averaged"].clone()
        ema.update(momentum)
        for name in (*shapes, "single"):
            mine, online = ema.ema_model[name].detach(), model[name].detach()
            expected = online.to(ema_dtype or online_dtype)
            assert (mine.dtype, mine.shape) == (expected.dtype, expected.shape)
            assert torch.equal(mine.isnan(), expected.isnan())
            assert torch.equal(mine.nan_to_num(), expected.nan_to_num())
        assert torch.equal(ema.ema_model["averaged"], before) == (momentum == 0.0)  # the control
    assert [*ema.state_dict()["residuals"]] == ["averaged"] * (
        precision == "exact" and ema.ema_model["odd"].dtype in (torch.bfloat16, torch.float16)
    )


def test_excluded_buffers_are_copied_where_buffers_are_averaged(
    backend: str, device: torch.device
) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)).to(device)
    patterns = {"exclude": "0.running_mean", "momentum_scale": {"1": 0.5}}
    ema = ModelEMA(model, handle_buffers="update", backend=backend, **patterns)
    for layer in model:
        layer.running_mean.fill_(1.0)
        layer.num_batches_tracked.fill_(7)
    ema.update(0.5)
    assert [layer.running_mean[0].item() for layer in ema.ema_model] == [1.0, 0.25, 0.5]
    assert [layer.num_batches_tracked.item() for layer in ema.ema_model] == [7, 7, 7]


@pytest.mark.parametrize("other", [{}, {"exclude": "head"}, {"exclude": "*"}])
def test_states_go_from_one_choice_to_another(
    other: dict, backend: str, device: torch.device
) -> None:
    def build(**patterns: object) -> ModelEMA:
        torch.manual_seed(1)
        return ModelEMA(Net().to(device, torch.bfloat16), backend=backend, **patterns)

    ema = build(exclude="head", momentum_scale={"layer10": 0.5})
    assert moved(ema, 0.3)["tied"] == torch.tensor(0.15).bfloat16()
    twin = build(**other)
    loses = other == {"exclude": "*"}  # a copied tensor has no residual
    with pytest.warns(UserWarning, match="had more digits") if loses else nullcontext():
        twin.load_state_dict(ema.state_dict())
    for mine, theirs in zip(twin.ema_model.parameters(), ema.ema_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    again = build(exclude="head", momentum_scale={"layer10": 0.5})
    again.load_state_dict(copy.deepcopy(ema).state_dict())
    with torch.no_grad():
        for each in (ema, again):
            for tensor in each.model.parameters():
                tensor.fill_(3.0)
            each.update(0.1)
    assert all(map(torch.equal, accumulated(ema), accumulated(again)))
    assert all(tensor.eq(3.0).all() for tensor in again.ema_model.head.parameters())


@pytest.mark.parametrize("argument", ["include", "exclude", "momentum_scale"])
@pytest.mark.parametrize(
    ("pattern", "near"),
    [("haed", "head"), ("layer1.0.wieght", "layer1.0.weight"), ("zzz", "layer1.0.weight")],
)
def test_a_pattern_that_matches_nothing_is_an_error(argument: str, pattern: str, near: str) -> None:
    given = {pattern: 0.5} if argument == "momentum_scale" else ["head", pattern]
    text = rf"^{argument}: '{pattern}' matches no parameter, buffer or module.*{re.escape(near)}"
    for build in (ModelEMA, handler_of):
        with pytest.raises(ValueError, match=text):
            build(Net(), **{argument: given})
    ModelEMA(Net(), **{argument: {"head": 0.5} if argument == "momentum_scale" else "head"})


@pytest.mark.parametrize("pattern", ["layer", "Head", "layer1.weight", "head.", "", "ayer1"])
def test_names_match_whole_and_in_case(pattern: str) -> None:
    with pytest.raises(ValueError, match="matches no parameter"):
        ModelEMA(Net(), exclude=pattern)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"include": 5}, TypeError, "include must be names or glob patterns.*got 5"),
        ({"include": [b"head"]}, TypeError, "include must be names or glob patterns"),
        ({"exclude": None}, TypeError, "exclude must be names or glob patterns"),
        ({"exclude": {"head"}}, TypeError, "exclude must be names or glob patterns"),
        ({"exclude": ["head", 1]}, TypeError, "exclude must be names or glob patterns"),
        ({"momentum_scale": [("head", 1)]}, TypeError, "momentum_scale must map patterns"),
        ({"momentum_scale": "head"}, TypeError, "momentum_scale must map patterns"),
        ({"momentum_scale": {1: 1.0}}, TypeError, "momentum_scale must be names or glob"),
        ({"momentum_scale": {"head": "1"}}, TypeError, "of 'head' must be a number, but got '1'"),
        ({"momentum_scale": {"head": True}}, TypeError, "of 'head' must be a number"),
        ({"momentum_scale": {"head": None}}, TypeError, "of 'head' must be a number"),
        ({"momentum_scale": {"head": -0.5}}, ValueError, "must be finite and not negative"),
        ({"momentum_scale": {"head": float("nan")}}, ValueError, "must be finite and not neg"),
        ({"momentum_scale": {"head": float("inf")}}, ValueError, "must be finite and not neg"),
    ],
)
def test_wrong_patterns_and_factors_are_refused(arguments: dict, error: type, text: str) -> None:
    for build in (ModelEMA, handler_of):
        with pytest.raises(error, match=text):
            build(Net(), **arguments)


def test_a_momentum_below_the_resolution_is_that_of_its_group() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).bfloat16()
    ema = ModelEMA(model, precision="nearest", momentum_scale={"0": 0.0}, exclude="1")
    ema.update(1e-4)  # warns of nothing: one stands still on purpose, one is copied
    ema = ModelEMA(model, precision="nearest", momentum_scale={"0": 1e-3})
    with pytest.warns(UserWarning, match=r"momentum 0\.0005 is below the resolution"):
        ema.update(0.5)


def test_the_handler_passes_all_of_it_on(backend: str, device: torch.device) -> None:
    engine_module = pytest.importorskip("ignite.engine")
    model = Net().to(device)
    patterns = {"include": ["head", "layer10", "inner"], "exclude": "*.bias"}
    handler = handler_of(
        model, 0.25, backend=backend, momentum_scale={"head": 0.5}, nonfinite="skip", **patterns
    )
    with torch.no_grad():
        for mine, online in zip(handler.ema_model.parameters(), model.parameters(), strict=True):
            mine.fill_(0.0)
            online.fill_(1.0)
    handler.attach(engine := engine_module.Engine(lambda engine, batch: None))
    engine.run([0])
    found = {name: t.flatten()[0].item() for name, t in parameters(handler.ema_model).items()}
    expected = dict.fromkeys(ALL, 1.0) | dict.fromkeys(TIE | INNER - BIASES, 0.25)
    assert found == {**expected, "head.weight": 0.125}
    assert handler.ema.nonfinite_count() == 0


@pytest.mark.parametrize("build", [ModelEMA, handler_of])
@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(2), nn.LazyBatchNorm1d])
@pytest.mark.parametrize("patterns", [{}, {"exclude": "*"}])
def test_a_lazy_module_needs_a_forward_first(build: type, make: type, patterns: dict) -> None:
    model = nn.Sequential(make())
    for arguments in ({}, {"ema_model": nn.Sequential(make())}):
        with pytest.raises(ValueError, match=r"weight' is uninitialized \(a lazy.*forward pass"):
            build(model, **arguments, **patterns)
    model(torch.ones(2, 3))
    assert build(model, **patterns).ema_model is not model


class Locked(nn.Linear):
    """It holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.lock = threading.Lock()


@pytest.mark.parametrize("build", [ModelEMA, handler_of])
def test_what_cannot_be_copied_asks_for_an_ema_model(
    build: type, backend: str, device: torch.device
) -> None:
    with pytest.raises(RuntimeError, match=r"cannot be copied .* or give an ema_model, another"):
        build(Locked(), backend=backend)
    online, mine = Locked().to(device), Locked().to(device)
    ema = build(online, ema_model=mine, exclude="bias", backend=backend)
    assert ema.ema_model is mine
    found = moved(ema if isinstance(ema, ModelEMA) else ema.ema)
    assert found == {"weight": 0.25, "bias": 1.0}


def test_a_factor_does_not_round_a_momentum_of_few_digits() -> None:
    model = nn.Linear(2, 2)
    ema = ModelEMA(model, momentum_scale={"*": 0.1})
    ema.update(0.5)
    (launch,) = ema._planner.plan.launches
    momentum = torch.tensor(0.3, dtype=torch.bfloat16)
    effective = launch.effective_momentum(momentum)
    assert effective.dtype == torch.float32
    assert effective.item() == pytest.approx(float(momentum) * 0.1, rel=2**-23)
    assert launch.effective_momentum(momentum.double()).dtype == torch.float64
