"""A model's slots, by name; and a model unwrapped, checked and copied."""

from __future__ import annotations

import copy
import sys
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ema_triton.distributed import dtensor


class Slot(NamedTuple):
    """Where a tensor lives: the `_parameters` or `_buffers` that own it, and its key in them."""

    owner: dict[str, Tensor | None]
    key: str
    is_buffer: bool
    persistent: bool

    def whole(self) -> Tensor | None:
        """The tensor that is there now, a sharded one as its `DTensor`."""
        return self.owner.get(self.key)

    def read(self) -> Tensor | None:
        """The same; this rank's part of a sharded one."""
        return dtensor.local_part(self.whole())  # type: ignore[no-any-return]

    def write(self, tensor: Tensor, like: Tensor | None = None) -> None:
        """Put it there, sharded as the tensor there is, or as `like` if there is none."""
        whole = self.whole()
        if whole is None or dtensor.local_part(whole) is not tensor or whole.dtype != tensor.dtype:
            self.owner[self.key] = dtensor.wrap_like(tensor, like if whole is None else whole)


# By clean name, with one slot for each name of a tied tensor. The tensor may be None.
Slots = dict[str, Slot]


def slots_of(model: nn.Module) -> Slots:
    """The slots of a model's parameters and buffers, in the order of its state dict."""
    return {
        clean_name(f"{prefix}.{key}" if prefix else key): Slot(
            owner, key, is_buffer, key not in module._non_persistent_buffers_set
        )
        for prefix, module in model.named_modules(remove_duplicate=False)
        for owner, is_buffer in ((module._parameters, False), (module._buffers, True))
        for key in owner
    }


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


def with_caches(model: nn.Module | None) -> list[nn.Module]:
    """The modules that override `train`, as those do that cache in eval mode what they computed."""
    modules = [] if model is None else [*model.modules()]
    return [module for module in modules if type(module).train is not nn.Module.train]


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


def copy_model(model: nn.Module, tensors: Mapping[Tensor | None, Tensor | None]) -> nn.Module:
    """A deep copy with all torch.compile wrappers taken off, so that names are clean.

    Args:
        model: The model.
        tensors: From the model's tensors to those that the copy has in their place. Subclasses of
            Tensor are left to their own `__deepcopy__`.

    Raises:
        RuntimeError: The model cannot be copied.
    """
    memo: dict[int, Any] = {
        id(own): other for own, other in tensors.items() if type(own) in (nn.Parameter, Tensor)
    }
    try:
        for module in reversed([*model.modules()]):  # inner ones first
            if isinstance(compiled := getattr(module, "_orig_mod", None), nn.Module):
                memo[id(module)] = copy.deepcopy(compiled, memo)
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise RuntimeError(
            f"The model cannot be copied to make an EMA model ({error}). Often a module has an "
            "attribute that is a computed tensor (after a forward pass, by pruning, by the old "
            "weight_norm): build the EMA before, or give an ema_model, another instance of the "
            "model."
        ) from error
