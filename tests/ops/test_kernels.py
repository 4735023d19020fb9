"""The kernel's arithmetic, bit by bit. (Its reach is held by `tests/ptx/`, at every access.)"""

import pytest
import torch
from torch import Tensor, nn

from ema_triton.ops import foreach_backend
from ema_triton.ops.precision import join_residual, split_residual
from ema_triton.plan import Plan
from tests.plans import plan_of, run

triton_backend = pytest.importorskip("ema_triton.ops.triton_backend")


def plan_for(online: Tensor, ema: Tensor, precision: str, device: torch.device) -> Plan:
    model = nn.ParameterList([nn.Parameter(online.to(device))])
    twin = nn.ParameterList([nn.Parameter(ema.to(device))])
    return plan_of(model, twin, precision)


def result_of(online: Tensor, ema: Tensor, momentum: float, device: torch.device) -> Tensor:
    """The kernel's result for one tensor."""
    plan = plan_for(online, ema, "nearest", device)
    run(triton_backend, plan, momentum)
    return plan.ema_tensors[0].detach().cpu()


def bits(values: list[int], dtype: torch.dtype, view: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(view).view(dtype)


def same_bits(one: Tensor, other: Tensor) -> None:
    """Equal bits, except that a NaN may be any NaN."""
    assert torch.equal(one.isnan(), other.isnan())
    kept = ~one.isnan()
    integers = {2: torch.int16, 4: torch.int32}[one.element_size()]
    assert torch.equal(one[kept].view(integers), other[kept].view(integers))


# Every high half, with low halves that round down, up, and to even; most NaNs have a low half too.
LOW = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)


def test_bf16_is_rounded_to_nearest_even_for_every_high_half(kernel_device: torch.device) -> None:
    high = torch.arange(1 << 16).repeat_interleave(len(LOW)) << 16
    pattern = high + torch.tensor(LOW).repeat(1 << 16)
    online = pattern.to(torch.int32).view(torch.float32)
    zeros = torch.zeros(len(online), dtype=torch.bfloat16)
    # At momentum 1 the result is the online value, rounded.
    result = result_of(online, zeros, 1.0, kernel_device)
    same_bits(result, online.to(torch.bfloat16))


def test_every_bf16_and_fp16_value_is_read_exactly(kernel_device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        online = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        result = result_of(online, torch.zeros(1 << 16), 1.0, kernel_device)
        same_bits(result, online.float())


def test_a_nan_whose_mantissa_would_carry_away_stays_a_nan(kernel_device: torch.device) -> None:
    online = bits([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001], torch.float32, torch.int32)
    result = result_of(online, torch.zeros(4, dtype=torch.bfloat16), 0.5, kernel_device)
    assert result.isnan().all()


LOW_DTYPES = [torch.bfloat16, torch.float16]


def every_high_half() -> Tensor:
    """All high halves of an fp32 with some low halves, but Inf and NaN."""
    high = torch.arange(1 << 16).repeat_interleave(len(LOW)) << 16
    pattern = high + torch.tensor(LOW).repeat(1 << 16)
    value = pattern.to(torch.int32).view(torch.float32)
    return ordinary(value)


def ordinary(value: Tensor) -> Tensor:
    """Without Inf and NaN, and without -0, which lerp may make a 0."""
    return value[value.isfinite() & ~(value.eq(0) & value.signbit())]


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_an_exact_ema_takes_and_keeps_every_fp32(
    dtype: torch.dtype, kernel_device: torch.device
) -> None:
    value = every_high_half()
    plan = plan_for(value, torch.zeros(len(value), dtype=dtype), "exact", kernel_device)
    for momentum in (1.0, 0.0):  # takes it; leaves it
        run(triton_backend, plan, momentum)
        bucket = plan.launches[0].bucket
        same_bits(join_residual(bucket.flat, bucket.residual)[: len(value)].cpu(), value)
        weight, residual = torch.empty_like(value, dtype=dtype), torch.empty_like(bucket.residual)
        split_residual(value.clone(), weight, residual[: len(value)].cpu())
        same_bits(plan.launches[0].targets[0].cpu(), weight)


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_every_exact_weight_is_read_exactly(
    dtype: torch.dtype, kernel_device: torch.device
) -> None:
    weight = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    plan = plan_for(torch.zeros(1 << 16), weight, "exact", kernel_device)
    run(triton_backend, plan, 0.0)
    expected = weight + 0.0
    expected[weight.isinf()] = float("nan")  # 0 * Inf, as torch.lerp has it
    same_bits(plan.launches[0].targets[0].cpu(), expected)


@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("other", [-1, 1, -30000])
def test_an_old_residual_makes_no_nan(
    dtype: torch.dtype, other: int, kernel_device: torch.device
) -> None:
    weight = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    weight = weight[weight.isfinite()]
    plan = plan_for(torch.zeros(len(weight)), weight, "exact", kernel_device)
    plan.launches[0].bucket.residual.fill_(other)
    run(triton_backend, plan, 0.0)
    assert torch.equal(plan.launches[0].targets[0].cpu(), weight)


@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("online_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_backends_round_alike_by_chance(
    dtype: torch.dtype, online_dtype: torch.dtype, kernel_device: torch.device
) -> None:
    """Bit by bit, at momenta where the fp32 result has no rounding of its own."""
    value = ordinary(every_high_half()[::7].to(online_dtype))
    for start in (0, 3):  # aligned, and not
        online = value[start:]
        ema = torch.zeros(len(online), dtype=dtype)
        found = []
        for backend in (foreach_backend, triton_backend):
            plan = plan_for(online, ema, "stochastic", kernel_device)
            for momentum in (1.0, 0.5):
                run(backend, plan, momentum)
                found.append(plan.launches[0].targets[0].cpu().clone())
        same_bits(found[0], found[2])
        same_bits(found[1], found[3])
        if online_dtype == torch.float32:
            assert not torch.equal(found[0], online.to(dtype))  # by chance indeed


def test_infinities_stay_where_the_formula_keeps_them(kernel_device: torch.device) -> None:
    inf = float("inf")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        online = torch.tensor([inf, -inf, 1.0, 1.0], dtype=dtype)
        ema = torch.tensor([1.0, 1.0, inf, -inf], dtype=dtype)
        for momentum in (0.25, 0.75):
            expected = torch.lerp(ema.double(), online.double(), momentum).to(dtype)
            assert expected[0].isinf() == (momentum < 0.5)  # above, the formula has Inf - Inf
            same_bits(result_of(online, ema, momentum, kernel_device), expected)


def test_the_padding_between_tensors_is_not_written(kernel_device: torch.device) -> None:
    model = nn.ParameterList([torch.ones(5), torch.ones(6)]).to(kernel_device)
    twin = nn.ParameterList([torch.zeros(5), torch.zeros(6)]).to(kernel_device)
    plan = plan_of(model, twin)
    bucket = plan.launches[0].bucket
    bucket.flat[5:8] = 77.0
    run(triton_backend, plan, 0.5)
    assert bucket.flat[5:8].eq(77.0).all()
    assert twin[1].eq(0.5).all()
