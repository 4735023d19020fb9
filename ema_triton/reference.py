"""The update through `torch._foreach_lerp_`: what runs without Triton, and the kernels' oracle.

Tensors of one dtype are averaged where they lie. Where values have to be converted, they are in a
bounded scratch, never in a temporary as large as the model. Nothing waits for the device.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ema_triton.buckets import ALIGNMENT, CHUNK, Bucket
from ema_triton.noise import Noise
from ema_triton.plan import Plan
from ema_triton.precision import Scratch, join, narrow_stochastic, overflow, split

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
    key, compute = bucket.key, _compute_dtype(bucket)
    momentum = bucket.share(momentum)
    if bucket.counters is None and bucket.draws is None and _copies(momentum):
        copy_bucket(bucket)
        return
    in_place = key.ema_dtype == key.online_dtype and key.precision == "nearest"
    # A tensor weight must have the operands' dtype, and in bf16 it would keep two digits only.
    if (
        in_place
        and bucket.counters is None
        and (isinstance(momentum, float) or key.ema_dtype == compute)
    ):
        direct = _direct.get(bucket) or _direct.setdefault(bucket, _lay_direct(bucket))
        for parts, gathered in direct.gathers:
            torch.cat(parts, out=gathered)
        if isinstance(momentum, float):
            torch._foreach_lerp_(direct.targets, direct.sources, momentum)
        else:
            weights = [momentum.to(compute)] * len(direct.targets)
            torch._foreach_lerp_(direct.targets, direct.sources, weights)
        return

    bucket.count_update()
    weight = momentum if isinstance(momentum, float) else momentum.to(compute)
    for step in _steps.get(bucket) or _steps.setdefault(bucket, _lay_steps(bucket)):
        if step.skipped is not None:
            step.online.zero_()  # between the tensors too, where nothing is to be counted
        torch._foreach_copy_(step.places, step.parts)
        if _copies(weight):
            step.ema.copy_(step.online)
        else:
            step.load().lerp_(step.online, weight)
        if step.skipped is not None:
            step.spare()
        step.store()


def copy_bucket(bucket: Bucket) -> None:
    """ema = online for every tensor of the bucket, as far as its precision goes."""
    if bucket.residual is None:
        torch._foreach_copy_(bucket.targets, bucket.sources)
        return
    for step in _steps.get(bucket) or _steps.setdefault(bucket, _lay_steps(bucket)):
        torch._foreach_copy_(step.places, step.parts)
        step.ema.copy_(step.online)
        step.store()


def exchange(bucket: Bucket) -> None:
    """Swap the values of the bucket's EMA tensors and of their online tensors, of one dtype."""
    scratch = bucket.flat.new_empty(min(CHUNK, bucket.flat.numel()))
    for ema, online in zip(bucket.targets, bucket.sources, strict=True):
        for begin in range(0, ema.numel(), CHUNK):
            mine, theirs = ema[begin : begin + CHUNK], online[begin : begin + CHUNK]
            aside = scratch[: len(mine)].copy_(mine)
            mine.copy_(theirs)
            theirs.copy_(aside)


class _Direct(NamedTuple):
    """Operands of one dtype: where they lie, or gathered, (parts, where to), if they are small."""

    gathers: list[tuple[list[Tensor], Tensor]]
    targets: list[Tensor]
    sources: list[Tensor]


class _Skipped(NamedTuple):
    """Where the skip counts of a step's parts go."""

    counters: Tensor
    rows: Tensor  # int64 [parts], in the counters: the first of each part's tensor
    ends: Tensor  # int64 [parts], in the step: the last element of each part

    def add(self, finite: Tensor) -> None:
        """Count what is not finite; between the parts all is finite."""
        total = finite.logical_not().cumsum(0)[self.ends]
        self.counters.index_add_(0, self.rows, total.diff(prepend=total.new_zeros(1)))


