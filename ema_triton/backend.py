"""The choice of backend: which update function runs a plan, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ema_triton import reference
from ema_triton.buckets import Bucket
from ema_triton.plan import Plan

BACKENDS = ("auto", "triton", "foreach")


class Backend(NamedTuple):
    """A backend's name, the reason for its choice, and what it does."""

    name: str
    reason: str
    update: Callable[[Plan, float | Tensor], None]
    exchange: Callable[[Bucket], None]

    @classmethod
    def foreach(cls, reason: str) -> Backend:
        """The reference path."""
        return cls("foreach", reason, reference.update, reference.exchange)


def choose(requested: str, plan: Plan) -> Backend:
    """Resolve "auto", "triton" or "foreach" for the tensors of a plan.

    "auto" takes Triton where it drives the tensors' device and can compile there, else foreach.
    Tensors that the kernel cannot take, for their dtype or their layout, go through the reference
    path under "triton" too, and the reason names them.

    Args:
        requested: One of `BACKENDS`.
        plan: The plan to run.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: "triton" was asked for and cannot run.
    """
    check_name(requested)
    if requested == "foreach":
        return Backend.foreach("backend='foreach' was asked for")
    if not plan.buckets:
        return Backend.foreach("the model has no tensors to average")
    obstacle = _obstacle(plan, explicit=requested == "triton")
    if obstacle is None:
        from ema_triton import launch

        asked = requested == "triton"
        why = "backend='triton' was asked for" if asked else "Triton drives the device"
        reason = "; ".join([why, *_exceptions(plan)])
        return Backend("triton", reason, launch.update, launch.exchange)
    if requested == "triton":
        raise RuntimeError(
            f"backend='triton' cannot run here: {obstacle}. Use backend='auto' to let the library "
            "fall back to torch._foreach_lerp_, or move the model to a GPU before building the EMA."
        )
    return Backend.foreach(obstacle)


def check_name(requested: str) -> None:
    """Raise ValueError unless `requested` is one of `BACKENDS`."""
    if requested not in BACKENDS:
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, BACKENDS))}, but got {requested!r}. "
            "'auto' takes the Triton kernel where it can run and torch._foreach_lerp_ elsewhere."
        )


def _obstacle(plan: Plan, *, explicit: bool) -> str | None:
    """Why Triton cannot run the plan; None when it has compiled the kernels for it.

    Asked for explicitly, only the devices decide: a cast in mid-training is not an error.
    """
    try:
        from ema_triton import launch
    except ImportError as error:
        return f"triton does not import ({error}); pip install triton"
    obstacles = [
        launch.device_obstacle(bucket.key.device) if explicit else launch.obstacle(bucket)
        for bucket in plan.buckets
    ]
    if None not in obstacles:
        return obstacles[0]
    try:
        launch.prepare(plan)
    except Exception as error:  # whatever the driver, the compiler or the linker raised
        return f"Triton cannot compile for this device ({type(error).__name__}: {error})"
    return None


def _exceptions(plan: Plan) -> list[str]:
    """What goes through the reference path although Triton was chosen."""
    from ema_triton import launch

    return [
        f"torch._foreach_lerp_ averages {len(bucket.names)} tensor(s) such as '{bucket.names[0]}': "
        f"{obstacle}"
        for bucket in plan.buckets
        if (obstacle := launch.obstacle(bucket)) is not None
    ]
