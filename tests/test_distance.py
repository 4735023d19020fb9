"""How far the EMA says it is from the online model: against exact sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ema_triton import ModelEMA
from ema_triton.distance import Distance
from ema_triton.ops import foreach_backend
from tests.strategies import REFERENCE_DTYPES, Layout, layouts, parameters

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 2.0**-53


def norm(values: list[Tensor]) -> float:
    """The float64 norm, rounded in the products only: fsum adds exactly."""
    return math.sqrt(
        math.fsum(x * x for value in values for x in value.double().flatten().tolist())
    )


def bound(elements: int) -> float:
    """How far apart two float64 norms of so many elements may be, relatively.

    Each difference, and each square of it, is rounded once: 3 units of each square, all of one
    sign. Summed in any order, in each of fewer than `elements` additions once more. A root halves
    that and is rounded itself, and the oracle has as much without the sum: so this is twice enough.
    """
    return (elements + 8) * EPS


def assert_distance(found: Distance, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """The pairs are what the EMA holds, and what is online."""
    limit = bound(sum(ema.numel() for ema, _ in pairs))
    apart = norm([ema.double() - online.double() for ema, online in pairs])
    assert found.distance == pytest.approx(apart, rel=limit, abs=0)
    assert found.norm == pytest.approx(norm([online for _, online in pairs]), rel=limit, abs=0)


def held(ema: ModelEMA) -> dict[str, Tensor]:
    """What the EMA holds; an exact one's fp32 from the two halves that its state has."""
    state = ema.state_dict()
    found = {name: value.detach().cpu() for name, value in state["weights"].items()}
    for name, rest in state["residuals"].items():
        if rest.dtype == torch.float32:
            found[name] = rest.cpu()
        else:
            high = found[name].contiguous().view(torch.int16).int() << 16
            found[name] = (high + rest.cpu().contiguous().int()).view(torch.float32)
    return found


def pairs_of(ema: ModelEMA) -> list[tuple[Tensor, Tensor]]:
    online = dict(ema.model.named_parameters())
    return [(held(ema)[name], tensor.detach().cpu()) for name, tensor in online.items()]


SHAPES = st.lists(st.tuples(layouts(), st.sampled_from(REFERENCE_DTYPES)), min_size=1, max_size=4)


@settings(max_examples=40)
@given(SHAPES, st.sampled_from(["exact", "nearest"]), st.integers(0, 2**20))
def test_it_is_what_exact_sums_are(
    cases: list[tuple[Layout, tuple[torch.dtype, torch.dtype]]], precision: str, seed: int
) -> None:
    online = [x.tensor(kinds[1], DEVICE, seed + i, None) for i, (x, kinds) in enumerate(cases)]
    mine = [x.tensor(kinds[0], DEVICE, seed - i, None) for i, (x, kinds) in enumerate(cases, 1)]
    ema = ModelEMA(parameters(online), ema_model=parameters(mine), precision=precision)
    ema.update(0.25)
    for size in (foreach_backend.SCRATCH, 7):  # at once, and in many parts
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(foreach_backend, "SCRATCH", size)
            found = ema.distance()
        assert_distance(found, pairs_of(ema))
        assert found.modules.keys() == ({""} if any(map(Tensor.numel, online)) else set())