class _Step(NamedTuple):
    """A stretch of the bucket, averaged in a scratch of the arithmetic's dtype.

    The online `parts` are copied to `places` in `online`. `ema` is a scratch too, or `weight`, the
    stretch itself, where that has the dtype.
    """

    begin: int
    places: list[Tensor]
    parts: list[Tensor]
    online: Tensor
    ema: Tensor
    weight: Tensor
    residual: Tensor | None
    draws: Tensor | None
    scratch: Scratch | None  # for a precision other than "nearest"
    noise: Noise | None
    skipped: _Skipped | None
    overflow: float

    def spare(self) -> None:
        """Put the old values back where the new ones are not finite, and count those."""
        if self.ema.device.type == "cpu" and self._is_finite():
            return
        new = self.ema.clone()
        size = new.abs()
        if self.weight.dtype != torch.float64:
            size = size.float()  # no copy, but for what fp64 holds and the EMA does not
        finite = size < self.overflow
        torch.where(finite, new, self.load(), out=self.ema)
        if self.skipped is not None:
            self.skipped.add(finite)

    def _is_finite(self) -> bool:
        """Whether surely nothing is to be put back: one pass, for a device that need not wait."""
        bound = min(self.overflow, torch.finfo(self.weight.dtype).max)
        low, high = torch.aminmax(self.ema)
        return bool(-bound < low) and bool(high < bound)  # not for NaN

    def load(self) -> Tensor:
        """Fill `ema` from the bucket."""
        if self.residual is not None:
            _move(join(self.weight, self.residual, self.scratch), self.ema)
        else:
            _move(self.weight, self.ema)
        return self.ema

    def store(self) -> None:
        """Write `ema` into the bucket, rounded as the precision says; `ema` is used up."""
        if self.scratch is None:
            _move(self.ema, self.weight)
            return
        value = self.scratch.value
        _move(self.ema, value)
        if self.residual is not None:
            split(value, self.weight, self.residual, self.scratch)
        elif self.noise is not None and self.draws is not None:
            drawn = self.noise.draw(self.draws, self.begin, self.weight.numel())
            narrow_stochastic(value, drawn, self.weight, self.scratch)


def _copies(momentum: float | Tensor) -> bool:
    return isinstance(momentum, float) and momentum == 1


def _move(source: Tensor, target: Tensor) -> None:
    """Copy, unless they are the same."""
    if source.data_ptr() != target.data_ptr():
        target.copy_(source)


# Views and scratch live as long as their bucket; none of them refers to it.
_direct: WeakKeyDictionary[Bucket, _Direct] = WeakKeyDictionary()
_steps: WeakKeyDictionary[Bucket, list[_Step]] = WeakKeyDictionary()


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
def _lay_steps(bucket: Bucket) -> list[_Step]:
    key, compute = bucket.key, _compute_dtype(bucket)
    size = min(SCRATCH, bucket.flat.numel())
    online = bucket.flat.new_zeros(size, dtype=compute)
    scratch = Scratch.like(bucket.flat[:size]) if key.precision != "nearest" else None
    noise = Noise(size, key.device) if key.precision == "stochastic" else None
    if scratch is not None and compute == torch.float32:
        ema = scratch.value
    else:
        aside = bucket.counters is not None or key.ema_dtype != compute
        ema = bucket.flat.new_zeros(size if aside else 0, dtype=compute)

    first_rows = [0, *bucket.chunks().cumsum(0).tolist()]
    steps = []
    for stretch in stretches(bucket):
        begin = stretch[0][0]
        end = stretch[-1][0] + stretch[-1][1].numel()
        weight = bucket.flat[begin:end]
        skipped = None
        if bucket.counters is not None:
            rows = [first_rows[bisect(bucket.offsets, offset) - 1] for offset, _ in stretch]
            ends = [offset - begin + part.numel() - 1 for offset, part in stretch]
            skipped = _Skipped(
                bucket.counters,
                torch.tensor(rows, device=key.device),
                torch.tensor(ends, device=key.device),
            )
        step = _Step(
            begin=begin,
            places=[online[o - begin : o - begin + p.numel()].view(p.shape) for o, p in stretch],
            parts=[part for _, part in stretch],
            online=online[: end - begin],
            weight=weight,
            ema=ema[: end - begin] if len(ema) else weight,
            residual=None if bucket.residual is None else bucket.residual[begin:end],
            draws=bucket.draws,
            scratch=None if scratch is None else scratch.first(end - begin),
            noise=noise,
            skipped=skipped,
            overflow=overflow(key.ema_dtype, key.precision),
        )
        steps.append(step)
    return steps


def stretches(bucket: Bucket) -> Iterator[list[tuple[int, Tensor]]]:
    """The sources, each with its offset, by as many as the scratch holds."""
    stretch: list[tuple[int, Tensor]] = []
    for whole in zip(bucket.offsets, bucket.sources, strict=True):
        for offset, part in _halved(*whole):
            if stretch and offset + part.numel() > stretch[0][0] + SCRATCH:
                yield stretch
                stretch = []
            stretch.append((offset, part))
    yield stretch


def _halved(offset: int, source: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Halve it until it fits the scratch, along its first dimension: its EMA stays in one piece."""
    if source.numel() <= SCRATCH:
        yield offset, source
        return
    dim = next(dim for dim in range(source.dim()) if source.size(dim) > 1)
    one, other = source.chunk(2, dim)
    yield from _halved(offset, one)
    yield from _halved(offset + one.numel(), other)
