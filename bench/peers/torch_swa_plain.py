"""torch's AveragedModel with an averaging function for one tensor at a time."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bench.peers import Built, Memory, Sizes, cast, memory_of_cast

NAME = "AveragedModel (avg_fn)"


def build(model: nn.Module, momentum: float, ema_dtype: torch.dtype) -> Built:
    """Average with the function of torch's documentation."""
    weight = momentum

    def average(ema: Tensor, online: Tensor, _count: object) -> Tensor:
        return (1 - weight) * ema + weight * online

    averaged = AveragedModel(model, avg_fn=average)
    tensors = cast(averaged.module, ema_dtype)
    averaged.n_averaged.fill_(1)  # at 0 the first update copies

    def update(momentum: float) -> None:
        nonlocal weight
        weight = momentum
        averaged.update_parameters(model)

    return Built(update, tensors)


def memory(sizes: Sizes) -> Memory:
    """The averaging function makes two products and a sum, one tensor at a time."""
    return memory_of_cast(sizes)._replace(updating=3 * sizes.largest * sizes.ema_width)
