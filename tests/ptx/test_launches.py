"""Compiled launches against the foreach path, bit for bit, with every access checked."""

from functools import lru_cache
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("numpy", "2.0")
pytest.importorskip("triton")

from ema_triton import ModelEMA
from ema_triton.ops import foreach_backend, triton_backend
from ema_triton.ops.precision import PRECISIONS, RESIDUAL_DTYPE
from tests.plans import ema_of, run
from tests.ptx.run import ARCHITECTURES, compiled_for
from tests.strategies import KERNEL_DTYPES, MOMENTA, Layout, layouts

CPU = torch.device("cpu")
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# EMA, online, precision.
CASES = [
    (ema, online, precision)
    for ema, online in KERNEL_DTYPES
    for precision in (PRECISIONS if ema in RESIDUAL_DTYPE else ("nearest",))
]
# Both formulas, a copy, and one that the kernel reads.
WEIGHTS = [2e-4, 0.3, 0.5, 0.75, 1.0, torch.tensor(2e-4), torch.tensor(0.75)]

# sm_90 always, the others in `make ptx`.
EVERY = [
    pytest.param(arch, marks=() if arch == 90 else pytest.mark.every_target)
    for arch in ARCHITECTURES
]


def layout(length: int, offset: int = 0) -> Layout:
    return Layout((length,), (0,), offset, 0)


# Aligned, ragged, misaligned by an element, of more than a chunk, 0-d and empty.
LAYOUTS = [
    Layout((), (), 0, 0),
    *map(layout, (0, 1, 7, 8, 64, 2056, 8200, 8192 + 2053)),
    *(layout(length, 1) for length in (8, 33, 520, 8200)),
]


# Drawing them takes longer than an update.
drawn = lru_cache(1000)(Layout.tensor)


def module(dtype: torch.dtype, chosen: list[Layout], seed: int, largest: float | None) -> nn.Module:
    """Parameters of many magnitudes, with NaN, Inf, subnormals and +-`largest` if there is one."""
    found = nn.ParameterList([torch.empty(0, dtype=dtype) for _ in chosen])
    for number, (parameter, one) in enumerate(zip(found, chosen, strict=True)):
        tensor = drawn(one, dtype, CPU, seed + number, largest)
        parameter.data = torch.empty_like(tensor).set_(
            tensor.untyped_storage().clone(), tensor.storage_offset(), one.shape, tensor.stride()
        )
    return found


def emas(
    case: tuple[torch.dtype, torch.dtype, str],
    guarded: bool,
    chosen: list[Layout] = LAYOUTS,
    seed: int = 0,
    special: bool = True,
) -> tuple[ModelEMA, ModelEMA]:
    """Two alike."""
    ema, online, precision = case
    largest = min(torch.finfo(ema).max, torch.finfo(online).max) if special else None
    made = [
        ema_of(
            module(online, chosen, seed, largest),
            module(ema, chosen, seed + 1000, largest),
            precision,
            nonfinite="skip" if guarded else "propagate",
        )
        for _ in range(2)
    ]
    return made[0], made[1]


def bits(tensor: Tensor) -> Tensor:
    """Its bits, all NaNs being one."""
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return tensor.view(BITS[tensor.element_size()])


def assert_same(compiled: ModelEMA, expected: ModelEMA) -> None:
    assert len(compiled._planner.plan.launches) == len(expected._planner.plan.launches)
    assert compiled._state.skip_counts() == expected._state.skip_counts()
    for ours, theirs in zip(
        compiled._planner.plan.launches, expected._planner.plan.launches, strict=True
    ):
        assert torch.equal(bits(ours.bucket.flat), bits(theirs.bucket.flat))
        for one, other in zip(ours.sources, theirs.sources, strict=True):
            assert torch.equal(bits(one), bits(other))
        if theirs.bucket.residual is not None:
            assert torch.equal(bits(ours.bucket.residual), bits(theirs.bucket.residual))


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("arch", EVERY)
def test_an_update_is_the_foreach_path_s(
    arch: int, case: tuple[torch.dtype, torch.dtype, str], guarded: bool
) -> None:
    for weight in WEIGHTS:
        compiled, expected = emas(case, guarded)
        # At the second there is a residual, and another random number.
        for _ in range(2 if weight == 0.3 else 1):
            with compiled_for(arch):
                run(triton_backend, compiled._planner.plan, weight)
            run(foreach_backend, expected._planner.plan, weight)
            assert_same(compiled, expected)
        if guarded:
            assert sum(compiled._state.skip_counts().values()) > 0


