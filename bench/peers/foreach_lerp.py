"""torch._foreach_lerp_ on lists made once: the least that torch can do."""

import torch
from torch import nn

from bench.peers import Built, copied, memory_of_copied

NAME = "torch._foreach_lerp_"

memory = memory_of_copied


def build(model: nn.Module, momentum: float, ema_dtype: torch.dtype) -> Built:
    """Keep both lists; a tensor that is replaced later goes unnoticed."""
    ema, online = copied(model, ema_dtype), [p.detach() for p in model.parameters()]
    return Built(lambda momentum: torch._foreach_lerp_(ema, online, momentum), ema)
