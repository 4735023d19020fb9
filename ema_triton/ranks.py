"""Full state dicts of sharded models: gathered on rank 0, and spread from there.

These are collectives. Building an EMA and updating it are none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ema_triton import shards
from ema_triton.pairs import renamed

T = TypeVar("T")


def is_first() -> bool:
    """Whether this is rank 0, or the only process."""
    return not _in_group() or dist.get_rank() == 0


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, where alone it is called, or raises there; on every rank."""
    if not _in_group():
        return make()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = make()
        except Exception as error:  # which the others wait for
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def gathered(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The whole tensors, copied to the CPU of rank 0, one after the other; elsewhere nothing."""

    def whole(_: str, value: Any) -> Any:  # noqa: ANN401
        if shards.is_sharded(value):
            value = shards.gathered(value)
        if not is_first():
            return None
        return value.to("cpu", copy=True) if isinstance(value, Tensor) else value

    found = renamed(tensors, value=whole)
    return found if is_first() else {}


def hollow(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same with tensors that have no values."""
    return renamed(tensors, value=lambda _, v: v.to("meta") if isinstance(v, Tensor) else v)


def spread(
    hollows: Mapping[str, Any], tensors: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """The parts of rank 0's whole `tensors`, sharded as `own`; the other ranks' are not looked at.

    Args:
        hollows: What rank 0 has, without values.
        tensors: With values, on rank 0.
        own: What they are for, by the same names.
    """

    def part(name: str, value: Any) -> Any:  # noqa: ANN401
        if not isinstance(value, Tensor):
            return value
        mine = own[name]  # a module's extra state may be a tensor there and something else here
        device = shards.local(mine).device if isinstance(mine, Tensor) else None
        whole = torch.empty(value.shape, dtype=value.dtype, device=device)
        if is_first():
            whole.copy_(tensors[name])
        if _in_group():
            dist.broadcast(whole.view(-1).view(torch.uint8), 0)
        return shards.like(shards.part_of(whole, mine).clone(), mine)

    return renamed(hollows, value=part)
