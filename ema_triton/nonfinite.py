"""Telling of the non-finite values that an EMA was spared, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ema_triton.plan import Plan


class Alarm:
    """Knows how many there were, one update late on a GPU.

    After each update the counts start on their way to the host; before the next they have arrived,
    as the update itself has ended.
    """

    def __init__(self, known: int = 0) -> None:
        self._known = known
        self._before = 0
        self._coming: list[Tensor] = []
        self._events: list[torch.cuda.Event] = []

    def ask(self, plan: Plan) -> None:
        """Have the counts of this plan brought over, after an update."""
        self._before = plan.nonfinite
        self._coming, self._events = [], []
        for count in plan.counts():
            if count.device.type != "cuda":
                self._coming.append(count)
                continue
            here = torch.empty((), dtype=count.dtype, pin_memory=True)
            with torch.cuda.device(count.device):
                self._coming.append(here.copy_(count, non_blocking=True))
                self._events.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
                self._events[-1].record()

    def take(self) -> int:
        """How many there were since the last call, up to the update that was asked about."""
        if not self._coming:
            return 0
        for event in self._events:
            event.synchronize()
        total = self._before + sum(map(int, self._coming))
        new, self._known = total - self._known, total
        self._coming, self._events = [], []
        return new


def complaint(plan: Plan, count: int, update_index: int) -> FloatingPointError:
    """The error for so many of them; it names tensors that are not finite now."""
    names = [
        name
        for bucket in plan.buckets
        for name, source in zip(bucket.names, bucket.sources, strict=True)
        if bucket.counters is not None and not bool(torch.isfinite(source).all())
    ]
    elements = "1 element of the online model was"
    if count != 1:
        elements = f"{count} elements of the online model were"
    where = f", such as in {', '.join(map(repr, names[:3]))}" if names else ""
    return FloatingPointError(
        f"{elements} NaN or Inf, or too large for the EMA's dtype, at update "
        f"{update_index}{where}. The EMA has kept its old values there. Look for the cause "
        "(learning rate, loss scale, data) and load a sound checkpoint, or go on with "
        "nonfinite='skip'."
    )
