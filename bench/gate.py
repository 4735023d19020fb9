"""No peer is timed before its EMA was held against float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.peers import Built

# Elements looked at in each tensor: all of a small one, spread evenly over a large one, its first
# and last among them. The float64 copies of a whole model would not fit beside it.
SAMPLE = 4096


def fault(built: Built, model: nn.Module, momenta: tuple[float, ...]) -> str | None:
    """Make an update with each momentum towards flipped weights; say what is wrong with one.

    An error of 3 eps of the larger of both values is let pass: there are ways to write the formula
    with four roundings, each half an eps of a value not larger, and peers that round the decay to
    fp32 err by another half eps of the difference, which is at most twice the larger one.

    Args:
        built: A peer's EMA of the model.
        model: The online model, with random parameters; their signs are flipped before each update.
        momenta: The momentum of each update.
    """
    online = [parameter.detach() for parameter in model.parameters()]
    eps = torch.finfo(built.tensors[0].dtype).eps
    for momentum in momenta:
        for tensor in online:
            tensor.neg_()
        before = [*map(_sampled, built.tensors)]
        built.update(momentum)
        for index, (old, ema, new) in enumerate(zip(before, built.tensors, online, strict=True)):
            target = _sampled(new)
            error = (_sampled(ema) - torch.lerp(old, target, momentum)).abs()
            bound = 3 * eps * torch.maximum(old.abs(), target.abs())
            if not (error <= bound).all():
                return (
                    f"tensor {index} of {len(online)} is off by {error.max().item():.2g} "
                    f"after an update with momentum {momentum}"
                )
    return None


def _sampled(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    if flat.numel() > SAMPLE:
        last = flat.numel() - 1
        index = torch.arange(SAMPLE, device=flat.device) * last // (SAMPLE - 1)
        flat = flat[index]
    return flat.double()
