"""foreach mul and add, as in DINOv2."""

import torch
from torch import nn

from bench.peers import Built, copied, memory_of_copied

NAME = "foreach mul, add"

memory = memory_of_copied


def build(model: nn.Module, momentum: float, ema_dtype: torch.dtype) -> Built:
    """Two passes over the EMA."""
    ema, online = copied(model, ema_dtype), [p.detach() for p in model.parameters()]

    def update(momentum: float) -> None:
        torch._foreach_mul_(ema, 1 - momentum)
        torch._foreach_add_(ema, online, alpha=momentum)

    return Built(update, ema)
