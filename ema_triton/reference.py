"""The update through `torch._foreach_lerp_`: what runs without Triton, and the kernel's oracle.

Tensors of one dtype are averaged where they lie. Different dtypes meet in a bounded scratch, never
in a temporary as large as the model. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ema_triton.plan import ALIGNMENT, Bucket, Plan

# Elements in the scratch: 4 MiB of fp32 for each side that needs widening. For 25 M bf16 into fp32
# on a CPU: 5.5 ms; with a quarter of it 8.1 ms, with four times 5.9 ms.
SCRATCH = 1 << 20

# On a CPU, tensors up to SMALL elements are gathered before they are averaged, since a dispatch for
# each costs more than copying it: 1000 tensors of 64 elements take 0.13 ms so, 0.44 ms one by one.
# RUN elements at a time, because below 2**15 torch.cat copies in a plain loop, 0.1 us per tensor;
# above, it takes 0.7 us for each.
SMALL = 2048
RUN = 1 << 15


def update(plan: Plan, momentum: float | Tensor) -> None:
    """ema = lerp(ema, online, momentum) for every averaged tensor of the plan.

    Args:
        plan: A plan that is not stale.
        momentum: The weight of the online tensors: a float, or a 0-d tensor on their device.
    """
    for bucket in plan.buckets:
        update_bucket(bucket, momentum)


def update_bucket(bucket: Bucket, momentum: float | Tensor) -> None:
    """ema = lerp(ema, online, momentum) for every tensor of the bucket."""
    ema_dtype, online_dtype = bucket.key.ema_dtype, bucket.key.online_dtype
    compute = _compute_dtype(bucket)
    # A tensor weight must have the operands' dtype, and in bf16 it would keep two digits only.
    if ema_dtype == online_dtype and (isinstance(momentum, float) or ema_dtype == compute):
        direct = _direct.get(bucket) or _direct.setdefault(bucket, _lay_direct(bucket))
        for parts, gathered in direct.gathers:
            torch.cat(parts, out=gathered)
        if isinstance(momentum, float):
            torch._foreach_lerp_(direct.targets, direct.sources, momentum)
        else:
            weights = [momentum.to(compute)] * len(direct.targets)
            torch._foreach_lerp_(direct.targets, direct.sources, weights)
        return

    weight = momentum if isinstance(momentum, float) else momentum.to(compute)
    for step in _widened.get(bucket) or _widened.setdefault(bucket, _lay_widened(bucket)):
        torch._foreach_copy_(step.places, step.parts)
        if step.wide_target is None:
            step.target.lerp_(step.wide_source, weight)
        else:
            step.wide_target.copy_(step.target)
            step.wide_target.lerp_(step.wide_source, weight)
            step.target.copy_(step.wide_target)


class _Direct(NamedTuple):
    """Operands of one dtype: where they lie, or gathered, (parts, where to), if they are small."""

    gathers: list[tuple[list[Tensor], Tensor]]
    targets: list[Tensor]
    sources: list[Tensor]


class _Step(NamedTuple):
    """A stretch of the bucket that fits the scratch: `parts` are copied to `places` in it."""

    places: list[Tensor]
    parts: list[Tensor]
    wide_source: Tensor
    wide_target: Tensor | None
    target: Tensor


# Views and scratch live as long as their bucket; none of them refers to it.
_direct: WeakKeyDictionary[Bucket, _Direct] = WeakKeyDictionary()
_widened: WeakKeyDictionary[Bucket, list[_Step]] = WeakKeyDictionary()


def _compute_dtype(bucket: Bucket) -> torch.dtype:
    dtypes = (bucket.key.ema_dtype, bucket.key.online_dtype)
    return torch.float64 if torch.float64 in dtypes else torch.float32


# Inference mode, should the first update run in it, would make a scratch that no other update may
# write.
@torch.inference_mode(False)
def _lay_direct(bucket: Bucket) -> _Direct:
    # The plan has sorted the tensors by size: small ones come first.
    small = 0
    if bucket.key.dense and bucket.key.device.type == "cpu":
        small = sum(source.numel() <= SMALL for source in bucket.sources)
    direct = _Direct([], [], [])
    zeros = bucket.sources[0].new_zeros(ALIGNMENT)  # pads a source to where the next one starts
    begin = 0
    while begin < small:
        first = end = bucket.offsets[begin]
        parts: list[Tensor] = []
        while begin < small and bucket.offsets[begin] + SMALL < first + RUN:
            source, padding = bucket.sources[begin], bucket.offsets[begin] - end
            parts += [zeros[:padding], source] if padding else [source]
            end = bucket.offsets[begin] + source.numel()
            begin += 1
        gathered = bucket.flat.new_zeros(end - first)
        direct.gathers.append((parts, gathered))
        direct.targets.append(bucket.flat[first:end])
        direct.sources.append(gathered)
    direct.targets.extend(bucket.targets[small:])
    direct.sources.extend(bucket.sources[small:])
    return direct


@torch.inference_mode(False)
def _lay_widened(bucket: Bucket) -> list[_Step]:
    return [*_steps(bucket)]


def _steps(bucket: Bucket) -> Iterator[_Step]:
    compute, size = _compute_dtype(bucket), min(SCRATCH, bucket.flat.numel())
    source_scratch = bucket.flat.new_zeros(size, dtype=compute)
    target_scratch = None
    if bucket.key.ema_dtype != compute:
        target_scratch = bucket.flat.new_zeros(size, dtype=compute)

    if not bucket.key.dense:
        for whole in zip(bucket.targets, bucket.sources, strict=True):
            for target, part in _bisected(*whole):
                wide = source_scratch[: part.numel()].view(part.shape)
                wide_target = target_scratch
                if wide_target is not None:
                    wide_target = wide_target[: part.numel()].view(part.shape)
                yield _Step([wide], [part], wide, wide_target, target)
        return

    for begin in range(0, bucket.flat.numel(), SCRATCH):
        target = bucket.flat[begin : begin + SCRATCH]
        places, parts = [], []
        for offset, source in zip(bucket.offsets, bucket.sources, strict=True):
            first = max(offset, begin)
            last = min(offset + source.numel(), begin + SCRATCH)
            if first < last:
                places.append(source_scratch[first - begin : last - begin])
                parts.append(source[first - offset : last - offset])
        wide_target = None if target_scratch is None else target_scratch[: target.numel()]
        yield _Step(places, parts, source_scratch[: target.numel()], wide_target, target)


def _bisected(target: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Halve both along their longest dimension until they fit the scratch."""
    if source.numel() <= SCRATCH:
        yield target, source
        return
    dim = max(range(source.dim()), key=source.size)
    for pair in zip(target.chunk(2, dim), source.chunk(2, dim), strict=True):
        yield from _bisected(*pair)
