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
from ema_triton.ops.precision import join
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
    """Measure what is averaged; waits for each device once.

    Args:
        pairs: All of a plan that is not stale. Of sharded ones the ranks' parts are added up: all
            ranks have to call this.
        launches: Its launches.
    """
    pairs = [pair for pair in pairs if pair.scale is not None]
    by_device: dict[torch.device, list[Launch]] = {}
    for launch in launches:
        if launch.scale is not None:
            by_device.setdefault(launch.kind.device, []).append(launch)
    # Of this rank's parts, where there are any.
    squares = {pair.name: [0.0, 0.0] for pair in pairs}
    for alike in by_device.values():
        parts, *norms = zip(*(row for launch in alike for row in _norms(launch)), strict=True)
        on_host = torch.stack([*norms[0], *norms[1]]).view(2, -1).tolist()
        for name, apart, size in zip(parts, *on_host, strict=True):
            squares[name][0] += apart * apart
            squares[name][1] += size * size
    by_layout: dict[Hashable, list[Pair]] = {}
    for pair in pairs:
        whole = pair.online_slots[0].whole()
        if whole is not None and whole.numel():
            by_layout.setdefault(dtensor.sharding(whole), []).append(pair)
    rows: dict[str, list[float]] = {}
    for sharded_alike in by_layout.values():
        whole = sharded_alike[0].online_slots[0].whole()
        names = [pair.name for pair in sharded_alike]
        of_parts = torch.tensor(
            [squares[name] for name in names], dtype=torch.float64, device="cpu"
        )
        rows |= zip(names, dtensor.sum_over_ranks(of_parts, whole).tolist(), strict=True)
    modules: dict[str, list[list[float]]] = {}
    for name, row in rows.items():
        module, dot, _ = name.partition(".")
        modules.setdefault(module if dot else "", []).append(row)
    return Distance(
        *_roots([*rows.values()]),
        {name: Distance(*_roots(found), {}) for name, found in modules.items()},
    )


def _norms(launch: Launch) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A tensor's name, ‖ema - online‖₂ and ‖online‖₂ in fp64, on its device.

    A tensor larger than the scratch comes in several parts, each with its norms.
    """
    bucket = launch.bucket
    size = min(SCRATCH, bucket.flat.numel())
    scratch = bucket.flat.new_empty(size, dtype=torch.float64)
    for stretch in foreach_backend.stretches(launch):
        begin, end = stretch[0][0], stretch[-1][0] + stretch[-1][1].numel()
        ema, online = bucket.flat[begin:end], scratch[: end - begin]
        if bucket.residual is not None:
            ema = join(ema, bucket.residual[begin:end])
        places = [online[o - begin : o - begin + p.numel()].view(p.shape) for o, p in stretch]
        torch._foreach_copy_(places, [part for _, part in stretch])
        norms = torch._foreach_norm(places)
        online.sub_(ema)
        names = [bucket.names[bisect(bucket.offsets, offset) - 1] for offset, _ in stretch]
        yield from zip(names, torch._foreach_norm(places), norms, strict=True)


def _roots(rows: list[list[float]]) -> tuple[float, float]:
    apart, size = (math.hypot(*(math.sqrt(row[side]) for row in rows)) for side in (0, 1))
    return apart, size
