"""What an update is compared with: a file per peer.

A peer's file has a `NAME` for the tables and a function

    build(model, momentum, ema_dtype) -> Built

that makes an EMA of the model's parameters. An import that fails means that the peer is absent; an
exception while it is built or updated is what the peer does with this model, and is reported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

# In the order of the tables: ours, then what people use, then what they might write.
PEERS = (
    "ours_triton",
    "ours_foreach",
    "ignite",
    "torch_swa_multi",
    "torch_swa_plain",
    "timm",
    "ema_pytorch",
    "ema_pytorch_foreach",
    "diffusers",
    "foreach_lerp",
    "foreach_mul_add",
    "foreach_cast",
    "compiled_lerp",
)


# These can round otherwise than to nearest: their `build` takes a `precision`.
OURS = ("ours_triton", "ours_foreach")


class Built(NamedTuple):
    """A peer's EMA of one model.

    Attributes:
        update: Makes one update with the given momentum.
        tensors: The EMA of each of the model's parameters, in their order, in memory that every
            update writes.
    """

    update: Callable[[float], object]
    tensors: list[Tensor]


def load(key: str) -> ModuleType:
    """Import a peer's file. Raises ImportError where the peer is absent."""
    return importlib.import_module(f"bench.peers.{key}")


def copied(model: nn.Module, ema_dtype: torch.dtype) -> list[Tensor]:
    """A copy of the parameters in the EMA's dtype: what a hand-written EMA starts from."""
    return [parameter.detach().to(ema_dtype, copy=True) for parameter in model.parameters()]


def cast(ema_model: nn.Module, ema_dtype: torch.dtype) -> list[Tensor]:
    """Cast a peer's EMA model in place, and return its parameters."""
    return [parameter.detach() for parameter in ema_model.to(ema_dtype).parameters()]
