"""Exchanging the online and the EMA model's values in place, for an evaluation, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from itertools import accumulate, chain, count
from operator import is_not
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ema_triton.distributed import dtensor
from ema_triton.modules import Slot, renew_caches
from ema_triton.pairing import memory_key, own_copy, quoted
from ema_triton.plan import Launch, Plan


class Swap:
    """The online model has the EMA's values from `enter` to `leave`, at its own addresses.

    Where both sides have one dtype, their values are exchanged, and the residuals of an exact EMA
    stay. Elsewhere, and for the tensors that are copied at each update, the EMA's values are copied
    over the online ones, which wait in a clone.

    Persistent buffers are afterwards what they were. A non-persistent one that changed its shape
    inside, appeared or vanished stays so: it is a cache, and the module counts on it.
    """

    def __init__(self, model: nn.Module, ema_model: nn.Module | None, plan: Plan) -> None:
        self._models = [model] if ema_model is None else [model, ema_model]
        dtensor.reshard_fsdp2(*self._models)
        self._plan = plan
        self._stream = torch.cuda.current_stream() if plan.on_cuda else None
        self._overlap = _overlap(plan.launches)
        self._launches = list[Launch]()  # with values to exchange
        self._copied = list[tuple[Tensor, Tensor]]()  # online tensors, and the EMA's
        for launch in plan.launches:
            one_dtype = launch.kind.dtype == launch.online_dtype
            if one_dtype and launch.dense and not self._overlap:
                self._launches.append(launch)
            else:
                self._copied += zip(launch.sources, launch.targets, strict=True)
        names = {name for launch in self._launches for name in launch.names}
        self._exchanged_pairs = [pair for pair in plan.averaged if pair.name in names]
        self._copied_pairs = [pair for pair in plan.averaged if pair.name not in names]
        self._replaced = list[tuple[Slot, Tensor]]()  # by an EMA tensor of another shape
        for pair in plan.copies.pairs + plan.sync_only:
            slot = pair.online_slots[0]
            online, ema = slot.read(), pair.ema_slots[0].read()
            if online is None or ema is None:
                continue
            self._copied_pairs.append(pair)
            if online.shape == ema.shape:
                self._copied.append((online, ema))
            elif slot.persistent:
                self._replaced.append((slot, ema))
        for online, _ in self._copied:
            if torch._debug_has_internal_overlap(online) == 1:
                raise ValueError(
                    f"An online tensor of shape {tuple(online.shape)} is expanded: several of its "
                    "elements share one place in memory, which cannot hold the EMA's values of all "
                    "of them. Assign a contiguous copy of it to the model before swapping."
                )

    def has_any_of(self, online: Iterable[Tensor | None]) -> bool:
        """Whether the online model of another EMA is, or shares tensors with, this one."""
        own = {id(pair.online) for pair in self._plan.averaged}
        return any(id(tensor) in own for tensor in online)

    def enter(self) -> Swap:
        """Put the EMA's values into the online model; if that fails, restore its own."""
        wholes = [pair.online_slots[0].whole() for pair in self._exchanged_pairs]
        owners = [*chain.from_iterable(map(dtensor.version_owners, wholes))]
        owners += [online for online, _ in self._copied]
        self._owners = tuple(owner for owner in owners if not owner.is_inference())
        self._versions = tuple(owner._version for owner in self._owners)
        self._clones = [online.detach().clone() for online, _ in self._copied]
        self._buffers = [BuffersSnapshot(module) for module in self._models[0].modules()]
        exchanged: list[Launch] = []
        try:
            with torch.no_grad():
                for launch in self._launches:
                    launch.backend.exchange(launch)
                    exchanged.append(launch)
                for online, ema in self._copied:
                    online.detach().copy_(ema)
                for slot, ema in self._replaced:
                    slot.write(own_copy(ema))
                if self._overlap:
                    _check_values(self._plan.launches)
            self._raise_versions()
            self._forget_caches()
        except BaseException:
            self._restore(exchanged)
            raise
        open_swaps.add(self)
        kept = [(pair, pair.online_slots) for pair in self._exchanged_pairs]
        kept += [(pair, pair.ema_slots) for pair in self._plan.averaged]
        copied = [(pair, pair.online_slots) for pair in self._copied_pairs]
        self._kept_snapshots, self._copied_snapshots = (
            [(pair.name, Snapshot(slot)) for pair, slots in of_pairs for slot in slots]
            for of_pairs in (kept, copied)
        )
        self._warning = self._models[0].register_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _warn_of_ema_values
        )
        return self

    def leave(self) -> None:
        """Restore both models, whatever happened to their tensors inside, and warn of writes."""
        # SIGINT may end the swap where FakeTensorMode or another stream is active.
        stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with stream, torch._C._DisableTorchDispatch():
            open_swaps.discard(self)
            self._warning.remove()
            dtensor.reshard_fsdp2(*self._models)  # the gathered values are the EMA's
            modules = {id(m._buffers): m for model in self._models for m in model.modules()}
            changed, lost = (
                {name: None for name, snapshot in snapshots if snapshot.restore(modules)}
                for snapshots in (self._kept_snapshots, self._copied_snapshots)
            )
            self._restore(self._launches)
            self._plan.bump_versions()
            self._forget_caches()
        remarks = []
        if changed:
            remarks.append(
                f"{quoted([*changed])} was written, or replaced, while the models' weights were "
                "swapped (by an optimizer's step, a load_state_dict, a cast?). What was written "
                "into the online model went into the EMA's values, and what was replaced is as "
                "before. Leave the swap before training on."
            )
        if lost:
            place = "in the EMA model: torch.optim.swa_utils.update_bn(loader, ema.ema_model)"
            if len(self._models) == 1:
                place = (
                    "in a copy made inside, as there is no ema_model: "
                    "torch.optim.swa_utils.update_bn(loader, copy.deepcopy(model))"
                )
            remarks.append(
                f"{quoted([*lost])} was written while the models' weights were swapped, and what "
                "was written is lost: the online model has its own values again, from which its "
                f"training goes on. Estimate BatchNorm's statistics for the EMA {place}. If the "
                "model was only left in train mode, call eval() before evaluating it."
            )
        if remarks:
            warnings.warn(" ".join(remarks), UserWarning, stacklevel=4)

    def ema_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """These weights of the EMA, with the exchanged values, which the online model has now."""
        online = {
            name: pair.online.detach() for pair in self._exchanged_pairs for name in pair.names
        }
        return {
            name: dtensor.wrap_like(online[name], value) if name in online else value
            for name, value in weights.items()
        }

    def _restore(self, exchanged: Iterable[Launch]) -> None:
        with torch.no_grad():
            for launch in exchanged:
                launch.backend.exchange(launch)
            for (online, _), clone in zip(self._copied, self._clones, strict=True):
                if online.shape == clone.shape:
                    online.detach().copy_(clone)
        for buffers in self._buffers:
            buffers.restore()
        set_versions(self._owners, self._versions)

    def _raise_versions(self) -> None:
        """Have autograd refuse to mix a graph made outside with the weights inside, or the reverse.

        Versions count writes, and a graph remembers those of the tensors that it saved. Inside they
        are higher than any outside, and higher in each swap than in the one before; afterwards they
        are what they were, as the values are, and a graph made before the swap can be used.
        """
        # By 2**31 at least, which no number of writes reaches, and 2**16 more in each swap, which
        # no number of writes inside one reaches.
        step = 2**31 + next(_swaps) * 2**16 % 2**31
        set_versions(self._owners, tuple((old + step) % 2**32 for old in self._versions))
        self._plan.bump_versions()

    def _forget_caches(self) -> None:
        """Drop what was computed from the weights that were in the online model."""
        torch.clear_autocast_cache()
        renew_caches(self._plan.online_caches)


