"""ema-pytorch, a tensor at a time."""

import torch
from ema_pytorch import EMA
from torch import nn

from bench.peers import Built, cast, memory_of_cast

NAME = "ema-pytorch"

memory = memory_of_cast


def build(
    model: nn.Module, momentum: float, ema_dtype: torch.dtype, use_foreach: bool = False
) -> Built:
    """Update at every call and without a warm-up, at the decay set before."""
    ema = EMA(
        model,
        beta=1 - momentum,
        update_after_step=-1,
        update_every=1,
        include_online_model=False,
        use_foreach=use_foreach,
    )
    tensors = cast(ema.ema_model, ema_dtype)
    ema.initted.fill_(True)  # otherwise the first update copies

    def update(momentum: float) -> None:
        # Its own warm-up, min(beta, schedule), is off as soon as min_value equals beta.
        ema.beta = ema.min_value = 1 - momentum
        ema.update()

    return Built(update, tensors)
