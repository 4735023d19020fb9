"""What goes between the ranks of a training, none of it in the update of a sharded model.

The ranks make sure that they have the same model, gather a state on rank 0 and spread it from
there, and follow rank 0's buffers as `DistributedDataParallel` does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_triton import shards
from ema_triton.pairs import Slots, listed

T = TypeVar("T")

# How long the ranks wait for each other's ModelEMA. Not a collective: where a rank builds none,
# that would wait for as long as the process group allows, or meet another collective half-way.
PATIENCE = timedelta(minutes=5)

_meetings: Counter[str] = Counter()


def buffers_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks among which a `DistributedDataParallel` model's buffers follow the first's."""
    while not isinstance(model, nn.parallel.DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    group: dist.ProcessGroup = model.process_group
    followed = model.broadcast_buffers and any(True for _ in model.buffers())
    return group if followed and dist.get_world_size(group) > 1 else None


def ranks_of(model: nn.Module, group: dist.ProcessGroup | None) -> list[int]:
    """The ranks that have the model's EMA together: those of its shards, or of the group."""
    ranks = set(dist.get_process_group_ranks(group)) if group is not None else set()
    for tensor in (*model.parameters(), *model.buffers()):
        if shards.is_sharded(tensor):
            mesh: Any = tensor
            ranks |= set(mesh.device_mesh.mesh.flatten().tolist())
    return sorted(ranks)


def agree(model: nn.Module, ranks: Sequence[int]) -> None:
    """Make sure that all of these ranks have the same tensors.

    Args:
        model: The online model.
        ranks: This one among them. Each has to call this, as often as the others.

    Raises:
        ValueError: They do not; on every rank.
        RuntimeError: Not all of them came.
    """
    if dist.get_backend() == "fake":
        return  # nobody is there, in an estimate of memory
    me, leader = dist.get_rank(), ranks[0]
    mine = _described(model)
    digest = hashlib.sha256(json.dumps(mine).encode()).hexdigest()
    place = "-".join(map(str, ranks)) if len(ranks) < 9 else f"{leader}-{ranks[-1]}-{len(ranks)}"
    _meetings[place] += 1
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    # Ranks that torchrun started again find the store as they left it.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"ema_triton/{start}/{place}/{_meetings[place]}"
    store = PrefixStore(key, _get_default_store())
    try:
        if me == leader:
            store.set("names", json.dumps(mine))
            store.set("digest", digest)
        else:
            store.wait(["digest"], PATIENCE)
            same = store.get("digest").decode() == digest
            theirs = mine if same else json.loads(store.get("names"))
            store.set(str(me), "" if same else _difference(me, mine, leader, theirs))
        if me == leader:
            others = [str(rank) for rank in ranks[1:]]
            store.wait(others, PATIENCE)
            complaints = [complaint.decode() for complaint in store.multi_get(others)]
            store.set("verdict", next(filter(None, complaints), ""))
        store.wait(["verdict"], PATIENCE)
    except RuntimeError as error:  # of stores, each has its own
        raise RuntimeError(
            f"Rank {me} waited for the other ranks of {[*ranks][:8]} to build this EMA, up to "
            f"{PATIENCE} ({error}). An EMA of a sharded model, or of a DistributedDataParallel one "
            "with buffers, is built on every rank. To have it on one rank only, give the module "
            "inside of DistributedDataParallel (model.module)."
        ) from error
    if verdict := store.get("verdict").decode():
        raise ValueError(verdict)


def _described(model: nn.Module) -> dict[str, str]:
    slots = Slots.of(model)
    found = {}
    for name, slot in (slots.parameters | slots.buffers).items():
        tensor = slot.whole()
        if tensor is not None and name not in slots.caches:
            found[name] = f"{tuple(tensor.shape)} {tensor.dtype}, {shards.described(tensor)}"
    return found


def _difference(me: int, mine: Mapping[str, str], leader: int, theirs: Mapping[str, str]) -> str:
    found = []
    if missing := [name for name in theirs if name not in mine]:
        found.append(f"rank {me} lacks {listed(missing)}")
    if missing := [name for name in mine if name not in theirs]:
        found.append(f"rank {leader} lacks {listed(missing)}")
    if unlike := [name for name in mine if name in theirs and mine[name] != theirs[name]]:
        name = unlike[0]
        found.append(
            f"{listed(unlike)} differ, '{name}' being {mine[name]} on rank {me} and {theirs[name]} "
            f"on rank {leader}"
        )
    # Only the order is another one, in which collectives would meet the wrong partner.
    what = "; ".join(found) or f"ranks {leader} and {me} have their tensors in different orders"
    return (
        f"The ranks do not have the same model: {what}. Their EMAs could not be saved, nor "
        "evaluated, together. Build the model alike on every rank."
    )


def follow_first(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Give these tensors the values that they have on the group's first rank."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    source = dist.get_global_rank(group, 0)
    for alike in by_kind.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        dist.broadcast(flat.view(torch.uint8), source, group)  # NCCL knows no int16
        parts = torch.split(flat, [tensor.numel() for tensor in alike])
        torch._foreach_copy_(
            [*alike], [part.view(t.shape) for part, t in zip(parts, alike, strict=True)]
        )


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


def gathered(tensors: Mapping[str, Any]) -> Any:  # noqa: ANN401  # an OrderedDict with _metadata
    """The whole tensors, copied to the CPU of rank 0, one after the other; elsewhere nothing."""
    found: Any = OrderedDict()
    for name, value in tensors.items():
        whole = value
        if shards.is_sharded(value):
            whole = shards.gathered(value)
        if is_first():
            found[name] = whole.to("cpu", copy=True) if isinstance(whole, Tensor) else whole
    found._metadata = getattr(tensors, "_metadata", None)
    return found


def hollow(tensors: Mapping[str, Any]) -> Any:  # noqa: ANN401  # likewise
    """The same with tensors that have no values."""
    found: Any = OrderedDict(
        (name, value.to("meta") if isinstance(value, Tensor) else value)
        for name, value in tensors.items()
    )
    found._metadata = getattr(tensors, "_metadata", None)
    return found


def spread(hollows: Mapping[str, Any], tensors: Mapping[str, Any], own: Mapping[str, Any]) -> Any:  # noqa: ANN401  # likewise
    """The parts of rank 0's whole `tensors`, sharded as `own`; the other ranks' are not looked at.

    Args:
        hollows: What rank 0 has, without values.
        tensors: With values, on rank 0.
        own: What they are for, by the same names.
    """
    found: Any = OrderedDict()
    for name, value in hollows.items():
        if not isinstance(value, Tensor):
            found[name] = value
            continue
        mine = own[name]  # a module's extra state may be a tensor there and something else here
        device = shards.local(mine).device if isinstance(mine, Tensor) else None
        whole = torch.empty(value.shape, dtype=value.dtype, device=device)
        if is_first():
            whole.copy_(tensors[name])
        if _in_group():
            dist.broadcast(whole.view(-1).view(torch.uint8), 0)
        found[name] = shards.like(shards.part_of(whole, mine).clone(), mine)
    found._metadata = getattr(hollows, "_metadata", None)
    return found
