"""The choice of backend: which one runs each launch of a new plan, and why."""

from __future__ import annotations

from collections.abc import Sequence

from ema_triton.ops import foreach_backend
from ema_triton.plan import Launch, Plan


def choose(requested: str, plan: Plan) -> None:
    """Set the backend of each launch of a plan, and of the plan its name and the reason.

    "auto" takes Triton where it drives the tensors' device and can compile there, else foreach.
    Tensors that the kernel cannot take, for their dtype or their layout, go through foreach under
    "triton" too, and the reason names them.

    Args:
        requested: "auto", "triton" or "foreach".
        plan: A new plan.

    Raises:
        RuntimeError: "triton" was asked for and cannot run.
    """
    for launch in plan.launches:
        launch.backend = foreach_backend
    plan.backend = "foreach"
    if requested == "foreach":
        plan.reason = "backend='foreach' was asked for"
    elif not plan.launches:
        plan.reason = "the model has no tensors to average"
    elif (reason := _unsupported_reason(plan.launches, explicit=requested == "triton")) is None:
        plan.backend = "triton"
        asked = requested == "triton"
        why = "backend='triton' was asked for" if asked else "Triton drives the device"
        plan.reason = "; ".join([why, *_take_triton(plan)])
    elif requested == "auto":
        plan.reason = reason
    else:
        raise RuntimeError(
            f"backend='triton' cannot run here: {reason}. Use backend='auto' to let the library "
            "fall back to torch._foreach_lerp_, or move the model to a GPU before building the EMA."
        )


def _unsupported_reason(launches: Sequence[Launch], *, explicit: bool) -> str | None:
    """Why Triton cannot run any of them; None when it has compiled the kernels for them.

    Asked for explicitly, only the devices decide: a cast in mid-training is not an error.
    """
    try:
        from ema_triton.ops import triton_backend
    except ImportError as error:
        return f"triton does not import ({error}); pip install triton"
    reasons = [
        triton_backend.unsupported_device(launch.kind.device)
        if explicit
        else triton_backend.unsupported_reason(launch)
        for launch in launches
    ]
    if None not in reasons:
        return reasons[0]
    try:
        for launch in launches:
            if triton_backend.unsupported_reason(launch) is None:
                triton_backend.prepare(launch)
    except Exception as error:  # whatever the driver, the compiler or the linker raised
        return f"Triton cannot compile for this device ({type(error).__name__}: {error})"
    return None


def _take_triton(plan: Plan) -> list[str]:
    """Have Triton run what it can; what is left to foreach, and why."""
    from ema_triton.ops import triton_backend

    left = []
    for launch in plan.launches:
        if (reason := triton_backend.unsupported_reason(launch)) is None:
            launch.backend = triton_backend
        else:
            left.append(
                f"torch._foreach_lerp_ averages {len(launch.names)} tensor(s) such as "
                f"'{launch.names[0]}': {reason}"
            )
    for group in plan.launch_groups:
        if group[0].backend is triton_backend:
            triton_backend.prepare_several(group)
    return left
