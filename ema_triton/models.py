"""Models as they are handed over: unwrapped, checked, copied."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ema_triton import shards


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
    shards.reshard(model)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise NotImplementedError(
                f"'{name}' is partitioned by DeepSpeed's ZeRO-3, which keeps its values in places "
                "of its own. Train with ZeRO stage 1 or 2, whose parameters are whole, or shard "
                "the model by torch.distributed.fsdp.fully_shard (FSDP2)."
            )
        if shards.is_sharded(parameter) and any(
            placement.is_partial() for placement in cast(Any, parameter).placements
        ):
            raise ValueError(
                f"'{name}' is {shards.described(parameter)}: its values are sums over the ranks, "
                "which have to be made before they are averaged. Call redistribute() on it first."
            )
