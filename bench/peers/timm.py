"""timm's ModelEmaV3, which averages with foreach operations by default."""

import torch
from timm.utils import ModelEmaV3
from torch import nn

from bench.peers import Built, cast, memory_of_cast

NAME = "timm ModelEmaV3"

memory = memory_of_cast


def build(model: nn.Module, momentum: float, ema_dtype: torch.dtype) -> Built:
    """Set the decay before each update, as timm's own schedule does."""
    ema = ModelEmaV3(model, decay=1 - momentum)
    tensors = cast(ema.module, ema_dtype)

    def update(momentum: float) -> None:
        ema.decay = 1 - momentum
        ema.update(model)

    return Built(update, tensors)
