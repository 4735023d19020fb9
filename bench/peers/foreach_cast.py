"""Cast the online model to the EMA's dtype, then torch._foreach_lerp_: around its refusal."""

import torch
from torch import nn

from bench.peers import Built, Memory, Sizes, copied

NAME = "cast, torch._foreach_lerp_"


def build(model: nn.Module, momentum: float, ema_dtype: torch.dtype) -> Built:
    """A temporary as large as the EMA at every update; where nothing is to cast, none."""
    ema, online = copied(model, ema_dtype), [p.detach() for p in model.parameters()]

    def update(momentum: float) -> None:
        torch._foreach_lerp_(ema, [tensor.to(ema_dtype) for tensor in online], momentum)

    return Built(update, ema)


def memory(sizes: Sizes) -> Memory:
    """The cast parameters."""
    return Memory(sizes.ema, sizes.ema if sizes.cast else 0)
