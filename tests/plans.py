"""Plans without the objects around them, and updates by a backend of choice."""

from types import ModuleType

from torch import Tensor, nn

from ema_triton import ModelEMA
from ema_triton.ops import foreach_backend
from ema_triton.plan import Plan


def ema_of(model: nn.Module, twin: nn.Module, precision: str = "nearest", **options) -> ModelEMA:
    return ModelEMA(model, ema_model=twin, precision=precision, backend="foreach", **options)


def plan_of(model: nn.Module, twin: nn.Module, precision: str = "nearest", **options) -> Plan:
    return ema_of(model, twin, precision, **options)._planner.plan


def run(backend: ModuleType, plan: Plan, momentum: float | Tensor) -> None:
    """An update by this backend, as far as it can."""
    for launch in plan.launches:
        able = backend is foreach_backend or backend.unsupported_reason(launch) is None
        launch.backend = backend if able else foreach_backend
    plan.update(momentum)
