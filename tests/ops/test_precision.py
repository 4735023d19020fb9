"""The number formats: every pattern through split and join, and rounding over all noise."""

import pytest
import torch
from torch import Tensor

from ema_triton.ops.precision import (
    RESIDUAL_DTYPE,
    Scratch,
    join_residual,
    narrow_stochastic,
    split_residual,
)

LOW = [torch.bfloat16, torch.float16]
PATTERNS = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)

# Low halves of an fp32 at and around those where the rounding of a bf16 changes.
LOW_HALVES = (0x0000, 0x0001, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xEDCB, 0xFFFF)


def fp32(bits: Tensor) -> Tensor:
    return bits.to(torch.int64).to(torch.int32).view(torch.float32)


def every_high_half() -> Tensor:
    """All 65,536 high halves of an fp32, each with some low halves."""
    high = torch.arange(1 << 16).repeat_interleave(len(LOW_HALVES)) << 16
    return fp32(high + torch.tensor(LOW_HALVES).repeat(1 << 16))


def halves(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = torch.empty_like(value, dtype=dtype)
    residual = torch.empty_like(value, dtype=RESIDUAL_DTYPE[dtype])
    split_residual(value.clone(), weight, residual)
    return weight, residual


def assert_same(one: Tensor, other: Tensor) -> None:
    """Equal bits; a NaN may be any NaN."""
    integers = {2: torch.int16, 4: torch.int32}[one.element_size()]
    assert torch.equal(one.isnan(), other.isnan())
    kept = ~one.isnan()
    assert torch.equal(one[kept].view(integers), other[kept].view(integers))


@pytest.mark.parametrize("dtype", LOW)
def test_a_value_survives(dtype: torch.dtype) -> None:
    value = every_high_half()
    assert_same(join_residual(*halves(value, dtype)), value)


def test_every_mantissa_survives() -> None:
    for exponent in (0x00000000, 0x3F800000, 0x47000000, 0xC2000000, 0x7F000000):
        value = fp32(exponent + torch.arange(1 << 23)[:: 1 if exponent == 0x3F800000 else 37])
        assert_same(join_residual(*halves(value, torch.bfloat16)), value)


@pytest.mark.parametrize("dtype", LOW)
def test_every_weight_is_its_own_value(dtype: torch.dtype) -> None:
    weight = PATTERNS.view(dtype)
    shows, residual = halves(weight.float(), dtype)
    assert_same(shows, weight)
    if dtype == torch.bfloat16:
        assert not residual[~weight.isnan()].any()


@pytest.mark.parametrize("dtype", LOW)
def test_the_weight_is_a_nearest_one(dtype: torch.dtype) -> None:
    value = every_high_half()
    value = value[value.abs() < torch.finfo(dtype).max]
    ours, nearest = halves(value, dtype)[0].double(), value.to(dtype).double()
    assert torch.equal((ours - value).abs(), (nearest - value).abs())


def test_beyond_the_range_a_value_shows_as_infinite_and_is_kept() -> None:
    value = torch.tensor([3.4e38, -3.4e38, 65520.0, -1e30])
    for dtype, infinite in ((torch.bfloat16, [0, 1]), (torch.float16, [0, 1, 2, 3])):
        weight, residual = halves(value, dtype)
        assert weight[infinite].isinf().all()
        assert torch.equal(join_residual(weight, residual), value)


@pytest.mark.parametrize("dtype", LOW)
def test_an_old_residual_leaves_a_written_weight_what_it_is(dtype: torch.dtype) -> None:
    """Whatever residual a weight meets, the value rounds to the weight."""
    weight = PATTERNS.view(dtype)
    others = [-32768, -32767, -1, 1, 32767]
    if dtype == torch.float16:
        others = [0.0, 1.0, -65504.0, 1e-30, float("inf"), float("nan")]
    for other in others:
        old = torch.full(weight.shape, other, dtype=RESIDUAL_DTYPE[dtype])
        found = halves(join_residual(weight, old), dtype)[0]
        assert torch.equal(found.nan_to_num(), weight.nan_to_num())  # where -0 equals 0
        assert torch.equal(found.isnan(), weight.isnan())


def test_that_takes_the_guard() -> None:
    """The control: 0 and a negative residual are the bits of a NaN."""
    bits = torch.zeros(1, dtype=torch.int32) + torch.tensor(-1, dtype=torch.int16)
    assert bits.view(torch.float32).isnan()


def rounded(value: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    weight = torch.empty_like(value, dtype=dtype)
    narrow_stochastic(value.clone(), noise.clone(), weight, Scratch.like(weight))
    return weight


def neighbours(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest number of the dtype below the value and the smallest above, or itself."""
    every = PATTERNS.view(dtype)
    every = every[every.isfinite()].double().unique()
    above = torch.searchsorted(every, value.double())
    exact = every[above.clamp(max=len(every) - 1)] == value
    return every[torch.where(exact, above, above - 1)], every[above]


VALUES = {
    torch.bfloat16: [1.0039, -1.7, 3e-5, 1e-39, -2e-40, 1e38, 2.0**-126 * 1.001, 0.99999994],
    torch.float16: [1.0003, -1.7, 65503.0, 6.2e-5, 2.0**-14 * 1.0001, -0.33333334, 1e-3],
}


@pytest.mark.parametrize("dtype", LOW)
def test_the_mean_over_all_noise_is_the_value(dtype: torch.dtype) -> None:
    noise = torch.arange(1 << 16, dtype=torch.int32)
    for number in VALUES[dtype]:
        value = torch.full((1 << 16,), number)
        result = rounded(value, noise, dtype).double()
        below, above = neighbours(value[:1], dtype)
        assert ((result == below) | (result == above)).all()
        assert result.mean() == value[0].double(), number


def test_the_mean_of_fp16_subnormals_is_the_value_up_to_the_noise() -> None:
    # 13 bits of noise tell 2**13 parts of the spacing apart: half a part of the smallest subnormal.
    noise = torch.arange(1 << 16, dtype=torch.int32)
    for number in (1e-5, -3.3e-6, 5e-8, 2e-8, 6.0e-5, -(2.0**-15) * 1.0001):
        value = torch.full((1 << 16,), number)
        result = rounded(value, noise, torch.float16).double()
        below, above = neighbours(value[:1], torch.float16)
        assert ((result == below) | (result == above)).all()
        assert abs(result.mean() - value[0].double()) <= 2.0**-24 * 2.0**-14


@pytest.mark.parametrize("dtype", LOW)
def test_what_needs_no_rounding_stays(dtype: torch.dtype) -> None:
    weight = PATTERNS.view(dtype)
    for noise in (0, 1, 0x1FFF, 0x8000, 0xFFFF):
        drawn = torch.full(weight.shape, noise, dtype=torch.int32)
        assert_same(rounded(weight.float(), drawn, dtype), weight)


@pytest.mark.parametrize("dtype", LOW)
def test_a_nan_stays_a_nan_whatever_its_bits(dtype: torch.dtype) -> None:
    value = fp32(torch.tensor([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000]))
    for noise in (0, 0xFFFF):
        drawn = torch.full(value.shape, noise, dtype=torch.int32)
        assert rounded(value, drawn, dtype).isnan().all()
    assert join_residual(*halves(value, dtype)).isnan().all()
    assert halves(value, dtype)[0].isnan().all()


def test_fp16_goes_to_its_infinity_beyond_its_range() -> None:
    infinity = float("inf")
    value = torch.tensor([1e6, -70000.0, infinity])
    drawn = torch.zeros(3, dtype=torch.int32)
    assert rounded(value, drawn, torch.float16).tolist() == [infinity, -infinity, infinity]
