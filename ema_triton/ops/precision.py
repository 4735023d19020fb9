"""How an EMA in bf16 or fp16 keeps what its dtype cannot hold: the number formats, in torch.

Added to such a weight, a small momentum's share rounds away, and the EMA stands still. So

- "exact" keeps a residual beside each weight, and from the two an fp32 value. Beside a bf16 it is
  an int16: the weight is the fp32's high half, rounded, and the residual its low half as a signed
  number, so that (weight << 16) + residual are the fp32's bits. Halves are rounded away from zero:
  to even, as elsewhere, 65537 values would share an even weight, one more than 16 bits tell apart.
  fp16 has another range than fp32, and beside it stands the fp32 itself.
- "stochastic" rounds up or down by chance, such that the mean is exact.
- "nearest" rounds to nearest-even, as torch does.

`kernels.py` has the same in Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

PRECISIONS = ("exact", "stochastic", "nearest")

# What "exact" keeps beside a weight, for the dtypes that need it.
RESIDUAL_DTYPE = {torch.bfloat16: torch.int16, torch.float16: torch.float32}


class Scratch(NamedTuple):
    """Where values are converted, all of one shape: so that an update allocates nothing."""

    value: Tensor  # fp32
    spare: Tensor  # fp32
    half: Tensor  # fp16
    mask: Tensor  # bool

    @classmethod
    def like(cls, tensor: Tensor) -> Scratch:
        """For values of this tensor's shape and strides, on its device."""
        dtypes = (torch.float32, torch.float32, torch.float16, torch.bool)
        return cls(*(torch.zeros_like(tensor, dtype=dtype) for dtype in dtypes))

    def first(self, count: int) -> Scratch:
        """For `count` values."""
        return Scratch(*(tensor[:count] for tensor in self))


def join(weight: Tensor, residual: Tensor, scratch: Scratch | None = None) -> Tensor:
    """The fp32 values of exact weights and their residuals, in the scratch.

    Where a weight was written and its residual is still the old one, the value is one that
    rounds to the weight.
    """
    scratch = scratch or Scratch.like(weight)
    value, spare, half, mask = scratch
    value.copy_(weight)
    if residual.dtype == torch.int16:
        _bits(spare).copy_(residual).add_(_bits(value))
        # An old residual can make a NaN of the weight, as a negative one does of 0.
        torch.ne(spare, spare, out=mask)
        torch.where(mask, value, spare, out=value)
    else:
        torch.ne(half.copy_(residual), weight, out=mask)
        torch.where(mask, value, residual, out=value)
    return value


def pieces(*tensors: Tensor, size: int) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding parts of tensors of one shape, with at most `size` elements.

    They are halved along their first dimension, so that a part of what is contiguous is so too.
    """
    if tensors[0].numel() <= size:
        yield tensors
        return
    dim = next(dim for dim, length in enumerate(tensors[0].shape) if length > 1)
    for halves in zip(*(tensor.chunk(2, dim) for tensor in tensors), strict=True):
        yield from pieces(*halves, size=size)


def split(value: Tensor, weight: Tensor, residual: Tensor, scratch: Scratch | None = None) -> None:
    """Write fp32 values into exact weights and their residuals; `value` is used up."""
    if residual.dtype == torch.int16:
        bits = _bits(
            _plain_nan(value, torch.empty_like(value) if scratch is None else scratch.spare)
        )
        residual.copy_(bits)  # its low half
        weight.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))
    else:
        residual.copy_(value)
        weight.copy_(value)


def shown(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights in which exact fp32 values show."""
    weight = torch.empty_like(value, dtype=dtype)
    split(value.clone(), weight, torch.empty_like(value, dtype=RESIDUAL_DTYPE[dtype]))
    return weight


def narrow_stochastic(value: Tensor, noise: Tensor, weight: Tensor, scratch: Scratch) -> None:
    """Round fp32 values into weights, such that the mean over all noise is exact.

    (Of fp16 below 2**-14 it is off by 2**-38 at most, where 13 bits of noise end.)

    Args:
        value: fp32; used up.
        noise: int32, uniform in [0, 65536); used up.
        weight: bf16 or fp16; receives one of the two neighbours of each value, or itself.
        scratch: Its `value` may be `value`.
    """
    spare, half, mask = scratch.spare, scratch.half, scratch.mask
    if weight.dtype == torch.bfloat16:
        bits = _bits(_plain_nan(value, spare))
        weight.view(torch.int16).copy_(bits.add_(noise).bitwise_right_shift_(16))
        return
    # fp16 keeps 13 bits less than fp32, and below its smallest normal number 2**-14 more of them:
    # there, adding 2**-14 brings them to the same place.
    torch.abs(value, out=spare)
    half.copy_(torch.lt(spare, 2**-14, out=mask)).mul_(2**-14)
    spare.add_(half)
    _bits(spare).clamp_(max=0x7FC00000)  # of a NaN, so that it cannot carry either
    _bits(spare).add_(noise.bitwise_and_(0x1FFF)).bitwise_and_(-0x2000)
    torch.copysign(spare.sub_(half), value, out=spare)
    weight.copy_(spare)


def overflow(dtype: torch.dtype, precision: str) -> float:
    """The least magnitude that is stored as Inf in this dtype, or by chance might be."""
    if dtype not in RESIDUAL_DTYPE:
        return float("inf")
    info = torch.finfo(dtype)
    power = info.max / (2 - info.eps)  # the largest power of two
    return info.max + power * (
        torch.finfo(torch.float32).eps if precision == "stochastic" else info.eps / 2
    )


def as_real(tensor: Tensor) -> Tensor:
    """The tensor, or if it is complex a view of it as pairs of reals; without autograd."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _plain_nan(value: Tensor, out: Tensor) -> Tensor:
    """The values, with one NaN for all, which no rounding makes another number of; `value` is lost.

    Other NaNs could carry, up to 0, or lose what tells them from Inf. On bits, because masks take a
    CPU 1.3 ms per million, this 0.3.
    """
    infinity = float("inf")
    torch.nan_to_num(value, nan=0.0, posinf=infinity, neginf=-infinity, out=out)
    exponent = _bits(value).bitwise_xor_(_bits(out)).bitwise_and_(0x7F800000)  # 0 but for a NaN
    _bits(out).bitwise_or_(exponent).bitwise_or_(exponent.bitwise_right_shift_(1))
    return out


def _bits(value: Tensor) -> Tensor:
    return value.view(torch.int32)
