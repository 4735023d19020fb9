"""No peer is timed before its EMA was held against float64."""

from __future__ import annotations

from bisect import bisect
from itertools import accumulate

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
    indices = [_sampled(tensor) for tensor in online]
    errors, right = [], []
    for momentum in momenta:
        for tensor in online:
            tensor.neg_()
        before = _values(built.tensors, indices)
        built.update(momentum)
        target = _values(online, indices)
        error = (_values(built.tensors, indices) - torch.lerp(before, target, momentum)).abs()
        bound = 3 * eps * torch.maximum(before.abs(), target.abs())
        errors.append(error)
        right.append(error <= bound)  # not for NaN
    every = torch.cat(right)
    if every.all():  # waits for the device, once
        return None
    update, place = divmod(int(every.logical_not().nonzero()[0]), len(every) // len(momenta))
    sizes = [index.numel() for index in indices]
    number = bisect(list(accumulate(sizes)), place)
    off = errors[update].split(sizes)[number].max().item()
    return (
        f"tensor {number} of {len(online)} is off by {off:.2g} "
        f"after an update with momentum {momenta[update]}"
    )


def _sampled(tensor: Tensor) -> Tensor:
    """Which elements are looked at."""
    if tensor.numel() <= SAMPLE:
        return torch.arange(tensor.numel(), device=tensor.device)
    last = tensor.numel() - 1
    return torch.arange(SAMPLE, device=tensor.device) * last // (SAMPLE - 1)


def _values(tensors: list[Tensor], indices: list[Tensor]) -> Tensor:
    """Those elements of all tensors, in float64."""
    values = [t.reshape(-1)[index] for t, index in zip(tensors, indices, strict=True)]
    return torch.cat(values).double()
