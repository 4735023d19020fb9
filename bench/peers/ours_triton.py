"""This library's Triton kernel."""

import torch
from torch import nn

from bench.peers import Built, Memory, Sizes
from ema_triton import ModelEMA

NAME = "ema_triton (triton)"


def build(
    model: nn.Module,
    momentum: float,
    ema_dtype: torch.dtype,
    precision: str = "nearest",
    backend: str = "triton",
) -> Built:
    """Give the update of `ModelEMA`; its momentum comes with each update."""
    ema = ModelEMA(model, backend=backend, ema_dtype=ema_dtype, precision=precision)
    return Built(ema.update, [parameter.detach() for parameter in ema.ema_model.parameters()])


def memory(sizes: Sizes) -> Memory:
    """What is kept: the EMA, in which the online tensors are copied."""
    return Memory(sizes.ema, 0)
