"""How much the weights of each update count in an average that is as wide as the training."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ema_triton.schedules import Constant, EqualAverage, HalfLifeFraction, PowerFunction


def weights_of_updates(schedule: Callable[[int], float], updates: int) -> list[float]:
    """How much the online weights of each update count in the end; first those at construction."""
    weights = [1.0]
    for t in range(1, updates + 1):
        momentum = schedule(t)
        weights = [(1 - momentum) * weight for weight in weights] + [momentum]
    return weights


def test_in_an_equal_average_all_updates_count_alike() -> None:
    assert weights_of_updates(EqualAverage(), 50) == pytest.approx([0.0] + [1 / 50] * 50)
    assert weights_of_updates(Constant(1 / 50), 50) != pytest.approx([0.0] + [1 / 50] * 50)


def test_the_fraction_of_the_updates_is_a_half_life() -> None:
    momenta = [HalfLifeFraction(0.05)(t) for t in range(100_001, 105_001)]
    # The half-life grows by 5 % meanwhile, so that less than a half is forgotten.
    assert 0.5 < math.prod(1 - momentum for momentum in momenta) < 0.5**0.95


@pytest.mark.parametrize("gamma", [0.0, 0.5, 6.94])
def test_the_profile_is_a_power_of_the_update(gamma: float) -> None:
    # The integral of the profile (gamma + 1) s^gamma / t^(gamma + 1) from one update to the next.
    updates = 60
    ends = [(s / updates) ** (gamma + 1) for s in range(updates + 1)]
    expected = [0.0] + [end - begin for begin, end in pairwise(ends)]
    found = weights_of_updates(PowerFunction(gamma=gamma), updates)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_sigma_rel_is_the_relative_width_of_the_profile(sigma_rel: float) -> None:
    updates = 2000
    weights = weights_of_updates(PowerFunction(sigma_rel=sigma_rel), updates)[1:]
    middles = [(s + 0.5) / updates for s in range(updates)]
    mean = sum(w * middle for w, middle in zip(weights, middles, strict=True))
    variance = sum(w * (m - mean) ** 2 for w, m in zip(weights, middles, strict=True))
    # Each update counts as a point instead of an interval: an error of 1 / (12 updates^2).
    assert math.sqrt(variance) == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.28, 0.17)])
def test_gamma_and_sigma_rel_are_those_of_the_paper(sigma_rel: float, gamma: float) -> None:
    schedule = PowerFunction(sigma_rel=sigma_rel)
    assert round(schedule.gamma, 2) == gamma
    assert schedule.sigma_rel == pytest.approx(sigma_rel, rel=2**-50)
    assert PowerFunction(gamma=schedule.gamma) == schedule


@given(st.floats(0.0, 1e6))
@example(2.0**-52)  # its width is rounded to more than 1 / sqrt(12)
def test_gamma_is_found_from_sigma_rel(gamma: float) -> None:
    # sigma_rel is rounded by a few U; gamma is 3 times as sensitive near 0, in the absolute.
    found = PowerFunction(sigma_rel=PowerFunction(gamma=gamma).sigma_rel).gamma
    assert found == pytest.approx(gamma, rel=2**-48, abs=2**-48)


def test_the_widest_power_function_is_the_equal_average() -> None:
    assert PowerFunction(gamma=0.0)(7) == pytest.approx(EqualAverage()(7), rel=2**-50)
    assert PowerFunction(gamma=0.0).sigma_rel == pytest.approx(12**-0.5)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 1.0, float("nan"), float("inf")], ids=str)
def test_a_width_that_no_power_function_has_is_an_error(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match="Invalid sigma_rel") as error:
        PowerFunction(sigma_rel=sigma_rel)
    assert str(error.value) == (
        f"Invalid sigma_rel: {sigma_rel}. It is the profile's width: give a value above 0 and at "
        "most 0.2887."
    )


@pytest.mark.parametrize("gamma", [-1, -0.1, float("nan"), float("inf")], ids=str)
def test_an_exponent_below_0_is_an_error(gamma: float) -> None:
    with pytest.raises(ValueError, match="Invalid gamma") as error:
        PowerFunction(gamma=gamma)
    assert str(error.value) == (
        f"Invalid gamma: {gamma}. It is an exponent: give a finite value from 0 on."
    )


@pytest.mark.parametrize("arguments", [{}, {"sigma_rel": 0.1, "gamma": 6.94}], ids=str)
def test_a_power_function_has_one_of_its_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(TypeError, match=r"^PowerFunction got sigma_rel=.* Give exactly one\.$"):
        PowerFunction(**arguments)


@pytest.mark.parametrize("name", ["sigma_rel", "gamma"])
@pytest.mark.parametrize("value", ["0.1", True, 1j], ids=repr)
def test_what_is_no_number_is_no_argument_of_a_power_function(name: str, value: Any) -> None:
    with pytest.raises(TypeError) as error:
        PowerFunction(**{name: value})
    assert str(error.value) == (
        f"Invalid {name}: {value!r}, a {type(value).__name__}. Give a number."
    )