@pytest.mark.parametrize(("ema_dtype", "online_dtype"), REFERENCE_DTYPES)
def test_every_dtype_pair(ema_dtype: torch.dtype, online_dtype: torch.dtype) -> None:
    """Chunks with and without a tail, one not aligned, one with gaps, one turned, a single one."""
    shapes = [
        Layout((8200,), (0,), 0, 0),
        Layout((8193,), (0,), 1, 0),
        Layout((33, 5), (0, 1), 0, 1),
        Layout((3, 9, 5), (2, 0, 1), 0, 0),
        Layout((), (), 0, 0),
        Layout((0, 3), (0, 1), 0, 0),
    ]
    online = parameters([x.tensor(online_dtype, DEVICE, 3 + i, None) for i, x in enumerate(shapes)])
    mine = parameters([x.tensor(ema_dtype, DEVICE, 50 + i, None) for i, x in enumerate(shapes)])
    ema = ModelEMA(online, ema_model=mine)
    ema.update(0.25)
    pairs = pairs_of(ema)
    assert_distance(ema.distance(), pairs)
    # The controls: one element less, of the largest tensor, is told; and who is who matters.
    pairs[0] = (pairs[0][0][1:], pairs[0][1][1:])
    with pytest.raises(AssertionError):
        assert_distance(ema.distance(), pairs)
    with pytest.raises(AssertionError):
        assert_distance(ema.distance(), [(one, other) for other, one in pairs_of(ema)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_exact_ema_is_measured_by_what_it_accumulates(dtype: torch.dtype) -> None:
    model = nn.ParameterList([torch.full((100,), 1.0, dtype=dtype)]).to(DEVICE)
    emas = [ModelEMA(model, precision=kind) for kind in ("exact", "nearest")]
    model[0].data.fill_(2.0)
    for ema in emas:
        # The momentum is far below half a spacing of 1: only the exact one moves.
        with pytest.warns(UserWarning, match="stands still") if ema is emas[1] else nullcontext():
            ema.update(2.0**-13)
    assert emas[0].ema_model[0].eq(1.0).all()
    assert [ema.distance().distance for ema in emas] == [10 * (1 - 2.0**-13), 10.0]


@pytest.mark.parametrize("size", [1e30, 1e-30, 1.0])
def test_large_and_small_values_neither_overflow_nor_vanish(size: float) -> None:
    """Whose squares fp32 could not hold; beside large ones, 1000 small ones are not forgotten."""
    online = torch.full((1024,), 3 * size, device=DEVICE)
    ema = ModelEMA(parameters([online]), ema_model=parameters([online * 2]))
    assert_distance(ema.distance(), pairs_of(ema))
    assert ema.distance().distance == pytest.approx(3 * size * 32, rel=1e-6)
    mixed = torch.full((1025,), 1e-3, device=DEVICE)
    mixed[7] = 1e3
    mixed = ModelEMA(parameters([mixed]), ema_model=parameters([mixed * 0]))
    assert mixed.distance().norm > 1e3  # in fp32 the sum would be that of the large one alone
    assert_distance(mixed.distance(), pairs_of(mixed))


def test_no_norm_of_doubles_ends_in_pythons_words() -> None:
    """A square that float64 cannot hold is Inf; a sum of such as it holds is not."""
    for tensors in ([1.2e154, 1.2e154], [1e200]):
        online = [torch.tensor([x], dtype=torch.float64, device=DEVICE) for x in tensors]
        assert ModelEMA(parameters(online)).distance().norm > 1e154


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to(DEVICE)
    ema = ModelEMA(model, nonfinite="skip")
    model[0].weight.data[0, 0] = bad
    found = ema.distance()
    assert not any(map(math.isfinite, (*found[:2], *found.modules["0"][:2])))
    assert all(map(math.isfinite, found.modules["1"][:2]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((2,), 3.0))
        self.body = nn.Sequential(nn.Linear(1, 4, bias=False), nn.Linear(4, 1, bias=False))
        self.head = nn.Linear(4, 1, bias=False)
        self.tied = self.head.weight
        self.register_buffer("copied", torch.full((9,), 5.0))
        for parameter in (*self.body.parameters(), self.head.weight):
            parameter.data.fill_(2.0)


def test_modules_are_those_at_the_top() -> None:
    """Tensors of the model itself are under "", a tied one counts once, buffers not."""
    ema = ModelEMA(Net().to(DEVICE))
    for parameter in ema.ema_model.parameters():
        parameter.data.add_(1.0)
    ema.ema_model.copied.zero_()
    found = ema.distance()
    assert found[:2] == (math.sqrt(2 + 8 + 4), math.sqrt(18 + 32 + 16))
    # The tied one is under the first of its names, which is the model's own.
    whole = {"": (math.sqrt(2 + 4), math.sqrt(18 + 16)), "body": (math.sqrt(8), math.sqrt(32))}
    assert found.modules.keys() == whole.keys()
    for name, expected in whole.items():
        # Roots of sums, of which each is rounded a few times.
        assert found.modules[name][:2] == pytest.approx(expected, rel=8 * EPS, abs=0), name
    assert all(value.modules == {} for value in found.modules.values())


def test_only_what_is_averaged_is_measured() -> None:
    ema = ModelEMA(Net().to(DEVICE), exclude=["body", "scale"])
    for parameter in ema.ema_model.parameters():
        parameter.data.add_(1.0)
    assert ema.distance()[:2] == (2.0, 4.0)
    assert [*ema.distance().modules] == [""]
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False)).to(DEVICE)
    for handling, expected in (("update", 4.0), ("copy", 0.0), ("ema_train", 0.0)):
        ema = ModelEMA(model, handle_buffers=handling)
        ema.ema_model[0].running_mean.fill_(2.0)
        assert ema.distance().distance == expected


@pytest.mark.parametrize("model", [nn.Identity(), nn.ParameterList([torch.empty(0)])])
def test_without_parameters_there_is_no_distance(model: nn.Module) -> None:
    assert ModelEMA(model).distance() == Distance(0.0, 0.0, {})


def test_it_measures_the_present_and_changes_nothing() -> None:
    model = nn.Linear(2, 2, bias=False, device=DEVICE)
    model.weight.data.fill_(1.0)
    ema = ModelEMA(model)
    assert ema.distance() == Distance(0.0, 2.0, {"": Distance(0.0, 2.0, {})})
    model.weight = nn.Parameter(torch.full((2, 2), 3.0, dtype=torch.float64, device=DEVICE))
    for _ in range(2):
        assert ema.distance()[:2] == (4.0, 6.0)
    assert (ema.update_index, ema.ema_model.weight.eq(1).all().item()) == (0, True)
    with ema.swapped(), pytest.raises(RuntimeError, match=r"distance\(\) while the models' weigh"):
        ema.distance()
    model.weight = nn.Parameter(torch.zeros(3, 3, device=DEVICE))
    with pytest.raises(ValueError, match="'weight' is"):
        ema.distance()


def test_complex_numbers_have_their_absolute_value() -> None:
    model = nn.ParameterList([torch.tensor([3 + 4j, 0])])
    ema = ModelEMA(model)
    ema.ema_model[0].data.zero_()
    assert ema.distance()[:2] == (5.0, 5.0)


class Largest(TorchDispatchMode):
    """Remembers how many bytes the largest memory has that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        given = set(map(address, tensors_in((args, kwargs))))
        made = [tensor for tensor in tensors_in(result) if address(tensor) not in given]
        self.bytes = max([self.bytes, *(tensor.untyped_storage().nbytes() for tensor in made)])
        return result


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def largest(call: Callable[[ModelEMA], object], online: list[Tensor], dtype: torch.dtype) -> int:
    ema = ModelEMA(parameters(online), ema_dtype=dtype)
    call(ema)  # with a plan
    with Largest() as seen:
        call(ema)
    return seen.bytes


@pytest.mark.parametrize(("ema_dtype", "online_dtype"), REFERENCE_DTYPES)
def test_its_memory_is_bounded_by_a_chunk(
    ema_dtype: torch.dtype, online_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1024 doubles; beside it, two results for each tensor, or part of one."""
    monkeypatch.setattr("ema_triton.distance.SCRATCH", 1024)
    monkeypatch.setattr(foreach_backend, "SCRATCH", 1024)
    gaps = Layout((64, 64), (0, 1), 0, 1)
    models = {
        "small": [torch.ones(1024, dtype=online_dtype, device=DEVICE)],
        "large": [torch.ones(64 * 1024, dtype=online_dtype, device=DEVICE)],
        "strided": [gaps.tensor(online_dtype, DEVICE, 0, None)],
        "many": [torch.ones(30, dtype=online_dtype, device=DEVICE) for _ in range(500)],
    }
    made = {name: largest(ModelEMA.distance, x, ema_dtype) for name, x in models.items()}
    assert made == dict.fromkeys(models, 8 * 1024)
    # The control: what copies the EMA is seen to grow with it.
    grown = largest(lambda ema: ema.state_dict(clone=True), models["large"], ema_dtype)
    assert grown >= 64 * 1024 * ema_dtype.itemsize > 8 * 1024
