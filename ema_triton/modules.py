"""A model's slots, by name; and a model unwrapped and checked."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ema_triton.distributed import dtensor


class Slot(NamedTuple):
    """Where a tensor lives: the `_parameters` or `_buffers` that own it, and its key in them.

    `copied_only` says of a buffer that its average means nothing.
    """

    owner: dict[str, Tensor | None]
    key: str
    is_buffer: bool
    persistent: bool
    copied_only: bool = False

    def whole(self) -> Tensor | None:
        """The tensor that is there now, a sharded one as its `DTensor`."""
        return self.owner.get(self.key)

    def read(self) -> Tensor | None:
        """The same; this rank's part of a sharded one."""
        return dtensor.local_part(self.whole())  # type: ignore[no-any-return]

    def write(self, tensor: Tensor, like: Tensor | None = None) -> None:
        """Put it there, sharded as `like`, or as the tensor there is if that is None."""
        whole = self.whole()
        if whole is None or dtensor.local_part(whole) is not tensor or whole.dtype != tensor.dtype:
            self.owner[self.key] = dtensor.wrap_like(tensor, whole if like is None else like)


# By clean name, with one slot for each name of a tied tensor. The tensor may be None.
Slots = dict[str, Slot]


def slots_of(model: nn.Module) -> Slots:
    """The slots of a model's parameters and buffers, in the order of its state dict."""
    return {
        clean_name(f"{prefix}.{key}" if prefix else key): Slot(
            owner, key, is_buffer, key not in module._non_persistent_buffers_set, key in copied_only
        )
        for prefix, module in model.named_modules(remove_duplicate=False)
        for copied_only in [_copied_only(module)]
        for owner, is_buffer in ((module._parameters, False), (module._buffers, True))
        for key in owner
    }


def _copied_only(module: nn.Module) -> set[str]:
    """The keys of buffers that are no running statistics.

    Averaged, unit vectors of spectral norm are shorter than 1, and divide the weight by too little;
    and a mask of pruning prunes a part of a weight.
    """
    if isinstance(module, _SpectralNorm):
        return {"_u", "_v"}
    keys: set[str] = set()
    # Via sys.modules, not to import it: where a module is pruned, it is imported.
    prune = sys.modules.get("torch.nn.utils.prune")
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            keys |= {f"{hook.name}_u", f"{hook.name}_v"}
        elif prune and isinstance(hook, prune.BasePruningMethod):
            keys.add(f"{hook._tensor_name}_mask")
    return keys


def empty_slots(online: Slots, left_out: Container[str], *, non_persistent: bool) -> Slots:
    """Slots for an EMA without a module: all in one dict by name, and without tensors yet.

    Args:
        online: The online model's slots.
        left_out: Names of tensors that the EMA does not hold.
        non_persistent: Whether it holds non-persistent buffers.
    """
    tensors: dict[str, Tensor | None] = {}
    return {
        name: slot._replace(owner=tensors, key=name)
        for name, slot in online.items()
        if name not in left_out and (slot.persistent or non_persistent)
    }


def add_vacant(slots: Slots, model: nn.Module | None, other: Slots) -> Slots:
    """The slots, and a vacant one for each persistent buffer that only another model has.

    Args:
        slots: Of a model.
        model: The model; there is no slot where it lacks the buffer's module. None: the slots are
            in one dict by name.
        other: The other model's slots.
    """
    missing = {
        name: slot
        for name, slot in other.items()
        if name not in slots and slot.is_buffer and slot.persistent
    }
    if not missing:
        return slots
    if model is None:
        own = next((slot.owner for slot in slots.values()), {})
        return slots | {name: slot._replace(owner=own, key=name) for name, slot in missing.items()}
    modules = {clean_name(n): module for n, module in model.named_modules(remove_duplicate=False)}
    return slots | {
        name: missing[name]._replace(owner=modules[prefix]._buffers, key=key)
        for name in missing
        for prefix, _, key in [name.rpartition(".")]
        if prefix in modules
    }


def are_sharded(slots: Slots) -> bool:
    """Whether any of the tensors is sharded."""
    return any(dtensor.is_sharded(slot.whole()) for slot in slots.values())


