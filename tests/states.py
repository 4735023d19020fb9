"""States compared, taken apart, and sent through a file."""

import io
from typing import Any

import torch
from torch import Tensor

from ema_triton import ModelEMA
from ema_triton.ops.precision import join_residual

# How an EMA in low precision may be kept.
PRECISIONS: dict[str, dict[str, Any]] = {
    f"{precision} {dtype}": {"precision": precision, "ema_dtype": getattr(torch, dtype), "seed": 7}
    for precision in ("exact", "stochastic", "nearest")
    for dtype in ("bfloat16", "float16")
}


def saved(state: Any) -> Any:
    """The state after `torch.save` and `torch.load`."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(left: Any, right: Any) -> bool:
    """Whether types, order and the tensors' bits are the same; NaN equals NaN."""
    if left is right:  # a mangled state may even contain itself
        return True
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        sides = [side.detach().cpu().reshape(-1) for side in (left, right)]
        bits = [torch.where(side == side, side, 0).view(torch.uint8) for side in sides]
        return torch.equal(*bits) and torch.equal(*(side != side for side in sides))
    if isinstance(left, dict):
        return [*left] == [*right] and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def accumulated(ema: ModelEMA) -> list[Tensor]:
    """The averages with all their digits: each weight joined with its residual."""
    state = ema.state_dict()
    residuals = state["residuals"]
    return [
        join_residual(weight, residuals[name]) if name in residuals else weight
        for name, weight in state["weights"].items()
    ]
