"""Noticing that a plan is stale: what lay where when it was made, and what lies there now.

It is looked at before every update, so it is made of passes that stay in C.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, repeat, starmap
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

from ema_triton.distributed import dtensor
from ema_triton.pairing import Pair


@dataclass(frozen=True, eq=False)
class Staleness:
    """Notices that an averaged tensor or a module was replaced, moved, cast, reshaped or added.

    Addresses tell, because the plan keeps every storage alive; sizes, strides and conjugation are
    for a view put in its tensor's place, which may have the tensor's address; EMA tensors are
    written, and so have to be the very ones. What is not looked at, for 0.1 ms per 1000 tensors:
    the strides of vectors, and strides of EMA tensors that stay at their address.
    """

    owners: list[dict[str, Any]]
    keys: list[str]
    addresses: list[int]
    sizes: list[int]
    strides: list[tuple[int, ...]]
    ema: list[Tensor]
    complex: list[tuple[dict[str, Any], str]]
    containers: list[dict[str, Any]]
    children: list[Any]
    empty: list[dict[str, Any]]
    vacant: list[tuple[dict[str, Any], str]]
    counted: list[dict[str, Any]]
    counts: list[int]
    sharded: list[bool]  # by slot; empty if none is

    @classmethod
    def unknown(cls) -> Staleness:
        """One that finds whatever there is stale."""
        return cls([{}], ["nothing"], [], [], [], [], [], [], [], [], [], [], [], [])

    @classmethod
    def over(cls, model: nn.Module, ema_model: nn.Module | None, pairs: list[Pair]) -> Staleness:
        """Remember the models and the pairs' tensors as they are now."""
        modules = [*model.modules()]
        ema_modules = [] if ema_model is None else ema_model.modules()
        containers = [module._modules for module in [*modules, *ema_modules]]
        owners = [owner for m in modules for owner in (m._parameters, m._buffers)]
        counted = [owner for owner in owners if owner]
        # The online tensors first, those with strides to compare leading: a dense vector has one
        # stride only, and most tensors are vectors.
        matrices = [pair for pair in pairs if pair.online.dim() > 1]
        vectors = [pair for pair in pairs if pair.online.dim() <= 1]
        strided = [slot for pair in matrices for slot in pair.online_slots]
        online = strided + [slot for pair in vectors for slot in pair.online_slots]
        slots = online + [slot for pair in pairs for slot in pair.ema_slots]
        tensors: list[Any] = [slot.read() for slot in slots]
        sharded = [dtensor.is_sharded(slot.whole()) for slot in slots]
        return cls(
            owners=[slot.owner for slot in slots],
            keys=[slot.key for slot in slots],
            addresses=[*map(Tensor.data_ptr, tensors)],
            sizes=[*map(Tensor.numel, tensors[: len(online)])],
            strides=[*map(Tensor.stride, tensors[: len(strided)])],
            ema=tensors[len(online) :],
            complex=[
                (slot.owner, slot.key)
                for slot, tensor in zip(slots, tensors, strict=True)
                if tensor.is_complex()
            ],
            containers=[owner for owner in containers if owner],
            children=_contents([owner for owner in containers if owner]),
            empty=[
                *(owner for owner in owners if not owner),
                *(module._modules for module in modules if not module._modules),
            ],
            vacant=[(owner, key) for owner in counted for key in owner if owner[key] is None],
            counted=counted,
            counts=[*map(len, counted)],
            sharded=sharded if any(sharded) else [],
        )

    def is_stale(self) -> bool:
        """Whether anything differs from what was remembered."""
        try:
            tensors = [*map(getitem, self.owners, self.keys)]
            if self.sharded:
                tensors = [
                    tensor._local_tensor if sharded else tensor
                    for tensor, sharded in zip(tensors, self.sharded, strict=True)
                ]
            return (
                [*map(Tensor.data_ptr, tensors)] != self.addresses
                or [*map(Tensor.numel, tensors[: len(self.sizes)])] != self.sizes
                or [*map(Tensor.stride, tensors[: len(self.strides)])] != self.strides
                or not all(map(is_, tensors[len(self.sizes) :], self.ema))
                or any(map(_is_conj, starmap(getitem, self.complex)))
                or _contents(self.containers) != self.children
                or any(self.empty)
                or not all(map(is_, starmap(getitem, self.vacant), repeat(None)))
                or [*map(len, self.counted)] != self.counts
            )
        # It vanished, is None, has no address, or is no longer sharded.
        except (KeyError, TypeError, RuntimeError, AttributeError):
            return True


_is_conj: Callable[[Any], bool] = Tensor.is_conj


def _contents(owners: list[dict[str, Any]]) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, owners))]


@dataclass(frozen=True, eq=False)
class Copies:
    """The tensors that are copied at every update, each into an EMA tensor of its own.

    Modules assign buffers anew as a matter of course (`self.count = self.count + 1`), so the online
    ones are read from their slots every time. Those of one kind are a run, side by side: on CUDA
    `torch._foreach_copy_` copies a list of one dtype in a launch, but a mixed one tensor by tensor,
    which are 159 launches for ResNet-50's means, variances and counts.
    """

    owners: list[dict[str, Any]]
    keys: list[str]
    sizes: list[torch.Size]
    kinds: list[tuple[Any, ...]]
    ema_owners: list[dict[str, Any]]
    ema_keys: list[str]
    ema: list[Tensor]
    runs: list[slice]
    sharded: bool

    @classmethod
    def of(cls, pairs: list[Pair]) -> Copies:
        """The copies of these pairs, with one slot each."""
        pairs = sorted(pairs, key=_run)
        ends = [*accumulate(len([*run]) for _, run in groupby(pairs, _run))]
        return cls(
            owners=[pair.online_slots[0].owner for pair in pairs],
            keys=[pair.online_slots[0].key for pair in pairs],
            sizes=[pair.online.size() for pair in pairs],
            kinds=[_kind(pair.online) for pair in pairs],
            ema_owners=[pair.ema_slots[0].owner for pair in pairs],
            ema_keys=[pair.ema_slots[0].key for pair in pairs],
            ema=[pair.ema for pair in pairs],
            runs=[*map(slice, [0, *ends], ends)],
            sharded=any(
                dtensor.is_sharded(slot.whole())
                for pair in pairs
                for slot in (pair.online_slots[0], pair.ema_slots[0])
            ),
        )

    def read(self) -> list[Tensor] | None:
        """The online tensors as they are now; None if anything does not fit the plan any more."""
        try:
            online = [*map(getitem, self.owners, self.keys)]
            ema = [*map(getitem, self.ema_owners, self.ema_keys)]
            if self.sharded:
                online, ema = [*map(dtensor.local_part, online)], [*map(dtensor.local_part, ema)]
            if (
                [*map(Tensor.size, online)] == self.sizes
                and [*map(_kind, online)] == self.kinds
                and all(map(is_, ema, self.ema))
            ):
                return online
        except (AttributeError, KeyError, TypeError):  # vanished, or None
            pass
        return None

    def write(self, online: list[Tensor]) -> None:
        """Copy what `read` returned into the EMA tensors."""
        for run in self.runs:
            torch._foreach_copy_(self.ema[run], online[run])


_kind = attrgetter("dtype", "device", "layout")


def _run(pair: Pair) -> tuple[Any, ...]:
    online, ema = pair.online, pair.ema
    alike = online.stride() == ema.stride()
    return str(online.dtype), str(ema.dtype), str(online.device), str(ema.device), alike
