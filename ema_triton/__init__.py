"""Exponential moving average of model weights, in one fused Triton launch per update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ema_triton.bank import EMABank
from ema_triton.model_ema import ModelEMA
from ema_triton.schedules import (
    Constant,
    CosineRamp,
    CountWarmup,
    Delayed,
    EqualAverage,
    ExponentialRamp,
    HalfLife,
    HalfLifeFraction,
    InverseDecay,
    LinearWarmup,
    PowerFunction,
)

if TYPE_CHECKING:
    from ema_triton.handler import EMAHandler

__all__ = [
    "Constant",
    "CosineRamp",
    "CountWarmup",
    "Delayed",
    "EMABank",
    "EMAHandler",
    "EqualAverage",
    "ExponentialRamp",
    "HalfLife",
    "HalfLifeFraction",
    "InverseDecay",
    "LinearWarmup",
    "ModelEMA",
    "PowerFunction",
]

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401
    # Resolved on first use: only the handler needs ignite.
    if name == "EMAHandler":
        from ema_triton.handler import EMAHandler

        return EMAHandler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
