"""Models as they are handed over: unwrapped, checked, copied."""

from __future__ import annotations

import copy
import sys
from collections.abc import Container, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ema_triton.distributed import dtensor


def unwrap(model: nn.Module) -> nn.Module:
    """Take off DistributedDataParallel and torch.compile wrappers, however nested."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def copy_model(model: nn.Module, tensors: Mapping[Tensor | None, Tensor | None]) -> nn.Module:
    """A deep copy with torch.compile wrappers taken off, inside too, so that names are clean.

    Args:
        model: The model.
        tensors: Of tensors of the model, what the copy has instead. Tensors of kinds of their own
            are left to their own `__deepcopy__`.

    Raises:
        RuntimeError: It cannot be copied.
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
            f"The model cannot be copied to make an EMA model ({error}). Often a tensor that was "
            "computed, and not a parameter, is an attribute of a module (after a forward pass, by "
            "pruning, by the old weight_norm): build the EMA before, or give an ema_model, another "
            "instance of the model."
        ) from error


def check_model(model: object) -> None:
    """Raise unless it is a module whose tensors are in Python's reach."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            "model should be an instance of nn.Module or its subclasses, but got "
            f"{type(model).__name__}. Pass the model whose weights are to be averaged."
        )
    # Via sys.modules: a model of this kind exists only where this is imported.
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
                f"{which} is a TorchScript module, which keeps its tensors out of Python's reach. "
                "Build the EMA of the Python module, and script its ema_model if need be."
            )
    dtensor.reshard(model)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise NotImplementedError(
                f"'{name}' is partitioned by DeepSpeed's ZeRO-3, which keeps its values in places "
                "of its own. Train with ZeRO stage 1 or 2, whose parameters are whole, or shard "
                "the model by torch.distributed.fsdp.fully_shard (FSDP2)."
            )
        if dtensor.is_sharded(parameter) and any(
            placement.is_partial() for placement in cast(Any, parameter).placements
        ):
            raise ValueError(
                f"'{name}' is {dtensor.describe(parameter)}: its values are sums over the ranks, "
                "which have to be made before they are averaged. Call redistribute() on it first."
            )


class Slot(NamedTuple):
    """Where a tensor lives: its module's `_parameters` or `_buffers`, and the key in it."""

    owner: dict[str, Tensor | None]
    key: str
    is_buffer: bool
    persistent: bool

    def read(self) -> Tensor | None:
        """The tensor that is there now, also after it was replaced; of a sharded one, its part."""
        return dtensor.local_part(self.whole())  # type: ignore[no-any-return]

    def whole(self) -> Tensor | None:
        """The same, sharded or not."""
        return self.owner.get(self.key)

    def write(self, tensor: Tensor, like: Tensor | None = None) -> None:
        """Put it there, sharded as what is there, or as `like` if nothing is."""
        whole = like if self.whole() is None else self.whole()
        if dtensor.local_part(whole) is not tensor or (
            whole is not None and whole.dtype != tensor.dtype
        ):
            self.owner[self.key] = dtensor.wrap_like(tensor, whole)

    @property
    def place(self) -> tuple[int, str]:
        """Tells slots apart; equal for two names of one module."""
        return id(self.owner), self.key


# By clean name, a tied tensor under each of its names; some may hold None, for now.
Slots = dict[str, Slot]


def slots_of(model: nn.Module) -> Slots:
    """Where a model's parameters and buffers live, in the order of its state dict."""
    return {
        clean_name(f"{prefix}.{key}" if prefix else key): Slot(
            owner, key, is_buffer, key not in module._non_persistent_buffers_set
        )
        for prefix, module in model.named_modules(remove_duplicate=False)
        for owner, is_buffer in ((module._parameters, False), (module._buffers, True))
        for key in owner
    }


def empty_slots(online: Slots, left_out: Container[str], *, non_persistent: bool) -> Slots:
    """Slots for the EMA of these online tensors, in a dict by name, with nothing in them yet.

    Args:
        online: The online model's slots.
        left_out: Names of what the EMA does not hold.
        non_persistent: Whether it holds non-persistent buffers.
    """
    tensors: dict[str, Tensor | None] = {}
    return {
        name: slot._replace(owner=tensors, key=name)
        for name, slot in online.items()
        if name not in left_out and (slot.persistent or non_persistent)
    }


def are_sharded(slots: Slots) -> bool:
    """Whether some of the tensors are."""
    return any(dtensor.is_sharded(slot.whole()) for slot in slots.values())


# What torch.compile, and checkpoint_wrapper of activations, put into the names.
WRAPPER_NAMES = ("_orig_mod", "_checkpoint_wrapped_module")


def clean_name(name: str) -> str:
    """The name without what wrappers inside the model put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)


def clean_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """A module's state dict by clean name, without extra state, which is not a weight."""
    return {
        clean_name(name): value
        for name, value in state.items()
        if name.rpartition(".")[2] != "_extra_state"
    }
