"""The update through `torch._foreach_lerp_`: the fallback from Triton, and the kernels' reference.

Tensors of one dtype are averaged where they lie. What has to be converted passes through a scratch
of bounded size, never a temporary as large as the model. Nothing waits for the device.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ema_triton.ops.philox import Philox
from ema_triton.ops.precision import (
    Scratch,
    join_residual,
    narrow_stochastic,
    overflow_threshold,
    pieces,
    split_residual,
)
from ema_triton.pairing import own_copy
from ema_triton.plan import Launch, Plan
from ema_triton.state import ALIGNMENT, CHUNK, SCRATCH

# On a CPU, tensors up to SMALL elements are gathered before they are averaged, since a dispatch for
# each costs more than copying it: 1000 tensors of 64 elements take 0.13 ms gathered, 0.44 ms one by
# one. Fewer than RUN elements at a time: below 2**15 torch.cat copies in a plain loop, 0.1 us per
# tensor; above, it takes 0.7 us for each.
SMALL = 2048
RUN = 1 << 15


def update(launch: Launch, momentum: float | Tensor) -> None:
    """ema = lerp(ema, online, momentum) for every tensor of the launch.

    Args:
        launch: Of a plan that is not stale.
        momentum: The weight of the online tensors: a float, or a 0-d tensor on their device.
    """
    kind, compute = launch.kind, _compute_dtype(launch)
    momentum = launch.effective_momentum(momentum)
    weight = momentum if isinstance(momentum, float) else momentum.to(compute)
    if launch.skip_counts is not None:
        _update_in_steps(launch, weight, guarded=True)
    elif _copies(weight) and launch.bucket.random_state is None:
        copy(launch)
    elif (
        kind.dtype == launch.online_dtype
        and kind.precision == "nearest"
        # A tensor weight must have the operands' dtype, and in bf16 it would keep two digits only.
        and (isinstance(weight, float) or kind.dtype == compute)
    ):
        direct = _direct.get(launch) or _direct.setdefault(launch, _lay_direct(launch))
        for parts, gathered in direct.gathers:
            torch.cat(parts, out=gathered)
        weights = weight if isinstance(weight, float) else [weight] * len(direct.targets)
        torch._foreach_lerp_(direct.targets, direct.sources, weights)
    else:
        _update_in_steps(launch, weight, guarded=False)


def update_several(launches: Sequence[Launch], momenta: Sequence[float | Tensor]) -> None:
    """`update` for launches of several EMAs."""
    for launch, momentum in zip(launches, momenta, strict=True):
        update(launch, momentum)


def copy(launch: Launch) -> None:
    """ema = online for every tensor of the launch, as far as its precision goes."""
    if launch.bucket.residual is None:
        torch._foreach_copy_(launch.targets, launch.sources)
    else:
        _update_in_steps(launch, 1.0, guarded=False)


def sync(plan: Plan, online: list[Tensor]) -> None:
    """Copy all online tensors into the EMA; `online` are those that `plan.copies` has read."""
    plan.copies.write(online)
    for launch in plan.launches:
        copy(launch)
    for pair in plan.sync_only:
        current = pair.online_slots[0].read()
        if current is not None:
            for slot in pair.ema_slots:
                slot.write(own_copy(current, pair.ema.dtype), like=pair.online_slots[0].whole())
    plan.wrote()


def exchange(launch: Launch) -> None:
    """Swap the values of the launch's EMA tensors and of their online tensors, of one dtype."""
    flat = launch.bucket.flat
    scratch = flat.new_empty(min(CHUNK, flat.numel()))
    for pair in zip(launch.targets, launch.sources, strict=True):
        for ema, online in zip(*(torch.split(tensor, CHUNK) for tensor in pair), strict=True):
            old = scratch[: len(ema)].copy_(ema)
            ema.copy_(online)
            online.copy_(old)


def stretches(
    launch: Launch, count: int | None = None, size: int | None = None
) -> Iterator[list[tuple[int, Tensor]]]:
    """The first `count` sources (None: all), each with its offset, in runs that lie side by side.

    A run has at most `size` elements (None: SCRATCH); a larger source comes in pieces.
    """
    size = size or SCRATCH
    stretch: list[tuple[int, Tensor]] = []
    end = 0
    for offset, source in islice(zip(launch.offsets, launch.sources, strict=True), count):
        begin = offset
        for (piece,) in pieces(source, size=size):
            # A gap wider than padding is another launch's tensor.
            apart = begin - end >= ALIGNMENT // launch.bucket.flat.itemsize
            if stretch and (apart or begin + piece.numel() > stretch[0][0] + size):
                yield stretch
                stretch = []
            stretch.append((begin, piece))
            begin = end = begin + piece.numel()
    if stretch:
        yield stretch


class _Direct(NamedTuple):
    """Operands of one dtype: where they lie, or `gathered` copies of small online `parts`."""

    gathers: list[tuple[list[Tensor], Tensor]]
    targets: list[Tensor]
    sources: list[Tensor]


class _Guard(NamedTuple):
    """Skips the values of a step that are not finite, and counts them."""

    overflow: float
    counts: Tensor
    rows: Tensor  # int64 [parts]: the number of each part's skip count
    ends: Tensor  # int64 [parts]: the last element of each part, by its index in the step

    def skip(self, step: _Step) -> None:
        """Put the old values back where the new ones are not finite.

        Padding between the parts must be finite.
        """
        dtype = step.weight.dtype
        if step.ema.device.type == "cpu":  # there a look at the extremes waits for nothing
            low, high = torch.aminmax(step.ema)
            bound = min(self.overflow, torch.finfo(dtype).max)
            if -bound < low and high < bound:  # not for NaN
                return
        new = step.ema.clone()
        size = new.abs()
        if dtype != torch.float64:
            size = size.float()  # Inf where an fp64 is too large for the EMA
        finite = size < self.overflow
        torch.where(finite, new, step.load(), out=step.ema)
        total = finite.logical_not().cumsum(0)[self.ends]
        self.counts.index_add_(0, self.rows, total.diff(prepend=total.new_zeros(1)))


