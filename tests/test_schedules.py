"""Each schedule against its formula in 80 digits, Ignite's warm-up, and what is refused.

Bounds are in units of U, the largest relative error of one rounding; math's functions are within
one ulp, 2 U. Errors are added to first order, and one more U covers the products of errors.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ema_triton import schedules
from ema_triton.schedules import (
    Constant,
    CosineRamp,
    CountWarmup,
    EqualAverage,
    ExponentialRamp,
    HalfLife,
    HalfLifeFraction,
    InverseDecay,
    LinearWarmup,
    PowerFunction,
    schedule_from_state,
    schedule_to_state,
)

U = 2.0**-53
DIGITS = 80
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")

ONE_OF_EACH = [
    Constant(0.3),
    LinearWarmup(0.9, 0.1, 5),
    InverseDecay(2.0, 0.75, 0.1, 0.99),
    CountWarmup(0.8),
    ExponentialRamp(0.9, 4.0),
    CosineRamp(0.6, 9),
    HalfLife(3.0, 2),
    HalfLifeFraction(0.3),
    EqualAverage(),
    PowerFunction(gamma=3.0),
]
each = pytest.mark.parametrize("schedule", ONE_OF_EACH, ids=lambda s: type(s).__name__)

INDICES = [*range(1, 40), 99, 100, 101, 1000, 12_345, 999_999, 1_000_000, 1_000_001, 10**9]

FRACTIONS = st.floats(0.0, 1.0)
POSITIVE = st.floats(min_value=5e-324, max_value=1.7e308)
COUNTS = st.integers(1, 2**63)


@st.composite
def inverse_decays(draw: st.DrawFn) -> InverseDecay:
    low, high = sorted((draw(FRACTIONS), draw(FRACTIONS)))
    return InverseDecay(draw(POSITIVE), draw(POSITIVE), low, high)


ANY_SCHEDULE = st.one_of(
    st.builds(Constant, FRACTIONS),
    st.builds(LinearWarmup, FRACTIONS, FRACTIONS, COUNTS),
    inverse_decays(),
    st.builds(CountWarmup, FRACTIONS),
    st.builds(ExponentialRamp, FRACTIONS, POSITIVE),
    st.builds(CosineRamp, FRACTIONS, COUNTS),
    st.builds(HalfLife, POSITIVE, COUNTS),
    st.builds(HalfLifeFraction, POSITIVE),
    st.builds(EqualAverage),
    st.builds(PowerFunction, gamma=st.one_of(st.just(0.0), POSITIVE)),
    st.builds(PowerFunction, sigma_rel=st.floats(2.3e-308, 12**-0.5)),
)


def cosine(x: Decimal) -> Decimal:
    term = total = Decimal(1)
    n = 0
    while abs(term) > Decimal(10) ** -DIGITS:
        n += 2
        term *= -x * x / (n * (n - 1))
        total += term
    return total


def inverse_decay(s: InverseDecay, t: int) -> Decimal:
    decay = 1 - (1 + Decimal(t - 1) / Decimal(s.gamma)) ** -Decimal(s.power)
    return min(max(decay, Decimal(s.min_decay)), Decimal(s.max_decay))


def exponential_ramp(s: ExponentialRamp, t: int) -> Decimal:
    return Decimal(s.decay) * (1 - (-t / Decimal(s.tau)).exp())


def cosine_ramp(s: CosineRamp, t: int) -> Decimal:
    k = min(t - 1, s.updates)
    return 1 - (1 - Decimal(s.base_decay)) * (cosine(PI * k / s.updates) + 1) / 2


def half_life(s: HalfLife, t: int) -> Decimal:
    return Decimal("0.5") ** (s.every / Decimal(s.half_life))


def half_life_fraction(s: HalfLifeFraction, t: int) -> Decimal:
    return Decimal("0.5") ** (1 / (Decimal(s.fraction) * t))


def power_function(s: PowerFunction, t: int) -> Decimal:
    return (1 - 1 / Decimal(t)) ** (Decimal(s.gamma) + 1)


def error_in_u(
    momentum: float, schedule: Any, decay_of: Callable[[Any, int], Decimal], t: int
) -> float:
    """Relative error against 1 - decay, the decay being written as its source writes it."""
    with localcontext() as context:
        context.prec = DIGITS
        truth = 1 - decay_of(schedule, t)
        if truth < Decimal(10) ** (20 - DIGITS):
            # All that is left is the error of the 80 digits: the truth is 0.
            return 0.0 if momentum == 0 else math.inf
        return float(abs(Decimal(momentum) / truth - 1)) / U


def test_constant_is_constant() -> None:
    assert [Constant(0.1)(t) for t in INDICES] == [0.1] * len(INDICES)


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.5, 0.75, 0.999, 0.9999, 1 - 2.0**-40, 1.0])
def test_count_warmup_is_the_rounded_formula(decay: float) -> None:
    # Both terms are rounded once, and rounding keeps their order.
    for t in INDICES:
        expected = 1 - min(Fraction(decay), Fraction(1 + t, 10 + t))
        assert CountWarmup(decay)(t) == float(expected)


@pytest.mark.parametrize("power", [0.5, 2 / 3, 0.75, 1.0, 3.0])
@pytest.mark.parametrize("gamma", [0.1, 1.0, 7.0, 1e6])
@pytest.mark.parametrize("ends", [(0.0, 0.9999), (0.0, 1.0), (0.3, 0.7), (1.0, 1.0), (0.0, 0.0)])
def test_inverse_decay(gamma: float, power: float, ends: tuple[float, float]) -> None:
    schedule = InverseDecay(gamma, power, *ends)
    # The base is a quotient and a sum, 2 U, which the power multiplies; the power itself 2 U.
    # Clipping adds none: an end is rounded once.
    for t in INDICES:
        assert error_in_u(schedule(t), schedule, inverse_decay, t) <= 2 * power + 3


@pytest.mark.parametrize("tau", [0.5, 3.0, 100.0, 2000.0, 1e7])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.9999, 1.0])
def test_exponential_ramp(decay: float, tau: float) -> None:
    schedule = ExponentialRamp(decay, tau)
    # The exponent x is rounded, so x U; the exponential 2 U, a product, a sum: U each; 1 - decay,
    # U, is the other term of a sum without cancellation.
    for t in (t for t in INDICES if t / tau <= 80):
        assert error_in_u(schedule(t), schedule, exponential_ramp, t) <= t / tau + 5


@pytest.mark.parametrize("updates", [1, 2, 7, 100, 1_000_000, 10**9])
@pytest.mark.parametrize("base_decay", [0.0, 0.5, 0.99, 0.996, 0.9999, 1.0])
def test_cosine_ramp(base_decay: float, updates: int) -> None:
    schedule = CosineRamp(base_decay, updates)
    # The angle: pi, a quotient and a product, 3 U, which the sine does not enlarge; the sine 2 U;
    # so its square 10 U, and 2 U to take it; 1 - base 1 U and the product 1 U.
    for t in {*INDICES, max(1, updates - 1), updates, updates + 1}:
        assert error_in_u(schedule(t), schedule, cosine_ramp, t) <= 15


@pytest.mark.parametrize("every", [1, 2, 10, 1000])
@pytest.mark.parametrize("steps", [0.25, 1.0, 3.0, 1000.0, 1e6, 1e12, 1e18])
def test_half_life(steps: float, every: int) -> None:
    schedule = HalfLife(steps, every)
    # log(2) 2 U, a product and a quotient, so 4 U, which expm1 does not enlarge; expm1 2 U.
    if every / steps < 100:
        assert error_in_u(schedule(1), schedule, half_life, 1) <= 7
    assert {schedule(t) for t in INDICES} == {schedule(1)}


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 1.0, 50.0])
def test_half_life_fraction(fraction: float) -> None:
    schedule = HalfLifeFraction(fraction)
    # As above: log(2) 2 U, a product and a quotient; expm1 2 U.
    for t in (t for t in INDICES if fraction * t > 0.01):
        assert error_in_u(schedule(t), schedule, half_life_fraction, t) <= 7


def test_equal_average_is_the_rounded_quotient() -> None:
    assert [EqualAverage()(t) for t in INDICES] == [float(Fraction(1, t)) for t in INDICES]


@pytest.mark.parametrize("gamma", [0.0, 0.169, 1.0, 6.94, 16.97, 400.0, 1e6])
def test_power_function(gamma: float) -> None:
    schedule = PowerFunction(gamma=gamma)
    # -1 / t is rounded, and its logarithm enlarges that by at most 1.45 from t = 2 on; log1p 2 U,
    # a sum and a product, 2 U, which expm1 does not enlarge; expm1 2 U.
    for t in (t for t in INDICES if gamma < 100 * t):
        assert error_in_u(schedule(t), schedule, power_function, t) <= 9


def test_control_one_minus_decay_loses_the_digits() -> None:
    n = 1_000_000
    naive_and_bound = [
        (1 - 0.5 ** (1 / (0.5 * (10**9 + 1))), HalfLifeFraction(0.5), half_life_fraction),
        (1 - (1 - 1 / (10**9 + 1)) ** 7.94, PowerFunction(gamma=6.94), power_function),
        (1 - (1 - (1 + 10**9) ** -0.75), InverseDecay(power=0.75, max_decay=1.0), inverse_decay),
        (1 - (1 - math.exp(-(10**9) / 5e7)), ExponentialRamp(1.0, 5e7), exponential_ramp),
        (1 - 0.5 ** (1 / 1e12), HalfLife(1e12), half_life),
    ]
    for naive, schedule, decay_of in naive_and_bound:
        assert error_in_u(naive, schedule, decay_of, 10**9 + 1) > 1e5
    last = CosineRamp(0.996, n)
    naive_cosine = (1 - 0.996) * (math.cos(math.pi * (n - 1) / n) + 1) / 2
    naive_sine = (1 - 0.996) * math.sin(math.pi * (1 - (n - 1) / n) / 2) ** 2
    assert error_in_u(naive_cosine, last, cosine_ramp, n) > 1e3
    assert error_in_u(naive_sine, last, cosine_ramp, n) > 1e3


WARMUPS = [
    pytest.param((start, end, n), id=f"{start}-{end}-{n}")
    for start, end in [(0.2, 0.002), (0.002, 0.2), (0.9, 0.2), (0.0, 1.0), (1.0, 0.0), (0.3, 0.3)]
    for n in [1, 2, 3, 7, 10, 100, 1001]
]


@pytest.mark.parametrize("warmup", WARMUPS)
def test_linear_warmup(warmup: tuple[float, float, int]) -> None:
    start, end, n = warmup
    schedule = LinearWarmup(start, end, n)
    # A difference, a product, a quotient, a sum: each rounded value is at most the larger end.
    bound = 5 * U * max(start, end)
    slope = (Fraction(end) - Fraction(start)) / max(1, n - 1)
    for t in range(1, n):
        assert abs(Fraction(schedule(t)) - (Fraction(start) + slope * (t - 1))) <= bound
    assert schedule(1) == start
    for t in (max(2, n), n + 1, n + 2, 10 * n + 1, 10**12):
        assert schedule(t) == end


@pytest.mark.parametrize("warmup", WARMUPS)
def test_linear_warmup_is_ignites_to_the_bit_until_its_end(
    warmup: tuple[float, float, int],
) -> None:
    ignite = pytest.importorskip("ignite.handlers.ema_handler")
    start, end, n = warmup
    ours, theirs = LinearWarmup(start, end, n), ignite.EMAWarmUp(start, n, end)
    for t in range(1, max(2, n)):
        assert ours(t) == theirs(t)
    # At the end theirs keeps the roundings of the formula, bounded as above.
    for t in range(max(2, n), n + 5):
        assert ours(t) == pytest.approx(theirs(t), rel=0, abs=5 * U * max(start, end))


def test_control_ignites_end_is_not_exact() -> None:
    ignite = pytest.importorskip("ignite.handlers.ema_handler")
    assert ignite.EMAWarmUp(0.9, 10, 0.2)(10) != 0.2
    assert LinearWarmup(0.9, 0.2, 10)(10) == 0.2


@given(FRACTIONS, FRACTIONS, COUNTS, COUNTS, COUNTS)
# One update before the end, where the roundings pass it: 0.3 + (0.9 - 0.3) > 0.9, and downwards.
@example(0.3, 0.9, 10**17, 10**17 - 2, 10**17 - 1)
@example(0.9, 0.3, 10**17, 10**17 - 2, 10**17 - 1)
def test_linear_warmup_is_monotone_in_either_direction(
    start: float, end: float, n: int, one: int, other: int
) -> None:
    schedule = LinearWarmup(start, end, n)
    first, second = sorted((one % (n + 2) + 1, other % (n + 2) + 1))
    earlier, later = schedule(first), schedule(second)
    if start <= end:
        assert start <= earlier <= later <= end
    else:
        assert start >= earlier >= later >= end


@pytest.mark.parametrize(
    ("schedule", "index", "expected"),
    [
        (InverseDecay(), 1, 1.0),
        (InverseDecay(min_decay=0.25), 1, 0.75),
        (InverseDecay(max_decay=0.75), 10**9, 0.25),
        (InverseDecay(max_decay=1.0, power=300.0), 10**9, 0.0),
        (CountWarmup(0.75), 10**9, 0.25),
        (CountWarmup(0.75), 1, 9 / 11),
        (ExponentialRamp(0.75), 10**9, 0.25),
        (ExponentialRamp(1.0), 10**9, 0.0),
        (CosineRamp(0.75, 10), 1, 0.25),
        (CosineRamp(0.75, 10), 11, 0.0),
        (CosineRamp(0.75, 10), 10**9, 0.0),
        (CosineRamp(0.75, 1), 1, 0.25),
        (CosineRamp(0.75, 1), 2, 0.0),
    ],
    ids=str,
)
def test_ends_are_exact(schedule: Callable[[int], float], index: int, expected: float) -> None:
    assert schedule(index) == expected


@given(ANY_SCHEDULE, st.integers(1, 2**63))
def test_a_momentum_is_a_float_between_0_and_1(
    schedule: Callable[[int], float], index: int
) -> None:
    for t in (1, 2, index):
        momentum = schedule(t)
        assert type(momentum) is float
        assert 0 <= momentum <= 1


@pytest.mark.parametrize("steps", [100.0, 1000.0, 1e6])
@pytest.mark.parametrize("every", [1, 2, 5, 10, 100])
def test_the_half_life_does_not_depend_on_every(steps: float, every: int) -> None:
    with localcontext() as context:
        context.prec = DIGITS
        decay = 1 - Decimal(HalfLife(steps, every)(1))
        for half_lives in (1, 3):
            kept = decay ** (half_lives * int(steps) // every)
            # A momentum m is within 7 U m; m <= log(2) every / steps, and decay >= 1/2, so that
            # (steps / every) updates are within 7 U * 2 log(2) < 10 U.
            assert abs(kept * 2**half_lives - 1) <= 10 * half_lives * Decimal(U)


def test_control_a_constant_momentum_depends_on_every() -> None:
    momentum = HalfLife(100)(1)
    assert (1 - momentum) ** (100 // 10) > 0.9


@each
def test_schedules_are_frozen(schedule: Any) -> None:
    for field in fields(schedule):
        with pytest.raises(FrozenInstanceError):
            setattr(schedule, field.name, 0.5)


@each
def test_schedules_print_as_they_are_written(schedule: Any) -> None:
    assert eval(repr(schedule), vars(schedules)) == schedule


@each
def test_schedules_compare_by_value(schedule: Any) -> None:
    assert replace(schedule) is not schedule
    assert replace(schedule) == schedule
    assert hash(replace(schedule)) == hash(schedule)
    assert [other for other in ONE_OF_EACH if other == schedule] == [schedule]
    for field in fields(schedule):
        value = getattr(schedule, field.name)
        changed = value + 1 if type(value) is int else value / 2
        assert replace(schedule, **{field.name: changed}) != schedule


def test_the_same_values_in_another_class_are_another_schedule() -> None:
    assert Constant(0.5) != CountWarmup(0.5)


@pytest.mark.parametrize("number", [1, np.float32(0.5), np.float64(0.1), Fraction(1, 3)], ids=repr)
def test_numbers_become_plain_floats(number: Any) -> None:
    schedule = InverseDecay(number, number, 0, 1)
    assert [type(getattr(schedule, field.name)) for field in fields(schedule)] == [float] * 4
    assert schedule.gamma == float(number)
    assert schedule == InverseDecay(float(number), float(number), 0.0, 1.0)


def test_integers_become_plain_ints() -> None:
    schedule = HalfLife(3, every=np.int64(2))
    assert type(schedule.every) is int
    assert schedule == HalfLife(3.0, 2)


@each
@pytest.mark.parametrize("index", [0, -1, -(10**30)])
def test_an_index_below_1_is_an_error(schedule: Callable[[int], float], index: int) -> None:
    with pytest.raises(ValueError, match=rf"^Invalid update index: {index}\. .*counted from 1"):
        schedule(index)


@each
@pytest.mark.parametrize("index", [1.0, 1.5, "1", None, float("nan"), np.float32(1)], ids=repr)
def test_an_index_that_is_no_int_is_an_error(schedule: Callable[[int], float], index: Any) -> None:
    kind = re.escape(type(index).__name__)
    with pytest.raises(TypeError, match=f"'[a-z.]*{kind}' object cannot be interpreted as an int"):
        schedule(index)


@each
def test_an_index_of_numpy_is_an_int(schedule: Callable[[int], float]) -> None:
    momenta = [schedule(index) for index in np.arange(1, 30)]
    assert momenta == [schedule(index) for index in range(1, 30)]
    assert {type(momentum) for momentum in momenta} == {float}


NAN, INF = float("nan"), float("inf")
FRACTION_FIELDS = [
    (Constant, "momentum"),
    (LinearWarmup, "momentum"),
    (LinearWarmup, "momentum_warmup"),
    (InverseDecay, "min_decay"),
    (InverseDecay, "max_decay"),
    (CountWarmup, "decay"),
    (ExponentialRamp, "decay"),
    (CosineRamp, "base_decay"),
]
POSITIVE_FIELDS = [
    (InverseDecay, "gamma", "a scale in updates"),
    (InverseDecay, "power", "an exponent, and without it the decay would never rise"),
    (ExponentialRamp, "tau", "a time constant in updates"),
    (HalfLife, "half_life", "a number of steps"),
    (HalfLifeFraction, "fraction", "a part of the updates so far"),
]
COUNT_FIELDS = [(LinearWarmup, "warmup_iters"), (CosineRamp, "updates"), (HalfLife, "every")]
VALID = {type(schedule): schedule for schedule in ONE_OF_EACH}


def refusal(kind: type, name: str, value: Any, error: type[Exception]) -> str:
    """The text with which `kind` refuses this value of a field, the others being valid."""
    arguments = {field.name: getattr(VALID[kind], field.name) for field in fields(kind)}
    with pytest.raises(error) as caught:
        kind(**arguments | {name: value})
    return str(caught.value)


def test_every_field_is_checked() -> None:
    checked = {(kind, name) for kind, name, *_ in FRACTION_FIELDS + POSITIVE_FIELDS + COUNT_FIELDS}
    checked |= {(PowerFunction, "gamma")}  # above, with sigma_rel
    assert checked == {(kind, field.name) for kind in VALID for field in fields(kind)}


@pytest.mark.parametrize(
    "value",
    [-0.1, 1.5, 5, -1, -5e-324, 1 + 2**-52, NAN, INF, -INF],
    ids=str,
)
@pytest.mark.parametrize(("kind", "name"), FRACTION_FIELDS)
def test_a_fraction_outside_its_range_is_an_error(kind: type, name: str, value: float) -> None:
    assert refusal(kind, name, value, ValueError) == (
        f"Invalid {name}: {value}. Outside [0, 1] the EMA is no average and may diverge: give a "
        "value in [0, 1]."
    )


@pytest.mark.parametrize("value", [0, 0.0, -1, -0.5, NAN, INF, -INF], ids=str)
@pytest.mark.parametrize(("kind", "name", "meaning"), POSITIVE_FIELDS)
def test_a_scale_that_is_not_positive_is_an_error(
    kind: type, name: str, meaning: str, value: float
) -> None:
    assert refusal(kind, name, value, ValueError) == (
        f"Invalid {name}: {value}. It is {meaning}: give a finite value above 0."
    )


@pytest.mark.parametrize("value", [0, -3, -(10**30)], ids=str)
@pytest.mark.parametrize(("kind", "name"), COUNT_FIELDS)
def test_a_count_below_its_least_is_an_error(kind: type, name: str, value: int) -> None:
    least = 0 if kind is LinearWarmup else 1
    if value >= least:
        assert kind(0.5, 0.1, value) == kind(0.5, 0.1, 0)  # no error
        return
    assert refusal(kind, name, value, ValueError) == (
        f"Invalid {name}: {value}. It counts updates or steps: give at least {least}."
    )


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (3.0, 3),
        (1e4, 10_000),
        (0.1 * 30, 3),
        (0.1 * 70, 7),
        (np.float32(5), 5),
        (Fraction(8, 2), 4),
    ],
    ids=repr,
)
@pytest.mark.parametrize(("kind", "name"), COUNT_FIELDS)
def test_integral_numbers_are_counts(kind: type, name: str, value: Any, count: int) -> None:
    arguments = {field.name: getattr(VALID[kind], field.name) for field in fields(kind)}
    found = getattr(kind(**arguments | {name: value}), name)
    assert (type(found), found) == (int, count)


@pytest.mark.parametrize("value", ["0.1", None, True, False, 1j, [0.1], Decimal("0.1")], ids=repr)
@pytest.mark.parametrize(
    ("kind", "name"), FRACTION_FIELDS + [(kind, name) for kind, name, _ in POSITIVE_FIELDS]
)
def test_what_is_no_number_is_an_error(kind: type, name: str, value: Any) -> None:
    assert refusal(kind, name, value, TypeError) == (
        f"Invalid {name}: {value!r}, a {type(value).__name__}. Give a number."
    )


@pytest.mark.parametrize("value", [2.5, 3 + 1e-9, NAN, INF, "3", None, True], ids=repr)
@pytest.mark.parametrize(("kind", "name"), COUNT_FIELDS)
def test_what_is_no_integer_is_an_error(kind: type, name: str, value: Any) -> None:
    assert refusal(kind, name, value, TypeError) == (
        f"Invalid {name}: {value!r}, a {type(value).__name__}. It counts updates or steps: give an "
        "integer."
    )


def test_decays_in_the_wrong_order_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^Invalid min_decay: 0\.9, above max_decay=0\.5, .*Give"):
        InverseDecay(min_decay=0.9, max_decay=0.5)


@given(ANY_SCHEDULE)
def test_a_schedule_is_its_state(schedule: Callable[[int], float]) -> None:
    state = schedule_to_state(schedule)
    assert state is not None
    assert {type(value) for value in state.values()} <= {str, int, float}
    for saved in (state, json.loads(json.dumps(state))):
        restored = schedule_from_state(saved)
        assert restored == schedule
        assert type(restored) is type(schedule)


@each
def test_a_state_is_the_name_and_the_fields(schedule: Any) -> None:
    expected = {field.name: getattr(schedule, field.name) for field in fields(schedule)}
    assert schedule_to_state(schedule) == {"name": type(schedule).__name__} | expected


def test_a_state_is_not_changed_by_restoring_it() -> None:
    state = {"name": "Constant", "momentum": 0.5}
    schedule_from_state(state)
    assert state == {"name": "Constant", "momentum": 0.5}


def test_any_other_function_has_no_state() -> None:
    class Derived(Constant):
        pass

    namesake = type("Constant", (), {"__call__": lambda self, index: 0.5})
    for function in (lambda index: 0.5, math.sqrt, Derived(0.5), namesake(), Constant):
        assert schedule_to_state(function) is None


KNOWN = (
    "Constant, LinearWarmup, InverseDecay, CountWarmup, ExponentialRamp, CosineRamp, HalfLife, "
    "HalfLifeFraction, EqualAverage, PowerFunction, Delayed"
)


@pytest.mark.parametrize(
    "state",
    [{"name": "Cubic", "momentum": 0.5}, {"momentum": 0.5}, {}, {"name": ["Constant"]}, "Cubic", 3],
    ids=repr,
)
def test_an_unknown_state_is_an_error(state: Any) -> None:
    with pytest.raises(ValueError, match="cannot be restored") as error:
        schedule_from_state(state)
    text = str(error.value)
    assert text.startswith(f"The saved schedule {state!r} cannot be restored (")
    assert text.endswith(f"The schedules of this one are {KNOWN}.")


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({"name": "Constant"}, "'momentum'"),
        ({"name": "Constant", "momentum": 0.5, "tau": 2}, "'tau'"),
        ({"name": "Constant", "momentum": 2.0}, "Invalid momentum: 2.0."),
        ({"name": "Constant", "momentum": 10**400}, "int too large"),
        ({"name": "HalfLife", "half_life": "3"}, "Invalid half_life: '3'"),
        ({"name": "Constant", 1: 0.5}, "keywords must be strings"),
        ({"name": "Delayed", "updates": 2}, "'schedule'"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_state_with_wrong_fields_is_an_error(state: Any, problem: str) -> None:
    with pytest.raises(ValueError, match="cannot be restored") as error:
        schedule_from_state(state)
    text = str(error.value)
    assert text.startswith(f"The saved schedule {state!r} cannot be restored (")
    assert problem in text
