"""torch's AveragedModel with its own foreach averaging function."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench.peers import Built, cast, memory_of_cast

NAME = "AveragedModel (multi_avg_fn)"

memory = memory_of_cast


def build(model: nn.Module, momentum: float, ema_dtype: torch.dtype) -> Built:
    """Average with `get_ema_multi_avg_fn`, whose decay is fixed when it is made."""
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - momentum))
    tensors = cast(averaged.module, ema_dtype)
    averaged.n_averaged.fill_(1)  # at 0 the first update copies

    def update(new: float) -> None:
        if new != momentum:
            raise NotImplementedError("get_ema_multi_avg_fn fixes the decay when it is made")
        averaged.update_parameters(model)

    return Built(update, tensors)
