"""The update through `torch._foreach_lerp_`: what runs without Triton, and the kernels' oracle.

Tensors of one dtype are averaged where they lie. Where values have to be converted, they are in a
bounded scratch, never in a temporary as large as the model. Nothing waits for the device.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from itertools import takewhile
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ema_triton.ops.philox import Noise
from ema_triton.ops.precision import Scratch, join, narrow_stochastic, overflow, pieces, split
from ema_triton.plan import Launch
from ema_triton.state import ALIGNMENT, CHUNK

# Elements in the scratch: 4 MiB of fp32 for each side that needs widening. For 25 M bf16 into fp32
# on a CPU: 5.5 ms; with a quarter of it 8.1 ms, with four times 5.9 ms.
SCRATCH = 1 << 20

# On a CPU, tensors up to SMALL elements are gathered before they are averaged, since a dispatch for
# each costs more than copying it: 1000 tensors of 64 elements take 0.13 ms so, 0.44 ms one by one.
# RUN elements at a time, because below 2**15 torch.cat copies in a plain loop, 0.1 us per tensor;
# above, it takes 0.7 us for each.
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
    if launch.skip_counts is None and launch.bucket.random_state is None and _copies(momentum):
        copy(launch)
        return
    in_place = kind.dtype == launch.online_dtype and kind.precision == "nearest"
    # A tensor weight must have the operands' dtype, and in bf16 it would keep two digits only.
    if (
        in_place
        and launch.skip_counts is None
        and (isinstance(momentum, float) or kind.dtype == compute)
    ):
        direct = _direct.get(launch) or _direct.setdefault(launch, _lay_direct(launch))
        for parts, gathered in direct.gathers:
            torch.cat(parts, out=gathered)
        if isinstance(momentum, float):
            torch._foreach_lerp_(direct.targets, direct.sources, momentum)
        else:
            weights = [momentum.to(compute)] * len(direct.targets)
            torch._foreach_lerp_(direct.targets, direct.sources, weights)
        return

    weight = momentum if isinstance(momentum, float) else momentum.to(compute)
    for step in _steps.get(launch) or _steps.setdefault(launch, _lay_steps(launch)):
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


def copy(launch: Launch) -> None:
    """ema = online for every tensor of the launch, as far as its precision goes."""
    if launch.bucket.residual is None:
        torch._foreach_copy_(launch.targets, launch.sources)
        return
    for step in _steps.get(launch) or _steps.setdefault(launch, _lay_steps(launch)):
        torch._foreach_copy_(step.places, step.parts)
        step.ema.copy_(step.online)
        step.store()


def exchange(launch: Launch) -> None:
    """Swap the values of the launch's EMA tensors and of their online tensors, of one dtype."""
    flat = launch.bucket.flat
    scratch = flat.new_empty(min(CHUNK, flat.numel()))
    for ema, online in zip(launch.targets, launch.sources, strict=True):
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

    counts: Tensor
    rows: Tensor  # int64 [parts], in the counts: the first of each part's tensor
    ends: Tensor  # int64 [parts], in the step: the last element of each part

    def add(self, finite: Tensor) -> None:
        """Count what is not finite; between the parts all is finite."""
        total = finite.logical_not().cumsum(0)[self.ends]
        self.counts.index_add_(0, self.rows, total.diff(prepend=total.new_zeros(1)))


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
    random_state: Tensor | None
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
        elif self.noise is not None and self.random_state is not None:
            drawn = self.noise.draw(self.random_state, self.begin, self.weight.numel())
            narrow_stochastic(value, drawn, self.weight, self.scratch)


def _copies(momentum: float | Tensor) -> bool:
    return isinstance(momentum, float) and momentum == 1


def _move(source: Tensor, target: Tensor) -> None:
    """Copy, unless they are the same."""
    if source.data_ptr() != target.data_ptr():
        target.copy_(source)


# Views and scratch live as long as their launch; none of them refers to it.
_direct: WeakKeyDictionary[Launch, _Direct] = WeakKeyDictionary()
_steps: WeakKeyDictionary[Launch, list[_Step]] = WeakKeyDictionary()


def _compute_dtype(launch: Launch) -> torch.dtype:
    dtypes = (launch.kind.dtype, launch.online_dtype)
    return torch.float64 if torch.float64 in dtypes else torch.float32