@pytest.mark.parametrize("momentum", [0.0, 2e-4, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("arch", EVERY)
def test_fp32_is_torch_s_lerp(arch: int, momentum: float) -> None:
    plan = emas((torch.float32, torch.float32, "nearest"), guarded=False)[0]._planner.plan
    (one,) = plan.launches
    expected = [target.clone() for target in one.targets]
    torch._foreach_lerp_(expected, one.sources, momentum)
    with compiled_for(arch):
        run(triton_backend, plan, momentum)
    for found, right, online in zip(one.targets, expected, one.sources, strict=True):
        # A copy, whatever was there; lerp makes NaN of what is not finite.
        assert torch.equal(bits(found), bits(online if momentum == 1 else right))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", EVERY)
def test_a_swap_exchanges_all_bits(arch: int, dtype: torch.dtype) -> None:
    (one,) = emas((dtype, dtype, "nearest"), guarded=False)[0]._planner.plan.launches
    before = [
        [tensor.clone().view(BITS[dtype.itemsize]) for tensor in side]
        for side in (one.targets, one.sources)
    ]
    with compiled_for(arch):
        triton_backend.exchange(one)
    for side, others in zip((one.sources, one.targets), before, strict=True):
        for found, expected in zip(side, others, strict=True):
            assert torch.equal(found.view(BITS[dtype.itemsize]), expected)


@given(
    st.sampled_from(ARCHITECTURES),
    st.sampled_from(CASES),
    st.booleans(),
    st.lists(layouts(gaps=False), min_size=1, max_size=6),
    MOMENTA,
    st.booleans(),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_any_update_is_the_foreach_path_s(
    arch: int,
    case: tuple[torch.dtype, torch.dtype, str],
    guarded: bool,
    chosen: list[Layout],
    momentum: float,
    as_tensor: bool,
    seed: int,
    special: bool,
) -> None:
    compiled, expected = emas(case, guarded, chosen, seed, special)
    weight = torch.tensor(momentum) if as_tensor else momentum
    with compiled_for(arch):
        run(triton_backend, compiled._planner.plan, weight)
    run(foreach_backend, expected._planner.plan, weight)
    assert_same(compiled, expected)


@given(
    st.sampled_from(ARCHITECTURES),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.lists(layouts(gaps=False), min_size=1, max_size=6),
)
def test_any_swap_is_the_foreach_path_s(
    arch: int, dtype: torch.dtype, chosen: list[Layout]
) -> None:
    compiled, expected = emas((dtype, dtype, "nearest"), False, chosen)
    for ours, theirs in zip(
        compiled._planner.plan.launches, expected._planner.plan.launches, strict=True
    ):
        with compiled_for(arch):
            triton_backend.exchange(ours)
        foreach_backend.exchange(theirs)
    assert_same(compiled, expected)


@pytest.mark.every_target
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_was_left_out(arch: int) -> None:
    """All pairs that the launcher takes are among the cases."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    taken = set()
    for ema, online in product(dtypes, dtypes):
        (one,) = emas((ema, online, "nearest"), False, [layout(8)])[0]._planner.plan.launches
        with compiled_for(arch):
            if triton_backend.unsupported_reason(one) is None:
                taken.add((ema, online))
    assert taken == set(KERNEL_DTYPES)