# Parts of names that torch.compile and activation checkpointing's checkpoint_wrapper insert.
WRAPPER_NAMES = ("_orig_mod", "_checkpoint_wrapped_module")


def clean_name(name: str) -> str:
    """The name without the parts that wrappers inside the model insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)


def clean_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """A module's state dict by clean name, without extra state."""
    return {
        clean_name(name): value
        for name, value in state.items()
        if name.rpartition(".")[2] != "_extra_state"
    }


def unwrap(model: nn.Module) -> nn.Module:
    """Take off DistributedDataParallel and torch.compile wrappers, however nested."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrap(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return unwrap(compiled) if isinstance(compiled, nn.Module) else model


def submodule_of(model: nn.Module, name: str) -> nn.Module:
    """The part of a model with this name, unwrapped; the model if the name is empty.

    Raises:
        ValueError: There is no module of this name.
    """
    try:
        return unwrap(model.get_submodule(name))
    except AttributeError as error:
        parts = ", ".join(repr(part) for part, _ in model.named_children())
        raise ValueError(
            f"submodule={name!r} is no module of {type(model).__name__}, whose parts are {parts}. "
            "Give one of these, or a part of one by its name in named_modules()."
        ) from error


def with_caches(model: nn.Module) -> list[nn.Module]:
    """The modules that override `train`, as those do that cache in eval mode what they computed."""
    return [one for one in model.modules() if type(one).train is not nn.Module.train]


def renew_caches(modules: Iterable[nn.Module]) -> None:
    """Have modules drop what they cached from weights that have changed since.

    LeViT's attention, for example, gathers its biases in `train(False)`, and drops them in
    `train(True)`. Afterwards all submodules are in the mode in which they were.
    """
    for module in modules:
        modes = [(submodule, submodule.training) for submodule in module.modules()]
        mode = module.training
        module.train(True)
        module.train(mode)
        for submodule, training in modes:
            submodule.training = training


def set_apart(ema_model: nn.Module, model: nn.Module, *, training: bool) -> None:
    """Have an EMA model need no gradients, and set its mode; what it shares stays as it is.

    Args:
        ema_model: The EMA model.
        model: The online model, of which it may have parameters and modules.
        training: Whether it is in train mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    online = {id(parameter) for parameter in model.parameters()}
    for parameter in ema_model.parameters():
        if id(parameter) not in online:
            parameter.requires_grad_(False)
    ema_model.train(training)
    for module, mode in modes:
        module.training = mode


def check_model(model: object) -> None:
    """Raise unless it is a module whose tensors Python can reach, with their shapes and values."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            "model should be an instance of nn.Module or its subclasses, but got "
            f"{type(model).__name__}. Pass the model whose weights are to be averaged."
        )
    # Via sys.modules, not to import it: where there is a model of this kind, it is imported.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules():
        which = f"module {name!r}" if name else "the model"
        if fsdp and isinstance(module, fsdp.FullyShardedDataParallel):
            raise NotImplementedError(
                f"{which} is sharded by FullyShardedDataParallel (FSDP1), whose parameters have "
                "their shapes during its forward only. Shard the model by "
                "torch.distributed.fsdp.fully_shard (FSDP2), where they always have them."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise NotImplementedError(
                f"{which} is a TorchScript module, whose tensors Python cannot reach. Build the "
                "EMA of the Python module, and script its ema_model if need be."
            )
    dtensor.reshard_fsdp2(model)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise NotImplementedError(
                f"'{name}' is partitioned by DeepSpeed's ZeRO-3, which keeps its values in places "
                "of its own. Train with ZeRO stage 1 or 2, whose parameters are whole, or shard "
                "the model by torch.distributed.fsdp.fully_shard (FSDP2)."
            )
        if any(placement.is_partial() for placement in getattr(parameter, "placements", ())):
            raise ValueError(
                f"'{name}' is {dtensor.describe(parameter)}: its values are sums over the ranks, "
                "which have to be made before they are averaged. Call redistribute() on it first."
            )
