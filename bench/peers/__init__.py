"""What an update is compared with: a file per peer.

A peer's file has a `NAME` for the tables and a function

    build(model, momentum, ema_dtype) -> Built

that makes an EMA of the model's parameters. An import that fails means that the peer is absent; an
exception while it is built or updated is what the peer does with this model, and is reported. It
may have a function

    memory(sizes) -> Memory

that says what it takes beside its EMA; without one it is taken for a copy of everything.
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


class Sizes(NamedTuple):
    """A model in numbers.

    Attributes:
        elements: Of all parameters.
        largest: Of the largest one.
        online_width: Bytes of an element.
        ema_width: Bytes of an element of the EMA, with its residual where it is exact.
        exact: Whether it is.
    """

    elements: int
    largest: int
    online_width: int
    ema_width: int
    exact: bool

    @property
    def online(self) -> int:
        """Bytes of the parameters."""
        return self.elements * self.online_width

    @property
    def ema(self) -> int:
        """Bytes of the EMA."""
        return self.elements * self.ema_width

    @property
    def cast(self) -> bool:
        """Whether the EMA's dtype is another than the parameters'."""
        return not self.exact and self.ema_width != self.online_width


class Memory(NamedTuple):
    """Peak bytes that a peer takes, beside the online model.

    Attributes:
        building: While the EMA is made, and with it.
        updating: During an update, beyond the EMA.
    """

    building: int
    updating: int


def memory(peer: ModuleType, sizes: Sizes) -> Memory:
    """What its file says; else a copy of the model and an EMA, and another EMA in an update."""
    if hasattr(peer, "memory"):
        found: Memory = peer.memory(sizes)
        return found
    return Memory(sizes.online + sizes.ema, sizes.ema)


def memory_of_copied(sizes: Sizes) -> Memory:
    """What an EMA from `copied` takes; where dtypes meet, a CPU casts one tensor at a time."""
    return Memory(sizes.ema, sizes.largest * sizes.ema_width if sizes.cast else 0)


def memory_of_cast(sizes: Sizes) -> Memory:
    """What a copy of the model takes that is `cast`, one tensor after the other."""
    one = sizes.largest if sizes.cast else 0
    building = max(sizes.online, sizes.ema) + one * sizes.online_width
    return Memory(building, one * sizes.ema_width)


def load(key: str) -> ModuleType:
    """Import a peer's file. Raises ImportError where the peer is absent."""
    return importlib.import_module(f"bench.peers.{key}")


def copied(model: nn.Module, ema_dtype: torch.dtype) -> list[Tensor]:
    """A copy of the parameters in the EMA's dtype: what a hand-written EMA starts from."""
    return [parameter.detach().to(ema_dtype, copy=True) for parameter in model.parameters()]


def cast(ema_model: nn.Module, ema_dtype: torch.dtype) -> list[Tensor]:
    """Cast a peer's EMA model in place, and return its parameters."""
    return [parameter.detach() for parameter in ema_model.to(ema_dtype).parameters()]
