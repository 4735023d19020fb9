"""Schedules: pure functions from the update index, counting from 1, to the momentum.

The momentum is the weight of the new value, 1 - decay. Any function can be a schedule; those in
common use are here, as frozen dataclasses, which compare and print. Where 1 - decay would cancel
digits, the momentum is computed directly. Numbers become plain floats and ints at construction, so
that a saved schedule is plain data, even if it was given NumPy's numbers.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class _Schedule:
    """What the schedules below share: checks of the update index and of their fields."""

    def __call__(self, update_index: int) -> float:
        """The momentum of that update."""
        update_index = operator.index(update_index)  # NumPy's integers would return NumPy's floats
        if update_index < 1:
            raise ValueError(
                f"Invalid update index: {update_index}. Updates are counted from 1: the first "
                "update's momentum is schedule(1)."
            )
        return self._momentum(update_index)

    def _momentum(self, update_index: int) -> float:
        raise NotImplementedError

    def _check_fractions(self, *names: str) -> None:
        problem = "Outside [0, 1] the EMA is no average and may diverge: give a value in [0, 1]."
        for name in names:
            value = check_in_range(name, getattr(self, name), 0, 1, problem)
            object.__setattr__(self, name, value)

    def _check_positive(self, name: str, meaning: str) -> None:
        problem = f"It is {meaning}: give a finite value above 0."
        value = check_in_range(
            name, getattr(self, name), math.ulp(0.0), sys.float_info.max, problem
        )
        object.__setattr__(self, name, value)

    def _check_count(self, name: str, least: int = 1) -> None:
        """Raise unless the field is an integer, and make it an int."""
        object.__setattr__(self, name, check_count(name, getattr(self, name), least))


@dataclass(frozen=True)
class Constant(_Schedule):
    """The same momentum at every update.

        momentum_t = momentum

    Args:
        momentum: In [0, 1].

    Raises:
        ValueError: The momentum is outside [0, 1].
        TypeError: It is not a number.

    Examples:
        >>> Constant(0.25)(1)
        0.25
    """

    momentum: float

    def __post_init__(self) -> None:
        self._check_fractions("momentum")

    def _momentum(self, _: int) -> float:
        return self.momentum


@dataclass(frozen=True)
class LinearWarmup(_Schedule):
    """From one momentum to another in a straight line, up or down, and constant from then on.

        momentum_1 = momentum_warmup
        momentum_t = momentum_warmup + (momentum - momentum_warmup) * (t - 1) / (warmup_iters - 1)

    Source: `ignite.handlers.EMAHandler`, `EMAWarmUp` of version 0.5.5.

    Args:
        momentum_warmup: The first update's momentum, in [0, 1].
        momentum: In [0, 1], reached at update `warmup_iters`.
        warmup_iters: In updates, at least 0. With 0 or 1, the second update already has `momentum`.

    Raises:
        ValueError: A value is out of its range.
        TypeError: A value is not a number, or `warmup_iters` is not an integer.

    Examples:
        >>> schedule = LinearWarmup(0.5, 0.1, warmup_iters=3)
        >>> [round(schedule(t), 3) for t in (1, 2, 3, 4)]
        [0.5, 0.3, 0.1, 0.1]
    """

    momentum_warmup: float
    momentum: float
    warmup_iters: float  # an int once constructed

    def __post_init__(self) -> None:
        self._check_fractions("momentum", "momentum_warmup")
        self._check_count("warmup_iters", least=0)

    def _momentum(self, update_index: int) -> float:
        if update_index >= max(2, self.warmup_iters):
            return self.momentum
        # Ignite's order of operations, and its bound: a rounded sum could pass the end.
        change = (self.momentum - self.momentum_warmup) * (update_index - 1)
        momentum = self.momentum_warmup + change / max(1, self.warmup_iters - 1)
        low, high = sorted((self.momentum_warmup, self.momentum))
        return min(max(momentum, low), high)


@dataclass(frozen=True)
class InverseDecay(_Schedule):
    """A decay whose distance from 1 falls as an inverse power of the number of updates.

        decay_t = clip(1 - (1 + (t - 1) / gamma) ** -power, min_decay, max_decay)

    With a minimum of 0 the first update copies the online weights. Source: the warm-up of timm's
    `ModelEmaV3`, of ema-pytorch's `EMA` and of diffusers' `EMAModel` (`use_ema_warmup`). All three
    subtract one from their count of updates; their first update is a copy whatever the minimum.

    Args:
        gamma: Above 0, in updates: how many pass before the decay starts to rise.
        power: Above 0. 2/3 suits long trainings, 3/4 shorter ones.
        min_decay: In [0, 1].
        max_decay: In [0, 1], not below `min_decay`.

    Raises:
        ValueError: A value is out of its range.
        TypeError: A value is not a number.

    Examples:
        >>> schedule = InverseDecay(gamma=1.0, power=0.5, max_decay=0.6)
        >>> [schedule(t) for t in (1, 4, 1000)]
        [1.0, 0.5, 0.4]
    """

    gamma: float = 1.0
    power: float = 2 / 3
    min_decay: float = 0.0
    max_decay: float = 0.9999

    def __post_init__(self) -> None:
        self._check_positive("gamma", "a scale in updates")
        self._check_positive("power", "an exponent, and without it the decay would never rise")
        self._check_fractions("min_decay", "max_decay")
        if self.min_decay > self.max_decay:
            raise ValueError(
                f"Invalid min_decay: {self.min_decay}, above max_decay={self.max_decay}, so no "
                "decay satisfies both. Give min_decay <= max_decay."
            )

    def _momentum(self, update_index: int) -> float:
        momentum = math.pow(1 + (update_index - 1) / self.gamma, -self.power)
        return min(max(momentum, 1 - self.max_decay), 1 - self.min_decay)


@dataclass(frozen=True)
class CountWarmup(_Schedule):
    """A decay that grows with the number of updates until it reaches its value.

        decay_t = min(decay, (1 + t) / (10 + t))

    Source: `tf.train.ExponentialMovingAverage(num_updates)`; pytorch_ema, LitEma and torchtnt
    follow it.

    Args:
        decay: In [0, 1].

    Raises:
        ValueError: The decay is outside [0, 1].
        TypeError: It is not a number.

    Examples:
        >>> schedule = CountWarmup(0.75)
        >>> [schedule(t) for t in (8, 1000)]
        [0.5, 0.25]
    """

    decay: float

    def __post_init__(self) -> None:
        self._check_fractions("decay")

    def _momentum(self, update_index: int) -> float:
        return max(1 - self.decay, 9 / (10 + update_index))


@dataclass(frozen=True)
class ExponentialRamp(_Schedule):
    """A decay that approaches its value exponentially.

        decay_t = decay * (1 - exp(-t / tau))

    Source: ultralytics' `ModelEMA`.

    Args:
        decay: In [0, 1].
        tau: Above 0, in updates: after that many, 63 % of the decay is reached.

    Raises:
        ValueError: A value is out of its range.
        TypeError: A value is not a number.

    Examples:
        >>> schedule = ExponentialRamp(0.9, tau=100)
        >>> [round(schedule(t), 4) for t in (1, 100, 10000)]
        [0.991, 0.4311, 0.1]
    """

    decay: float
    tau: float = 2000

    def __post_init__(self) -> None:
        self._check_fractions("decay")
        self._check_positive("tau", "a time constant in updates")

    def _momentum(self, update_index: int) -> float:
        return (1 - self.decay) + self.decay * math.exp(-update_index / self.tau)


@dataclass(frozen=True)
class CosineRamp(_Schedule):
    """A decay that rises from its base to 1 along half a cosine, until the EMA stands still.

        decay_t = 1 - (1 - base_decay) * (cos(pi * min(t - 1, updates) / updates) + 1) / 2

    Source: Grill et al. 2020, "Bootstrap Your Own Latent", https://arxiv.org/abs/2006.07733;
    DINO's teacher follows it.

    Args:
        base_decay: The first update's decay, in [0, 1].
        updates: The length of the training in updates, at least 1.

    Raises:
        ValueError: A value is out of its range.
        TypeError: A value is not a number, or `updates` is not an integer.

    Examples:
        >>> schedule = CosineRamp(0.75, updates=100)
        >>> [round(schedule(t), 4) for t in (1, 51, 101, 200)]
        [0.25, 0.125, 0.0, 0.0]
    """

    base_decay: float
    updates: int

    def __post_init__(self) -> None:
        self._check_fractions("base_decay")
        self._check_count("updates")

    def _momentum(self, update_index: int) -> float:
        # (cos(pi x) + 1) / 2 = sin(pi (1 - x) / 2)^2, which keeps its digits near x = 1, where the
        # difference must be taken between integers.
        left = max(0, self.updates - (update_index - 1)) / self.updates
        return (1 - self.base_decay) * math.sin(math.pi * left / 2) ** 2


@dataclass(frozen=True)
class HalfLife(_Schedule):
    """A constant momentum, given as the steps after which an old value counts half as much.

        decay_t = 2 ** (-every / half_life)

    The half-life is in the trainer's steps, so `every` does not change it. Source: `TraditionalEMA`
    of Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
    https://arxiv.org/abs/2312.02696, without its ramp-up; and the `EMA` of MosaicML's Composer.

    Args:
        half_life: In steps of the trainer, above 0.
        every: Steps from one update to the next, at least 1.

    Raises:
        ValueError: A value is out of its range.
        TypeError: `half_life` is not a number, or `every` is not an integer.

    Examples:
        >>> HalfLife(1)(1), HalfLife(2, every=2)(1)
        (0.5, 0.5)
    """

    half_life: float
    every: int = 1

    def __post_init__(self) -> None:
        self._check_positive("half_life", "a number of steps")
        self._check_count("every")

    def _momentum(self, _: int) -> float:
        return -math.expm1(-math.log(2) * self.every / self.half_life)


@dataclass(frozen=True)
class HalfLifeFraction(_Schedule):
    """A half-life that grows with the training: always the same fraction of the updates so far.

        decay_t = 2 ** (-1 / (fraction * t))

    Source: `half_life_fraction` of torchtitan.

    Args:
        fraction: Above 0: after `fraction` * t more updates, what the EMA was at update t
            counts about half as much.

    Raises:
        ValueError: The fraction is not above 0.
        TypeError: It is not a number.

    Examples:
        >>> schedule = HalfLifeFraction(0.5)
        >>> [round(schedule(t), 4) for t in (2, 200)]
        [0.5, 0.0069]
    """

    fraction: float

    def __post_init__(self) -> None:
        self._check_positive("fraction", "a part of the updates so far")

    def _momentum(self, update_index: int) -> float:
        return -math.expm1(-math.log(2) / (self.fraction * update_index))


@dataclass(frozen=True)
class EqualAverage(_Schedule):
    """The mean of the online weights of all updates.

        momentum_t = 1 / t

    Of the weights at construction nothing is left. Source: Izmailov et al. 2018, "Averaging Weights
    Leads to Wider Optima and Better Generalization", https://arxiv.org/abs/1803.05407; the default
    of `torch.optim.swa_utils.AveragedModel`.

    Examples:
        >>> [EqualAverage()(t) for t in (1, 2, 4)]
        [1.0, 0.5, 0.25]
    """

    def _momentum(self, update_index: int) -> float:
        return 1 / update_index


@dataclass(frozen=True, init=False)
class PowerFunction(_Schedule):
    """An average whose profile over the updates is a power function, as wide as the training.

        decay_t = (1 - 1 / t) ** (gamma + 1)
        sigma_rel = sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))

    The weights of update s count as `s ** gamma`, nearly, and those at construction not at all.
    Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
    https://arxiv.org/abs/2312.02696, section 3.1.

    Args:
        sigma_rel: The standard deviation of the profile as a fraction of the training, above 0 and
            at most `12 ** -0.5`, that of `EqualAverage`.
        gamma: The exponent, at least 0; instead of `sigma_rel`.

    Raises:
        ValueError: A value is out of its range.
        TypeError: A value is not a number, or not exactly one of the two is given.

    Examples:
        >>> schedule = PowerFunction(sigma_rel=0.1)
        >>> round(schedule.gamma, 2), round(schedule.sigma_rel, 2)
        (6.94, 0.1)
        >>> [round(schedule(t), 4) for t in (1, 2, 1000)]
        [1.0, 0.9959, 0.0079]
    """

    gamma: float

    def __init__(self, *, sigma_rel: float | None = None, gamma: float | None = None) -> None:
        if (sigma_rel is None) == (gamma is None):
            raise TypeError(
                f"PowerFunction got sigma_rel={sigma_rel!r} and gamma={gamma!r}, and each of them "
                "says what the other one is. Give exactly one."
            )
        if sigma_rel is not None:
            widest = 12**-0.5
            problem = f"It is the profile's width: give a value above 0 and at most {widest:.4f}."
            sigma = check_in_range("sigma_rel", sigma_rel, sys.float_info.min, widest, problem)
            gamma = 1 / sigma  # above the solution; each step leaves at most 2/3 of the error
            for _ in range(100):
                gamma = max(0.0, math.sqrt((gamma + 1) / (gamma + 3)) / sigma - 2)
        problem = "It is an exponent: give a finite value from 0 on."
        gamma = check_in_range("gamma", gamma, 0, sys.float_info.max, problem)
        object.__setattr__(self, "gamma", gamma)

    @property
    def sigma_rel(self) -> float:
        """The profile's standard deviation as a fraction of the training."""
        # Rounding may put a gamma just above 0 beyond the widest, which `sigma_rel=` would refuse.
        sigma = math.sqrt((self.gamma + 1) / (self.gamma + 3)) / (self.gamma + 2)
        return min(sigma, 12**-0.5)

    def _momentum(self, update_index: int) -> float:
        if update_index == 1:
            return 1.0
        return -math.expm1((self.gamma + 1) * math.log1p(-1 / update_index))