# Swaps that are entered and not left.
open_swaps: WeakSet[Swap] = WeakSet()

_swaps = count()


def refuse_inside(swap: Swap | None, what: str) -> None:
    """Raise if the EMA's own swap is entered."""
    if swap is not None:
        raise RuntimeError(
            f"{what} while the models' weights are swapped: the online model holds the EMA's. "
            "Leave the context of swapped() (or end the evaluation that attach_swap() belongs "
            "to) first. Nothing was changed."
        )


set_versions = torch._C._autograd._unsafe_set_version_counter


def _overlap(launches: Iterable[Launch]) -> bool:
    """Whether online tensors share memory.

    Exchanged one after the other, such tensors would not come back as they were.
    """
    spans = sorted(
        (source.data_ptr(), source.data_ptr() + _extent(source))
        for launch in launches
        for source in launch.sources
    )
    ends = accumulate((end for _, end in spans), max)
    return any(begin < end for (begin, _), end in zip(spans[1:], ends, strict=False))


def _extent(tensor: Tensor) -> int:
    """Bytes from the beginning of the first element to the end of the last one."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


def _check_values(launches: Iterable[Launch]) -> None:
    """Raise ValueError unless the online tensors, some of which overlap, have the EMA's values."""
    for launch in launches:
        for name, online, ema in zip(launch.names, launch.sources, launch.targets, strict=True):
            if not torch.equal(online.nan_to_num(), ema.to(online.dtype).nan_to_num()):
                raise ValueError(
                    f"'{name}' shares its memory with another tensor of the online model, but "
                    "not its values with that one's in the EMA model, so the online model "
                    "cannot hold both. Tie them before building the EMA, or evaluate ema_model."
                )


