"""Full state dicts of sharded models: gathered on rank 0, and spread from there.

These are collectives. Building an EMA and updating it are none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ema_triton.distributed import dtensor

T = TypeVar("T")


def is_rank0() -> bool:
    """Whether this is rank 0, or the only process."""
    return not _in_group() or dist.get_rank() == 0


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def on_rank0(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, where alone it is called, or raises there; on every rank."""
    if not _in_group():
        return make()
    outcome: list[Any] = [None, None]
    if is_rank0():
        try:
            outcome[0] = make()
        except Exception as error:  # which the others wait for
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def gather_on_rank0(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, copied to the CPU of rank 0, one after the other; elsewhere nothing."""
    found = {}
    for name, value in tensors.items():
        whole = dtensor.full_tensor(value) if dtensor.is_sharded(value) else value
        if is_rank0():
            found[name] = whole.to("cpu", copy=True)
    return found


def to_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with tensors that have no values."""
    return {name: value.to("meta") for name, value in tensors.items()}


def scatter_from_rank0(
    hollows: Mapping[str, Tensor], tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The parts of rank 0's whole `tensors`, sharded as `own`; the other ranks' are not looked at.

    Args:
        hollows: What rank 0 has, without values.
        tensors: With values, on rank 0.
        own: What they are for, by the same names.
    """
    found = {}
    for name, value in hollows.items():
        device = dtensor.local_part(own[name]).device
        whole = torch.empty(value.shape, dtype=value.dtype, device=device)
        if is_rank0():
            whole.copy_(tensors[name])
        if _in_group():
            dist.broadcast(whole.view(-1).view(torch.uint8), 0)
        found[name] = dtensor.wrap_like(dtensor.shard_like(whole, own[name]).clone(), own[name])
    return found
