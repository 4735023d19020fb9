"""The EMA skips elements that are not finite in the online model, and counts them."""

from __future__ import annotations

import copy
import math
import pickle
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ema_triton import ModelEMA
from ema_triton.ops import foreach_backend
from ema_triton.ops.precision import PRECISIONS
from ema_triton.state import CHUNK
from tests.plain import as_real
from tests.states import accumulated
from tests.strategies import FLOATS, REFERENCE_DTYPES, Layout, parameters

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = float("inf"), float("nan")
BAD = (NAN, INF, -INF)
HALF = torch.float16
LOW = (torch.bfloat16, HALF)
BACKENDS = ("foreach", "triton")


def guarded(
    online: list[Tensor], ema: list[Tensor], nonfinite: str = "skip", **options
) -> ModelEMA:
    mine = parameters([tensor.clone() for tensor in ema])
    return ModelEMA(parameters(online), ema_model=mine, nonfinite=nonfinite, **options)


def values(ema: ModelEMA) -> list[Tensor]:
    """What the EMA holds, as an exact one accumulates it."""
    return [as_real(tensor).clone() for tensor in accumulated(ema)]


def same(one: Tensor, other: Tensor) -> bool:
    """Equal bits, but for NaNs and the sign of 0."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(nan=0.0), other.nan_to_num(nan=0.0)
    )


# Two chunks, aligned, and not; transposed; a gap between elements; an odd end; a single one.
LAYOUTS = [
    Layout((8200,), (0,), 0, 0),
    Layout((8193,), (0,), 1, 0),
    Layout((33, 5), (1, 0), 3, 0),
    Layout((9, 7), (0, 1), 0, 1),
    Layout((7,), (0,), 8, 0),
    Layout((), (), 1, 0),
]
CASES = [
    (ema, online, precision)
    for ema, online in REFERENCE_DTYPES
    for precision in (PRECISIONS if ema in LOW else ("nearest",))
]


def spoil(tensor: Tensor, shift: int) -> Tensor:
    """Put NaN, Inf and -Inf at the ends, around chunk borders and between; returns the mask."""
    size = tensor.numel()
    places = {i for i in (0, 3, 8, 2047, 8184, 8191, 8192, size // 2, size - 1) if i < size}
    mask = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
    for number, place in enumerate(sorted(places), start=shift):
        index = torch.unravel_index(torch.tensor(place), tensor.shape)
        tensor[index] = BAD[number % 3]
        mask[index] = True
    return mask


@pytest.mark.parametrize(("ema_dtype", "online_dtype", "precision"), CASES)
def test_neighbours_of_bad_elements_are_averaged_as_without_a_guard(
    ema_dtype: torch.dtype, online_dtype: torch.dtype, precision: str
) -> None:
    def online() -> list[Tensor]:
        return [x.tensor(online_dtype, DEVICE, seed, None) for seed, x in enumerate(LAYOUTS)]

    old = [x.tensor(ema_dtype, DEVICE, seed + 50, None) for seed, x in enumerate(LAYOUTS)]
    bad = online()
    masks = [spoil(tensor, number) for number, tensor in enumerate(bad)]
    kind = {"precision": precision, "seed": 3}
    twin = guarded(online(), old, "propagate", backend="foreach", **kind)
    control = guarded(bad, old, "propagate", backend="foreach", **kind)
    emas = [guarded(bad, old, backend=backend, **kind) for backend in BACKENDS]
    before = values(twin)
    for momentum in (0.25, 1.0):  # fp32 products are exact, so that both backends round alike
        for tested in (twin, control, *emas):
            tested.update(momentum)
        for tested in emas:
            rows = zip(values(tested), values(twin), before, masks, strict=True)
            for mine, theirs, was, mask in rows:
                assert same(mine[~mask], theirs[~mask])
                assert same(mine[mask], was[mask])
                assert mask.all() or not same(mine[~mask], was[~mask])
    for theirs, mask in zip(values(control), masks, strict=True):
        assert not theirs[mask].isfinite().any()
        assert theirs[~mask].isfinite().all()
    assert [int(mask.sum()) for mask in masks] == [9, 8, 5, 5, 3, 1]
    counts = {"0": 18, "1": 16, "2": 10, "3": 10, "4": 6, "5": 2}
    assert [tested.nonfinite_counts() for tested in emas] == [counts, counts]
    assert [tested.nonfinite_count() for tested in emas] == [62, 62]


def halfway(dtype: torch.dtype) -> float:
    """The least value that rounds to nearest as Inf: half a spacing above the largest."""
    info = torch.finfo(dtype)
    exponent = math.frexp(info.max)[1]
    return info.max + 2.0 ** (exponent - 2) * info.eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("ema_dtype", "online_dtype", "precision"),
    [case for case in CASES if case[1].itemsize > case[0].itemsize],
)
def test_what_the_emas_dtype_cannot_hold_is_skipped(
    ema_dtype: torch.dtype, online_dtype: torch.dtype, precision: str, backend: str
) -> None:
    largest = torch.finfo(ema_dtype).max
    # Values go into low dtypes through fp32.
    wide = torch.float64 if ema_dtype == torch.float32 else torch.float32
    border = torch.tensor(halfway(ema_dtype), dtype=wide)
    below = border.nextafter(torch.zeros_like(border))
    assert (below.to(ema_dtype), border.to(ema_dtype)) == (largest, INF)
    if precision == "stochastic":  # up by chance from any value above the largest
        below = torch.tensor(largest, dtype=wide)
        border = below.nextafter(torch.full_like(below, INF))
    sizes = [1.0, largest, below, border, 1e300 if wide == torch.float64 else 3.4e38]
    online = torch.tensor(sizes, dtype=online_dtype, device=DEVICE)
    online = torch.cat([online, -online])
    old = torch.full_like(online, 0.5, dtype=ema_dtype)
    ema = guarded([online], [old], backend=backend, precision=precision)
    control = guarded([online], [old], "propagate", backend=backend, precision="nearest")
    for tested in (ema, control):
        tested.update(1.0)
    taken = online.abs() < border.to(DEVICE)
    expected = torch.where(taken, online.clamp(-largest, largest).to(ema_dtype), old)
    assert torch.equal(ema.ema_model[0], expected)
    assert ema.nonfinite_count() == 4
    assert control.ema_model[0].isinf().sum() == (2 if precision == "stochastic" else 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.75])
def test_a_difference_that_overflows_and_an_ema_that_is_nan_are_left(
    backend: str, momentum: float
) -> None:
    online = torch.tensor([3e38, -3e38, 1.0, 1.0, 1.0, 2.0], device=DEVICE)
    old = torch.tensor([-3e38, 3e38, NAN, INF, -INF, 1.0], device=DEVICE)
    ema = guarded([online], [old], backend=backend)
    ema.update(momentum)
    (found,) = values(ema)
    assert same(found[:5], old[:5])
    assert found[5] == 1 + momentum
    assert ema.nonfinite_count() == 5
    ema.update(1.0)  # copies, whatever was there
    assert same(values(ema)[0], online)
    assert ema.nonfinite_count() == 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_excluded_and_complex_tensors(backend: str) -> None:
    model = nn.ParameterDict(
        {
            "a_slow": torch.full((5,), 8.0),
            "b_still": torch.full((5,), 8.0),
            "c_copied": torch.full((5,), 8.0),
            "d_complex": torch.full((3,), 8 + 8j),
        }
    ).to(DEVICE)
    options = {"exclude": "c_copied", "momentum_scale": {"a_slow": 0.5, "b_still": 0.0}}
    ema = ModelEMA(model, nonfinite="skip", backend=backend, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name in ("a_slow", "b_still", "c_copied"):
            model[name][1:4] = torch.tensor(BAD)
        model["d_complex"].copy_(torch.tensor([complex(NAN, 0), complex(0, -INF), 0]))
    ema.update(0.5)
    slow, still, copied, pairs = values(ema)
    assert slow.tolist() == [6.0, 8.0, 8.0, 8.0, 6.0]
    assert still.tolist() == [8.0] * 5
    assert same(copied, model["c_copied"].detach())
    assert pairs.tolist() == [[8.0, 4.0], [4.0, 8.0], [4.0, 4.0]]
    assert ema.nonfinite_counts() == {"a_slow": 3, "b_still": 3, "d_complex": 2}
    assert ema.nonfinite_count() == 3 + 3 + 2


@pytest.mark.parametrize("length", [50, 1 << 20])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_counts_are_exact_whatever_lies_between_tensors(
    length: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on the reference path in many steps; Inf at ends would show in what lies beside."""
    monkeypatch.setattr(foreach_backend, "SCRATCH", length)
    for backend in BACKENDS:
        sizes = [1, 2, 3, 5, 7, 9, 31, 33, 130]
        online = [torch.full((size,), INF, dtype=torch.float16, device=DEVICE) for size in sizes]
        old = [torch.ones_like(tensor) for tensor in online]
        ema = guarded(online, old, backend=backend, precision=precision)
        for number, momentum in enumerate((1.0, 0.25, 0.0), start=1):
            ema.update(momentum)
            counts = {str(index): number * size for index, size in enumerate(sizes)}
            assert ema.nonfinite_counts() == counts
            assert ema.nonfinite_count() == number * sum(sizes)
        for tensor in ema.model:
            tensor.data.fill_(3.0)
        ema.update(torch.tensor(0.5))
        assert ema.nonfinite_count() == 3 * sum(sizes)
        assert all(tensor.eq(2.0).all() for tensor in values(ema))