def _warn_of_ema_values(module: nn.Module, prefix: str, keep_vars: bool) -> None:  # noqa: ARG001
    warnings.warn(
        "The online model's state_dict() was called while it holds the EMA's weights. A checkpoint "
        "of the training made from it would resume from those. Save it outside of swapped(); the "
        "EMA's weights are in ema.state_dict().",
        UserWarning,
        stacklevel=3,
    )


class Snapshot:
    """The tensor in a slot, its memory and the number of writes, to be restored."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._tensor: Any = slot.whole()
        self._part: Tensor = dtensor.local_part(self._tensor)
        self._data = self._part.detach()
        # A batch norm's kernel writes its running statistics without counting it as a write.
        batches = slot.owner.get("num_batches_tracked") if slot.is_buffer else None
        self._counted = [self._tensor] if batches is None else [self._tensor, batches]
        self._versions = [*map(dtensor.version, self._counted)]

    def restore(self, modules: Mapping[int, nn.Module]) -> bool:
        """Restore the slot; whether to warn that its tensor was written or replaced.

        Not of a cache: a buffer that is not persistent, or has changed its shape. Nor of what a
        module writes in eval mode.

        Args:
            modules: By the id of the buffers that they own.
        """
        slot, now = self._slot, self._slot.read()
        reshaped = slot.is_buffer and (now is None or now.shape != self._data.shape)
        if reshaped and not slot.persistent:
            return False
        changed = [*map(dtensor.version, self._counted)] != self._versions
        if (
            slot.whole() is not self._tensor
            or dtensor.local_part(self._tensor) is not self._part
            or memory_key(self._part) != memory_key(self._data)
        ):
            changed = True
            slot.owner[slot.key] = self._tensor
            if self._part is not self._tensor:
                self._tensor._local_tensor = self._part
            self._part.data = self._data
        module = modules.get(id(slot.owner))
        # A batch norm writes in train mode only, in which update_bn() has it for a while.
        in_train_mode = module is None or module.training or isinstance(module, _NormBase)
        return changed and slot.persistent and in_train_mode and not reshaped


class BuffersSnapshot:
    """The persistent buffers of a module, to be restored in their order."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._before = module, dict(module._buffers)
        self._own = module._non_persistent_buffers_set.copy()

    def restore(self) -> None:
        """Take out what appeared, and put back what vanished or was replaced."""
        buffers, before = self._module._buffers, self._before
        if [*buffers] == [*before] and not any(map(is_not, buffers.values(), before.values())):
            return
        persistent = {key: buffer for key, buffer in before.items() if key not in self._own}
        own = self._module._non_persistent_buffers_set
        own -= persistent.keys()
        restored = {key: buffer for key, buffer in buffers.items() if key in own} | persistent
        buffers.clear()
        buffers |= {key: restored[key] for key in before if key in restored} | restored