@dataclass(frozen=True)
class Delayed(_Schedule):
    """Copy the online weights in the first updates, and then follow another schedule.

        momentum_t = 1 if t <= updates else schedule(t - updates)

    Source: `update_after_step` of ema-pytorch's `EMA` and of diffusers' `EMAModel`.

    Args:
        schedule: From the update index, counting from 1 after the delay, to the momentum.
        updates: How many copy, at least 1.

    Raises:
        ValueError: `updates` is below 1.
        TypeError: `schedule` is not a function, or `updates` is not an integer.

    Examples:
        >>> schedule = Delayed(Constant(0.25), updates=2)
        >>> [schedule(t) for t in (1, 2, 3)]
        [1.0, 1.0, 0.25]
    """

    schedule: Schedule
    updates: int

    def __post_init__(self) -> None:
        if not callable(self.schedule) or isinstance(self.schedule, Delayed):
            raise TypeError(
                f"Invalid schedule: {self.schedule!r}. It gives the momentum after the delay: give "
                "another one of these schedules, or a function of your own."
            )
        self._check_count("updates")

    def _momentum(self, update_index: int) -> float:
        return 1.0 if update_index <= self.updates else self.schedule(update_index - self.updates)


def momentum_from(schedule: Schedule, update_index: int) -> float:
    """The schedule's momentum for this update.

    Raises:
        ValueError: The schedule did not return a number in [0, 1].
    """
    momentum: Any = schedule(update_index)
    if not _is_number(momentum) or not 0 <= momentum <= 1:
        raise ValueError(
            f"Invalid momentum: {momentum!r}, from the schedule at update {update_index}. A "
            "schedule gives the weight of the online weights (1 - decay), in [0, 1]."
        )
    return float(momentum)