class _Step(NamedTuple):
    """A stretch of the bucket, averaged in a scratch of the arithmetic's dtype.

    The online `parts` are copied to `places` in `online`, a scratch of the launch. `ema` is another
    one, or `weight`, the stretch itself, where that has the dtype.
    """

    begin: int
    places: list[Tensor]
    parts: list[Tensor]
    online: Tensor
    ema: Tensor
    weight: Tensor
    residual: Tensor | None
    scratch: Scratch | None  # for a precision other than "nearest"
    philox: Philox | None
    guard: _Guard | None

    def load(self) -> Tensor:
        """Fill `ema` from the bucket."""
        value = self.weight
        if self.residual is not None:
            value = join_residual(value, self.residual, self.scratch)
        return value if value is self.ema else self.ema.copy_(value)

    def store(self) -> None:
        """Write `ema` into the bucket, rounded as the precision says; `ema` is overwritten."""
        if self.scratch is None:
            if self.weight is not self.ema:
                self.weight.copy_(self.ema)
            return
        value = self.scratch.value.copy_(self.ema)  # which does nothing if they are the same
        if self.residual is not None:
            split_residual(value, self.weight, self.residual, self.scratch)
        elif self.philox is not None:
            noise = self.philox.draw(self.begin, self.weight.numel())
            narrow_stochastic(value, noise, self.weight, self.scratch)


# Views and scratch live as long as their launch; none of them refers to it.
_direct: WeakKeyDictionary[Launch, _Direct] = WeakKeyDictionary()
_steps: WeakKeyDictionary[Launch, list[_Step]] = WeakKeyDictionary()


def _update_in_steps(launch: Launch, weight: float | Tensor, *, guarded: bool) -> None:
    for step in _steps.get(launch) or _steps.setdefault(launch, _lay_steps(launch)):
        if step.guard is not None:
            step.online.zero_()  # the padding too, which stays finite so
        torch._foreach_copy_(step.places, step.parts)
        if _copies(weight):
            step.ema.copy_(step.online)
        else:
            step.load().lerp_(step.online, weight)
        if guarded and step.guard is not None:
            step.guard.skip(step)
        step.store()


def _copies(momentum: float | Tensor) -> bool:
    return isinstance(momentum, float) and momentum == 1


def _compute_dtype(launch: Launch) -> torch.dtype:
    dtypes = (launch.kind.dtype, launch.online_dtype)
    return torch.float64 if torch.float64 in dtypes else torch.float32


# What is laid out in inference mode could not be written outside of it.
@torch.inference_mode(False)
def _lay_direct(launch: Launch) -> _Direct:
    flat, sources, small = launch.bucket.flat, launch.sources, 0
    if launch.dense and launch.kind.device.type == "cpu":
        # The state has sorted the tensors by size: small ones come first.
        small = len([*takewhile(lambda source: source.numel() <= SMALL, sources)])
    direct = _Direct([], launch.targets[small:], sources[small:])
    zeros = flat.new_zeros(ALIGNMENT // flat.itemsize)
    for stretch in stretches(launch, small, RUN - 1):
        begin = end = stretch[0][0]
        parts = []
        for offset, source in stretch:
            if offset > end:
                parts.append(zeros[: offset - end])
            parts.append(source)
            end = offset + source.numel()
        gathered = flat.new_zeros(end - begin)
        direct.gathers.append((parts, gathered))
        direct.targets.append(flat[begin:end])
        direct.sources.append(gathered)
    return direct


@torch.inference_mode(False)
def _lay_steps(launch: Launch) -> list[_Step]:
    bucket, kind, compute = launch.bucket, launch.kind, _compute_dtype(launch)
    flat, counts = bucket.flat, launch.skip_counts
    size = min(SCRATCH, flat.numel())
    online = flat.new_zeros(size, dtype=compute)
    scratch = Scratch.like(flat[:size]) if kind.precision != "nearest" else None
    philox = None if bucket.random_state is None else Philox(bucket.random_state, size)
    in_scratch = scratch is not None and compute == torch.float32
    separate = None
    if not in_scratch and (counts is not None or kind.dtype != compute):
        separate = flat.new_zeros(size, dtype=compute)

    steps = []
    for stretch in stretches(launch):
        begin, end = stretch[0][0], stretch[-1][0] + stretch[-1][1].numel()
        weight = flat[begin:end]
        ema = weight if separate is None else separate[: end - begin]
        head = None if scratch is None else scratch.head(end - begin)
        if head is not None and in_scratch:
            ema = head.value
        guard = None
        if counts is not None:
            members = [bisect(bucket.offsets, offset) - 1 for offset, _ in stretch]
            rows = [bucket.first_chunks[member] for member in members]
            ends = [offset - begin + part.numel() - 1 for offset, part in stretch]
            guard = _Guard(
                overflow_threshold(kind.dtype, kind.precision),
                counts,
                torch.tensor(rows, device=kind.device),
                torch.tensor(ends, device=kind.device),
            )
        step = _Step(
            begin=begin,
            places=[online[o - begin : o - begin + p.numel()].view(p.shape) for o, p in stretch],
            parts=[part for _, part in stretch],
            online=online[: end - begin],
            ema=ema,
            weight=weight,
            residual=None if bucket.residual is None else bucket.residual[begin:end],
            scratch=head,
            philox=philox,
            guard=guard,
        )
        steps.append(step)
    return steps