def test_a_sync_with_nan_leaves_none_between_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be counted at each update: 26 elements are padded where a step before has values."""
    monkeypatch.setattr(foreach_backend, "SCRATCH", 64)
    online = [torch.full((size,), NAN, dtype=torch.bfloat16) for size in (17, 17, 26, 26)]
    old = [torch.ones_like(tensor) for tensor in online]
    ema = guarded(online, old, backend="foreach", precision="exact")
    ema.sync()
    assert all(tensor.isnan().all() for tensor in values(ema))
    for parameter in (*ema.model, *ema.ema_model):
        parameter.data.fill_(1.0)
    ema.update(0.5)
    assert ema.nonfinite_count() == 0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False)
        self.body = nn.Linear(3, 3, bias=False)
        self.body.weight = self.head.weight
        self.nothing = nn.Parameter(torch.empty(0))
        self.large = nn.Parameter(torch.zeros(3 * CHUNK))  # three chunks
        self.register_buffer("copied", torch.full((2,), NAN))
        self.register_buffer("counted", torch.tensor(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_averaged_tensor_has_a_count_by_its_first_name(
    dtype: torch.dtype, backend: str
) -> None:
    ema = ModelEMA(Tied().to(DEVICE, dtype), nonfinite="skip", backend=backend)
    assert ema.nonfinite_counts() == {"nothing": 0, "large": 0, "head.weight": 0}
    ema.model.body.weight.data[0] = NAN
    ema.model.large.data[8190:8195] = -INF
    ema.model.large.data[-1] = INF
    ema.update(0.25)
    assert ema.nonfinite_counts() == {"nothing": 0, "large": 6, "head.weight": 3}
    # The control: of those that are finite again, none is counted.
    ema.model.large.data.zero_()
    ema.update(0.25)
    assert ema.nonfinite_counts() == {"nothing": 0, "large": 6, "head.weight": 6}


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_go_with_their_tensors_into_other_buckets(backend: str) -> None:
    model = nn.ParameterDict({name: torch.zeros(4) for name in "abc"}).to(DEVICE)
    ema = ModelEMA(model, nonfinite="skip", backend=backend)
    for size, name in enumerate("abc", start=1):
        model[name].data[:size] = NAN
    ema.update(0.5)
    model["b"] = nn.Parameter(model["b"].detach().double())  # and out of the bucket's middle
    ema.ema_model["c"].data = ema.ema_model["c"].data.half()
    ema.update(0.5)
    assert ema.nonfinite_counts() == {"a": 2, "b": 4, "c": 6}


def nested(context: AbstractContextManager) -> None:
    with context:
        pass


CHANGES: dict[str, Callable[[ModelEMA], object]] = {
    "the online model cast": lambda ema: ema.model.double(),
    "the EMA model cast": lambda ema: ema.ema_model.bfloat16(),
    "a parameter replaced": lambda ema: setattr(
        ema.model, "weight", nn.Parameter(ema.model.weight.detach().clone())
    ),
    "another layout": lambda ema: setattr(
        ema.model.weight, "data", ema.model.weight.data.t().contiguous().t()
    ),
    "its own state loaded": lambda ema: ema.load_state_dict(ema.state_dict()),
    "swapped and back": lambda ema: nested(ema.swapped()),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_the_count_outlives_changes_and_copies(
    change: str, duplicate: Callable[[ModelEMA], ModelEMA], backend: str
) -> None:
    ema = ModelEMA(nn.Linear(4, 4, device=DEVICE), nonfinite="skip", backend=backend)
    ema.model.weight.data[0, 0] = NAN
    for expected in (1, 2):
        ema.update(0.5)
        assert ema.nonfinite_counts() == {"weight": expected, "bias": 0}
    CHANGES[change](ema)
    assert ema.nonfinite_counts() == {"weight": 2, "bias": 0}
    ema.model.bias.data[:2] = INF
    ema.update(0.5)
    assert ema.nonfinite_counts() == {"weight": 3, "bias": 2}
    twin = duplicate(ema)
    assert twin.nonfinite_counts() == {"weight": 3, "bias": 2}
    twin.update(0.5)
    assert twin.nonfinite_counts() == {"weight": 4, "bias": 4}
    assert ema.nonfinite_counts() == {"weight": 3, "bias": 2}


def test_propagate_counts_nothing_and_says_so() -> None:
    ema = ModelEMA(nn.Linear(2, 1))
    for read in (ema.nonfinite_count, ema.nonfinite_counts):
        with pytest.raises(RuntimeError, match=r"nothing\. Build the EMA with nonfinite='skip'\.$"):
            read()
    for wrong in ("Skip", None, True, "raise"):
        with pytest.raises(
            ValueError, match="nonfinite can only be one of 'propagate', 'skip', but"
        ):
            ModelEMA(nn.Linear(2, 1), nonfinite=wrong)


def test_a_trainer_goes_on() -> None:
    engine_module = pytest.importorskip("ignite.engine")
    from ema_triton import EMAHandler

    model = nn.Linear(1, 1, bias=False)
    engine = engine_module.Engine(lambda engine, batch: model.weight.data.fill_(batch).item())
    model.weight.data.fill_(0.0)
    handler = EMAHandler(model, 0.5, nonfinite="skip")
    handler.attach(engine)
    engine.run([1.0, INF, 3.0])
    assert handler.ema_model.weight.item() == 1.75
    assert handler.ema.nonfinite_counts() == {"weight": 1}


def rounded(value: float, dtype: torch.dtype) -> float:
    """To nearest-even in the dtype, Inf where it is too large."""
    if dtype == torch.float64 or not math.isfinite(value):
        return value
    try:
        packed = struct.pack("<f", value)  # through fp32, as torch does
        if dtype == torch.bfloat16:
            (bits,) = struct.unpack("<I", packed)
            packed = struct.pack("<I", (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000)
        (value,) = struct.unpack("<f", packed)
        return struct.unpack("<e", struct.pack("<e", value))[0] if dtype == HALF else value
    except OverflowError:
        return math.copysign(INF, value)


def step(old: float, new: float, momentum: float, ema: torch.dtype, online: torch.dtype) -> float:
    """The new value before it is stored; for these momenta no product is rounded."""
    wide = torch.float64 if torch.float64 in (ema, online) else torch.float32
    if momentum == 1:
        return new
    apart = rounded(new - old, wide)
    end, share = (old, momentum) if momentum < 0.5 else (new, momentum - 1)
    return rounded(end + share * apart, wide)


EDGES = [*BAD, 0.0, 1.0, 65504.0, 65519.0, 65520.0, 1e5, 3.3895e38, 3.3962e38, 3e38, 3.4028234e38]
NUMBERS = st.one_of(
    st.sampled_from([*EDGES, *(-edge for edge in EDGES)]), st.integers(-500, 500).map(float)
)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=20),
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=2, max_size=2),
    st.sampled_from(REFERENCE_DTYPES),
    st.sampled_from(["exact", "nearest"]),
    st.sampled_from(BACKENDS),
)
def test_both_backends_do_what_plain_python_does(
    rows: list[tuple[float, float, float]],
    momenta: list[float],
    dtypes: tuple[torch.dtype, torch.dtype],
    precision: str,
    backend: str,
) -> None:
    ema_dtype, online_dtype = dtypes
    old, *news = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    old, news = old.to(DEVICE, ema_dtype), [new.to(DEVICE, online_dtype) for new in news]
    ema = guarded([torch.zeros_like(news[0])], [old], backend=backend, precision=precision)
    expected, skipped = old.tolist(), 0
    stored = torch.float32 if precision == "exact" and ema_dtype in LOW else ema_dtype
    for new, momentum in zip(news, momenta, strict=True):
        ema.model[0].data.copy_(new)
        ema.update(momentum)
        for index, (was, now) in enumerate(zip(expected, new.tolist(), strict=True)):
            value = step(was, now, momentum, *dtypes)
            if math.isfinite(rounded(value, ema_dtype)):
                expected[index] = rounded(value, stored)
            else:
                skipped += 1
    (found,) = values(ema)
    assert same(found.cpu(), torch.tensor(expected, dtype=torch.float64).to(stored))
    assert ema.nonfinite_count() == skipped


def test_the_oracle_rounds_as_torch_does() -> None:
    numbers = [*EDGES, 1 / 3, 1e-3, 65519.99, 2.0**-20]
    for dtype in FLOATS:
        ours = torch.tensor([rounded(number, dtype) for number in numbers], dtype=torch.float64)
        assert same(ours, torch.tensor(numbers, dtype=torch.float64).to(dtype).double())
    assert step(1.0, 0.0, 0.25, torch.float32, torch.float32) == 0.75
    assert step(-3e38, 3e38, 0.75, torch.float32, torch.float32) == -math.inf