def check_in_range(name: str, value: object, low: float, high: float, problem: str) -> float:
    """The number as a float; an error unless it is one from `low` to `high`."""
    if not _is_number(value):
        raise TypeError(f"Invalid {name}: {value!r}, a {type(value).__name__}. Give a number.")
    if not low <= float(value) <= high:
        raise ValueError(f"Invalid {name}: {value}. {problem}")
    return float(value)


def check_count(name: str, value: Any, least: int = 1) -> int:  # noqa: ANN401
    """The argument as an int; raise unless it is an integer, and large enough."""
    count = round(value) if _is_number(value) and math.isfinite(value) else None
    # A float may be an integer up to a few roundings: 0.29 * 100 is below 29.
    if count is None or not math.isclose(value, count, rel_tol=2**-50):
        raise TypeError(
            f"Invalid {name}: {value!r}, a {type(value).__name__}. It counts updates or steps: "
            "give an integer."
        )
    if count < least:
        raise ValueError(
            f"Invalid {name}: {value}. It counts updates or steps: give at least {least}."
        )
    return int(count)


def check_schedule(schedule: object) -> None:
    """Raise unless it is a function that gives a momentum for the first update."""
    if not callable(schedule):
        raise TypeError(
            "schedule must be a function from the update index to the momentum, but got "
            f"{schedule!r}. Give one of ema_triton.schedules, e.g. HalfLife(1000), or a "
            "function of your own."
        )
    momentum_from(schedule, 1)


