"""Models as they are handed over: unwrapped, checked, copied."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """Take off DistributedDataParallel and torch.compile wrappers, however nested."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy with torch.compile wrappers taken off, inside too, so that names are clean.

    Raises:
        RuntimeError: It cannot be copied.
    """
    memo: dict[int, Any] = {}
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
    """Raise unless it is a module whose tensors are whole and in Python's reach."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            "model should be an instance of nn.Module or its subclasses, but got "
            f"{type(model).__name__}. Pass the model whose weights are to be averaged."
        )
    # Whoever has such a model has imported this.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules():
        which = f"module {name!r}" if name else "the model"
        if fsdp and isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)):
            raise NotImplementedError(
                f"{which} is sharded by FSDP, and averaging shards is not supported yet. Use "
                "DistributedDataParallel, or build the EMA of the unsharded model."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise NotImplementedError(
                f"{which} is a TorchScript module, which keeps its tensors out of Python's reach. "
                "Build the EMA of the Python module, and script its ema_model if need be."
            )
