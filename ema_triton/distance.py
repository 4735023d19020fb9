"""How far the EMA is from the online model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ema_triton.plan import Bucket, Plan


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


def measure(plan: Plan, squares: Callable[[Bucket], Tensor]) -> Distance:
    """Measure all of the plan; waits for the device once.

    Args:
        plan: A plan that is not stale.
        squares: The backend's sums of squares of a bucket's tensors, fp64 [tensors, 2].
    """
    averaged = [bucket for bucket in plan.buckets if bucket.key.scale is not None]
    names = [name for bucket in averaged for name in bucket.names]
    found = [squares(bucket) for bucket in averaged]
    rows = torch.cat([sums.cpu() for sums in found]).tolist() if found else []
    modules: dict[str, list[list[float]]] = {}
    for name, row in zip(names, rows, strict=True):
        module, dot, _ = name.partition(".")
        modules.setdefault(module if dot else "", []).append(row)
    return Distance(*_roots(rows), {name: Distance(*_roots(r), {}) for name, r in modules.items()})


def _roots(rows: list[list[float]]) -> tuple[float, float]:
    apart, size = (math.hypot(*(math.sqrt(row[side]) for row in rows)) for side in (0, 1))
    return apart, size