def schedule_to_state(schedule: Schedule) -> dict[str, Any] | None:
    """The schedule as a dict of plain values; None for a function that is not one of these.

    Examples:
        >>> schedule_to_state(Constant(0.1))
        {'name': 'Constant', 'momentum': 0.1}
    """
    if type(schedule) not in _SCHEDULES.values():
        return None
    state = {"name": type(schedule).__name__, **vars(schedule)}
    if isinstance(schedule, Delayed):
        state["schedule"] = schedule_to_state(schedule.schedule)
        if state["schedule"] is None:
            return None
    return state


def schedule_from_state(state: Mapping[str, Any]) -> Schedule:
    """The schedule that `schedule_to_state` described.

    Raises:
        ValueError: The name or a field is unknown or missing, or a value invalid.

    Examples:
        >>> schedule_from_state({"name": "HalfLife", "half_life": 1000.0, "every": 4})
        HalfLife(half_life=1000.0, every=4)
    """
    try:
        values = dict(state)
        kind = _SCHEDULES[values.pop("name")]
        if kind is Delayed:
            values["schedule"] = schedule_from_state(values["schedule"])
        return kind(**values)
    except (KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"The saved schedule {state!r} cannot be restored ({error}). It is damaged, or was "
            f"written by another release. The schedules of this one are {', '.join(_SCHEDULES)}."
        ) from error


def _is_number(value: object) -> TypeGuard[float]:
    # A float first: an abstract class takes longer to answer.
    return isinstance(value, (float, numbers.Real)) and not isinstance(value, bool)


_SCHEDULES = {kind.__name__: kind for kind in _Schedule.__subclasses__()}  # by name, as saved
