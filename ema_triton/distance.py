"""How far the EMA is from the online model."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ema_triton.distributed import dtensor
from ema_triton.ops import foreach_backend
from ema_triton.ops.precision import join_residual
from ema_triton.pairing import Pair
from ema_triton.plan import Launch
from ema_triton.state import SCRATCH


class Distance(NamedTuple):
    """Euclidean norms over all averaged tensors, tied ones counted once; then by module.

    Attributes:
        distance: ‖ema - online‖₂.
        norm: ‖online‖₂.
        modules: The same of each top-level module by name; tensors of the model itself by "".
    """

    distance: float
    norm: float
    modules: dict[str, Distance]


def measure(pairs: list[Pair], launches: list[Launch]) -> Distance:
    """Measure the averaged tensors; waits for each device once.

    Args:
        pairs: All averaged pairs of a plan that is not stale. The squares of sharded tensors are
            summed over the ranks, all of which have to call this.
        launches: The launches of this plan.
    """
    wholes = {
        pair.name: whole
        for pair in pairs
        if pair.scale is not None
        and (whole := pair.online_slots[0].whole()) is not None
        and whole.numel()
    }
    # Squares of ‖ema - online‖₂ and ‖online‖₂, first of this rank's parts, then of whole tensors.
    parts = {name: torch.zeros(2, dtype=torch.float64, device="cpu") for name in wholes}
    by_device: dict[torch.device, list[Launch]] = {}
    for launch in launches:
        if launch.scale is not None:
            by_device.setdefault(launch.kind.device, []).append(launch)
    for on_device in by_device.values():
        names, *norms = zip(*(row for launch in on_device for row in _norms(launch)), strict=True)
        squares = torch.stack([*norms[0], *norms[1]]).view(2, -1).cpu().square()
        for name, square in zip(names, squares.unbind(1), strict=True):
            parts[name] += square
    by_sharding: dict[Hashable, list[str]] = {}
    for name, whole in wholes.items():
        by_sharding.setdefault(dtensor.sharding(whole), []).append(name)
    rows: dict[str, list[float]] = {}
    for alike in by_sharding.values():
        squares = torch.stack([parts[name] for name in alike])
        rows |= zip(alike, dtensor.sum_over_ranks(squares, wholes[alike[0]]).tolist(), strict=True)
    modules: dict[str, list[list[float]]] = {}
    for name, row in rows.items():
        module, dot, _ = name.partition(".")
        modules.setdefault(module if dot else "", []).append(row)
    return Distance(
        *_roots([*rows.values()]),
        {module: Distance(*_roots(of_module), {}) for module, of_module in modules.items()},
    )


def _norms(launch: Launch) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A tensor's name, ‖ema - online‖₂ and ‖online‖₂ in fp64, on its device.

    A tensor larger than the scratch has several parts, each with its norms.
    """
    bucket = launch.bucket
    size = min(SCRATCH, bucket.flat.numel())
    scratch = bucket.flat.new_empty(size, dtype=torch.float64)
    for stretch in foreach_backend.stretches(launch):
        begin, end = stretch[0][0], stretch[-1][0] + stretch[-1][1].numel()
        ema, online = bucket.flat[begin:end], scratch[: end - begin]
        if bucket.residual is not None:
            ema = join_residual(ema, bucket.residual[begin:end])
        places = [online[o - begin : o - begin + p.numel()].view(p.shape) for o, p in stretch]
        torch._foreach_copy_(places, [part for _, part in stretch])
        norms = torch._foreach_norm(places)
        online.sub_(ema)
        names = [bucket.names[bisect(bucket.offsets, offset) - 1] for offset, _ in stretch]
        yield from zip(names, torch._foreach_norm(places), norms, strict=True)


def _roots(rows: list[list[float]]) -> tuple[float, float]:
    apart, size = (math.hypot(*(math.sqrt(row[side]) for row in rows)) for side in (0, 1))
    return apart, size
