"""How far the EMA is from the online model."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from ema_triton import shards
from ema_triton.buckets import Bucket
from ema_triton.pairs import Pair
from ema_triton.plan import Plan


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


# What a tensor has on a rank where no part of it lies.
_NOTHING = torch.zeros((1, 2), dtype=torch.float64, device="cpu")


def measure(pairs: list[Pair], plan: Plan, squares: Callable[[Bucket], Tensor]) -> Distance:
    """Measure all of the plan; waits for the device once.

    Args:
        pairs: Those that are averaged. Of sharded ones the ranks' parts are added up: all ranks
            have to call this.
        plan: A plan that is not stale.
        squares: The backend's sums of squares of a bucket's tensors, fp64 [tensors, 2].
    """
    averaged = [bucket for bucket in plan.buckets if bucket.key.scale is not None]
    names = [name for bucket in averaged for name in bucket.names]
    found = [squares(bucket) for bucket in averaged]
    parts = dict(zip(names, torch.cat([_NOTHING[:0], *(f.cpu() for f in found)]), strict=True))
    by_layout: dict[Hashable, list[Pair]] = {}
    for pair in pairs:
        whole = pair.online_slots[0].whole()
        if whole is not None and whole.numel():
            by_layout.setdefault(shards.layout(whole), []).append(pair)
    rows: dict[str, list[float]] = {}
    for alike in by_layout.values():
        whole = alike[0].online_slots[0].whole()
        of_parts = torch.stack([parts.get(pair.name, _NOTHING[0]) for pair in alike])
        names = [pair.name for pair in alike]
        rows |= zip(names, shards.added_up(of_parts, whole).tolist(), strict=True)
    modules: dict[str, list[list[float]]] = {}
    for name, row in rows.items():
        module, dot, _ = name.partition(".")
        modules.setdefault(module if dot else "", []).append(row)
    return Distance(
        *_roots([*rows.values()]),
        {name: Distance(*_roots(found), {}) for name, found in modules.items()},
    )


def _roots(rows: list[list[float]]) -> tuple[float, float]:
    apart, size = (math.hypot(*(math.sqrt(row[side]) for row in rows)) for side in (0, 1))
    return apart, size
