"""diffusers' EMAModel with its foreach option."""

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from bench.peers import Built, Memory, Sizes

NAME = "diffusers EMAModel (foreach)"


def build(model: nn.Module, momentum: float, ema_dtype: torch.dtype) -> Built:
    """Take a step, at the decay set before; min_decay switches its warm-up off."""
    ema = EMAModel(model.parameters(), decay=1 - momentum, foreach=True)
    ema.to(dtype=ema_dtype)
    parameters = [*model.parameters()]

    def update(momentum: float) -> None:
        ema.decay = ema.min_decay = 1 - momentum
        ema.step(parameters)

    ema.optimization_step = 1  # at its first step it copies
    return Built(update, ema.shadow_params)


def memory(sizes: Sizes) -> Memory:
    """A copy before it is cast; the differences."""
    return Memory(sizes.ema + (sizes.online if sizes.cast else 0), sizes.ema)
