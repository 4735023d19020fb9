"""The number formats of an EMA in bf16 or fp16, in torch.

What a small momentum adds to such a weight rounds away, and the EMA stands still. Therefore

- "exact" keeps a residual beside each weight, and the two make an fp32 value. The residual of a
  bf16 is an int16: the weight is the fp32's high half, rounded, and the residual its low half as a
  signed number, so that (weight << 16) + residual are the fp32's bits. Halves are rounded away from
  zero: rounded to even, 65537 values would have an even weight, one more than 16 bits tell apart.
  The residual of an fp16, which has another range than fp32, is the whole fp32 value.
- "stochastic" rounds up or down at random, such that the mean is exact.
- "nearest" rounds to nearest-even, as torch does.

`kernels.py` has the same in Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

PRECISIONS = ("exact", "stochastic", "nearest")

# The dtypes that need residuals to be exact, and what the residuals are.
RESIDUAL_DTYPE = {torch.bfloat16: torch.int16, torch.float16: torch.float32}


class Scratch(NamedTuple):
    """Memory to convert values in, so that an update allocates none; all of one shape."""

    value: Tensor  # fp32
    temp: Tensor  # fp32
    half: Tensor  # fp16
    mask: Tensor  # bool

    @classmethod
    def like(cls, tensor: Tensor) -> Scratch:
        """For values of this tensor's shape and strides, on its device."""
        dtypes = (torch.float32, torch.float32, torch.float16, torch.bool)
        return cls(*(torch.zeros_like(tensor, dtype=dtype) for dtype in dtypes))

    def head(self, count: int) -> Scratch:
        """The memory of the first `count` values."""
        return Scratch(*(tensor[:count] for tensor in self))


def join_residual(weight: Tensor, residual: Tensor, scratch: Scratch | None = None) -> Tensor:
    """The fp32 values of exact weights and their residuals; the scratch's `value` if one is given.

    Where a weight was written and its residual is still the old one, the value is one that
    rounds to the weight.
    """
    value, temp, half, mask = scratch or Scratch.like(weight)
    value.copy_(weight)
    if residual.dtype == torch.int16:
        _bits(temp).copy_(residual).add_(_bits(value))
        # With an old residual the bits can be a NaN's: those of 0 with any negative one are.
        torch.ne(temp, temp, out=mask)
        torch.where(mask, value, temp, out=value)
    else:
        torch.ne(half.copy_(residual), weight, out=mask)
        torch.where(mask, value, residual, out=value)
    return value


def pieces(*tensors: Tensor, size: int) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding parts of tensors of one shape, with at most `size` elements.

    The tensors are halved along their first dimension, so that parts of contiguous ones are
    contiguous.
    """
    if tensors[0].numel() <= size:
        yield tensors
        return
    dim = next(dim for dim, length in enumerate(tensors[0].shape) if length > 1)
    for halves in zip(*(tensor.chunk(2, dim) for tensor in tensors), strict=True):
        yield from pieces(*halves, size=size)


def split_residual(
    value: Tensor, weight: Tensor, residual: Tensor, scratch: Scratch | None = None
) -> None:
    """Write fp32 values into exact weights and their residuals; `value` is overwritten."""
    if residual.dtype == torch.int16:
        bits = _bits(_plain_nan(value, None if scratch is None else scratch.temp))
        residual.copy_(bits)  # its low half
        weight.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))
    else:
        residual.copy_(value)
        weight.copy_(value)


def narrow_stochastic(value: Tensor, noise: Tensor, weight: Tensor, scratch: Scratch) -> None:
    """Round fp32 values into weights, such that the mean over all noise is exact.

    (The mean of an fp16 below 2**-14 is off by up to 2**-38: the noise has 13 bits.)

    Args:
        value: fp32; overwritten.
        noise: int32, uniform in [0, 65536); overwritten.
        weight: bf16 or fp16; receives each value's neighbour below or above, or the value itself.
        scratch: Its `value` may be `value`.
    """
    _, temp, half, mask = scratch
    if weight.dtype == torch.bfloat16:
        bits = _bits(_plain_nan(value, temp))
        weight.view(torch.int16).copy_(bits.add_(noise).bitwise_right_shift_(16))
        return
    # fp16 drops the last 13 bits of an fp32, but more of them below its smallest normal number
    # 2**-14. Adding 2**-14 there moves them to the last 13 too.
    torch.abs(value, out=temp)
    half.copy_(torch.lt(temp, 2**-14, out=mask)).mul_(2**-14)
    temp.add_(half)
    _bits(temp).clamp_(max=0x7FC00000)  # a NaN could carry here too
    _bits(temp).add_(noise.bitwise_and_(0x1FFF)).bitwise_and_(-0x2000)
    torch.copysign(temp.sub_(half), value, out=temp)
    weight.copy_(temp)


def narrow_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 values, rounded to a dtype once, to nearest-even.

    torch rounds them to fp32 before bf16 or fp16: 1 + 2**-8 + 2**-40 becomes a bf16 of 1. If fp32s
    that are inexact are made the odd ones of the two neighbours, the second rounding is right.
    """
    if dtype not in RESIDUAL_DTYPE:
        return value.to(dtype)
    single = value.float()
    rounded = single.double()
    away = rounded.abs() > value.abs()
    _bits(single).sub_(away.int()).bitwise_or_((rounded != value).int())
    return single.to(dtype)


def overflow_threshold(dtype: torch.dtype, precision: str) -> float:
    """The least magnitude that is, or stochastically may be, stored as Inf in this dtype."""
    if dtype not in RESIDUAL_DTYPE:
        return float("inf")
    info = torch.finfo(dtype)
    power = info.max / (2 - info.eps)  # the largest power of two
    return info.max + power * (
        torch.finfo(torch.float32).eps if precision == "stochastic" else info.eps / 2
    )


def as_real(tensor: Tensor) -> Tensor:
    """The tensor without autograd; a complex one as a view of pairs of reals."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _plain_nan(value: Tensor, out: Tensor | None) -> Tensor:
    """The values with each NaN replaced by one that rounding leaves a NaN; `value` is overwritten.

    Other NaNs could carry, up to 0, or lose what tells them from Inf. Written on bits: a million
    take a CPU 0.3 ms, with masks 1.3 ms.
    """
    infinity = float("inf")
    out = torch.nan_to_num(value, nan=0.0, posinf=infinity, neginf=-infinity, out=out)
    exponent = _bits(value).bitwise_xor_(_bits(out)).bitwise_and_(0x7F800000)  # 0 but for a NaN
    _bits(out).bitwise_or_(exponent).bitwise_or_(exponent.bitwise_right_shift_(1))
    return out


def _bits(value: Tensor) -> Tensor:
    return value.view(torch.int32)
