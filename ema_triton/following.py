"""Following an optimizer: something is done after each step that it really makes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ema_triton.schedules import check_count

# The attributes in which wrappers have the optimizer that they step: accelerate, apex, Lookahead;
# SAM; Lightning; timm's Lookahead.
INNER = ("optimizer", "base_optimizer", "_optimizer", "_base_optimizer")


class Following:
    """Updates after every n-th real step of an optimizer, until `remove` is called.

    The innermost optimizer is the one that changes the weights. Where its step is part of the step
    of a wrapper that calls hooks as well, the update waits for the end of that one, which may go on
    changing weights, as Lookahead does.

    Args:
        optimizer: The optimizer, or a wrapper.
        model: The online model.
        update: To be called.
        every: How many steps make an update.
        previous: What the EMA followed before.

    Raises:
        RuntimeError: It has not ended.
        TypeError: The optimizer's steps cannot be noticed.
        ValueError: The optimizer has none of the model's parameters.
    """

    def __init__(
        self,
        optimizer: object,
        model: nn.Module,
        update: Callable[[], None],
        every: int,
        previous: Following | None,
    ) -> None:
        if previous is not None and previous.is_active():
            raise RuntimeError(
                "This EMA follows an optimizer already; following two, it would update twice per "
                "iteration. Call remove() on the first handle, or follow the optimizer that steps "
                "last."
            )
        self._update, self._every = update, check_count("every", every)
        levels = _levels(optimizer)
        innermost = levels[-1]
        if not _calls_hooks(innermost):
            raise TypeError(
                f"A step of {type(innermost).__name__} cannot be followed, and the EMA would never "
                "be updated: it is no torch.optim.Optimizer whose step() calls hooks (one whose "
                f"__init__ called Optimizer.__init__), nor has it one in {', '.join(INNER)}. Give "
                "the optimizer whose step() changes the weights, or call update() after each step."
            )
        trained = {id(p) for group in innermost.param_groups for p in group["params"]}
        if not any(id(parameter) in trained for parameter in model.parameters()):
            raise ValueError(
                f"The optimizer, a {type(innermost).__name__}, has none of this model's "
                "parameters, so its steps do not change the model. Give the optimizer that trains "
                "it, and build that after moving the model. Where a wrapper has copies of the "
                "parameters trained instead, call update() after each step."
            )
        hooked = [level for level in levels if _calls_hooks(level)]
        self._innermost = len(hooked) - 1
        self._outermost = 0  # the first level whose step is running, if any is
        self._running = 0  # how many steps of that level are, one inside the other
        self._stepped = False  # whether an update waits for their end
        self._steps = 0
        self._handles = []
        # Torch's handles have no reference to the optimizer, and neither has this.
        for number, level in enumerate(hooked):
            self._handles += [
                level.register_step_pre_hook(partial(self._begin, number)),
                level.register_step_post_hook(partial(self._end, number)),
            ]

    def is_active(self) -> bool:
        """Whether it has not been removed, and the optimizer is still there."""
        handle = self._handles[-1]
        return handle.id in (handle.hooks_dict_ref() or ())

    def remove(self) -> None:
        """End it."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Following:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    # Torch calls the hooks of a `super().step()` inside a `step` too: two beginnings and two ends
    # on one level. And a step that raises has a beginning only: where it could be either, an update
    # after it may wait for the beginning of the next step, when the weights are the same still.
    def _begin(self, level: int, optimizer: Optimizer, *_: object) -> None:
        if self._stepped:  # the step around it makes another one, or has raised afterwards
            self._running = 0
            self._count()
        if self._running and level == self._outermost and _super_calls_hooks(optimizer):
            self._running += 1
        elif not self._running or level <= self._outermost:
            self._outermost, self._running = level, 1

    def _end(self, level: int, optimizer: Optimizer, *_: object) -> None:
        if not self._running:
            return
        if level == self._innermost and not _overflowed(optimizer):
            self._stepped = True
        if level == self._outermost:
            self._running -= 1
        if self._stepped and not self._running:
            self._count()

    def _count(self) -> None:
        self._stepped = False
        self._steps += 1
        if self._steps % self._every == 0:
            self._update()


def _levels(optimizer: Any) -> list[Any]:  # noqa: ANN401
    """The optimizer, and those inside it, the innermost last."""
    levels = [optimizer]
    while True:
        values = (getattr(levels[-1], name, None) for name in INNER)
        inner = next((value for value in values if _is_inside(value, levels)), None)
        if inner is None:
            return levels
        levels.append(inner)


def _is_inside(value: object, levels: list[Any]) -> bool:
    """Whether it is another optimizer: an object with a step."""
    has_step = callable(getattr(value, "step", None)) and not isinstance(value, type)
    return has_step and not any(value is level for level in levels)


def _calls_hooks(optimizer: object) -> bool:
    """Whether it is an optimizer with a step that calls hooks, as `Optimizer.__init__` makes it."""
    return (
        isinstance(optimizer, Optimizer)
        and hasattr(optimizer, "_optimizer_step_post_hooks")
        and hasattr(type(optimizer).step, "hooked")
    )


def _super_calls_hooks(optimizer: Optimizer) -> bool:
    """Whether a `super().step()` does, as where there was an optimizer of the parent class."""
    steps = [vars(one).get("step") for one in type(optimizer).__mro__]
    return sum(hasattr(step, "hooked") for step in steps) > 1


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether `GradScaler`, which leaves it to a fused optimizer to skip the step, had it skip."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
