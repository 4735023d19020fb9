"""How far a result may be from float64 truth, and why."""

import torch
from torch import Tensor


def update_bound(ema: Tensor, online: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error of one update: 1 * eps(ema dtype) * max(|ema|, |online|).

    Rounding the result to `dtype` costs half an eps of a value between the two; the difference
    `online - ema`, at most twice the larger one, is rounded in fp32 (fp64) and then weighed by at
    most a half, which costs another half where the EMA itself is fp32 (fp64). Below the normal
    range the spacing is constant: the smallest subnormal, for the result and for the difference.
    """
    info = torch.finfo(dtype)
    largest = torch.maximum(ema.double().abs(), online.double().abs())
    return info.eps * largest.clamp(min=info.smallest_normal)


def assert_update(result: Tensor, truth: Tensor, bound: Tensor) -> None:
    """Assert |result - truth| <= bound where truth is finite, and equality elsewhere."""
    result, truth = result.double().cpu(), truth.cpu()
    assert result.shape == truth.shape
    finite = truth.isfinite()
    torch.testing.assert_close(result[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True)
    error = (result - truth).abs()[finite]
    worst = (error - bound.cpu()[finite]).max() if error.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"error exceeds its bound by {worst.item():g}"