# Inference mode, should the first update run in it, would make a scratch that no other update may
# write.
@torch.inference_mode(False)
def _lay_direct(launch: Launch) -> _Direct:
    # The state has sorted the tensors by size: small ones come first.
    flat, sources, offsets = launch.bucket.flat, launch.sources, launch.offsets
    small, align = 0, ALIGNMENT // flat.itemsize
    if launch.dense and launch.kind.device.type == "cpu":
        small = len([*takewhile(lambda source: source.numel() <= SMALL, sources)])
    direct = _Direct([], [], [])
    zeros = sources[0].new_zeros(align)  # pads a source to where the next one starts
    begin = 0
    while begin < small:
        first = end = offsets[begin]
        parts: list[Tensor] = []
        while (
            begin < small
            and offsets[begin] + SMALL < first + RUN
            and offsets[begin] - end < align  # else another launch's tensor lies between
        ):
            source, padding = sources[begin], offsets[begin] - end
            parts += [zeros[:padding], source] if padding else [source]
            end = offsets[begin] + source.numel()
            begin += 1
        gathered = flat.new_zeros(end - first)
        direct.gathers.append((parts, gathered))
        direct.targets.append(flat[first:end])
        direct.sources.append(gathered)
    direct.targets.extend(launch.targets[small:])
    direct.sources.extend(sources[small:])
    return direct


@torch.inference_mode(False)
def _lay_steps(launch: Launch) -> list[_Step]:
    bucket, kind, compute = launch.bucket, launch.kind, _compute_dtype(launch)
    flat, guarded = bucket.flat, launch.skip_counts is not None
    size = min(SCRATCH, flat.numel())
    online = flat.new_zeros(size, dtype=compute)
    scratch = Scratch.like(flat[:size]) if kind.precision != "nearest" else None
    noise = Noise(size, kind.device) if kind.precision == "stochastic" else None
    if scratch is not None and compute == torch.float32:
        ema = scratch.value
    else:
        aside = guarded or kind.dtype != compute
        ema = flat.new_zeros(size if aside else 0, dtype=compute)

    steps = []
    for stretch in stretches(launch):
        begin = stretch[0][0]
        end = stretch[-1][0] + stretch[-1][1].numel()
        weight = flat[begin:end]
        skipped = None
        if launch.skip_counts is not None:
            rows = [
                bucket.first_chunks[bisect(bucket.offsets, offset) - 1] for offset, _ in stretch
            ]
            ends = [offset - begin + part.numel() - 1 for offset, part in stretch]
            skipped = _Skipped(
                launch.skip_counts,
                torch.tensor(rows, device=kind.device),
                torch.tensor(ends, device=kind.device),
            )
        step = _Step(
            begin=begin,
            places=[online[o - begin : o - begin + p.numel()].view(p.shape) for o, p in stretch],
            parts=[part for _, part in stretch],
            online=online[: end - begin],
            weight=weight,
            ema=ema[: end - begin] if len(ema) else weight,
            residual=None if bucket.residual is None else bucket.residual[begin:end],
            random_state=bucket.random_state,
            scratch=None if scratch is None else scratch.first(end - begin),
            noise=noise,
            skipped=skipped,
            overflow=overflow(kind.dtype, kind.precision),
        )
        steps.append(step)
    return steps


def stretches(launch: Launch) -> Iterator[list[tuple[int, Tensor]]]:
    """The sources, each with its offset, by as many as lie side by side and the scratch holds."""
    stretch: list[tuple[int, Tensor]] = []
    end = 0
    for whole in zip(launch.offsets, launch.sources, strict=True):
        for offset, part in _pieces(*whole):
            # A gap wider than padding is another launch's tensor.
            apart = offset - end >= ALIGNMENT // launch.bucket.flat.itemsize
            if stretch and (apart or offset + part.numel() > stretch[0][0] + SCRATCH):
                yield stretch
                stretch = []
            stretch.append((offset, part))
            end = offset + part.numel()
    yield stretch


def _pieces(offset: int, source: Tensor) -> Iterator[tuple[int, Tensor]]:
    for (piece,) in pieces(source, size=SCRATCH):
        yield offset, piece
        offset += piece.numel()
