"""Gram matrices against explicit profiles, EDM2's formulas as their limits, and the solution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ema_triton import Constant, EqualAverage, HalfLife, PowerFunction
from ema_triton.posthoc.log import ALL, Log, scaled
from ema_triton.posthoc.profiles import gram, momenta_of, profile, solve, spacing_needed

FP64 = torch.float64


class Explicit:
    """Averages as explicit weights over the sources, moved one event at a time."""

    def __init__(self, averages: int, events: int) -> None:
        self.weights = [[0.0] * (events + 1) for _ in range(averages)]
        for weights in self.weights:
            weights[0] = 1.0
        self.source = 0

    def event(self, momenta: list[float]) -> None:
        self.source += 1
        for weights, momentum in zip(self.weights, momenta, strict=True):
            for at in range(self.source):
                weights[at] *= 1 - momentum
            weights[self.source] = momentum


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[str], list[list[float]], list[tuple[int, int]]]:
    """Kinds of events, their momenta for three averages, and when which one had a snapshot."""
    kinds = draw(
        st.lists(st.sampled_from(["update"] * 4 + ["sync", "load_weights()"]), max_size=30)
    )
    fraction = st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1, width=32))
    momenta = [draw(st.lists(fraction, min_size=3, max_size=3)) for _ in kinds]
    times = st.tuples(st.integers(0, len(kinds)), st.integers(0, 2))
    return kinds, momenta, draw(st.lists(times, min_size=1, max_size=8))


@settings(max_examples=60, deadline=None)
@given(histories(), st.sampled_from([0.0, 0.1, 1.0, 3.0]), st.data())
def test_the_gram_matrix_is_that_of_explicit_profiles(history, factor, data) -> None:
    kinds, momenta, vectors = history
    log, explicit = Log("abc"), Explicit(3, len(kinds))
    for kind, of_averages in zip(kinds, momenta, strict=True):
        index = log.updates
        if kind == "update":
            log.record(ALL, kind, index, of_averages)
            explicit.event([1.0 if m == 1 else min(1.0, m * factor) for m in of_averages])
        else:
            average = data.draw(st.integers(ALL if kind == "sync" else 0, 2))
            log.record(average, kind, index)
            explicit.event([float(average in (ALL, one)) for one in range(3)])
    matrix, _ = log.matrix(factor, [], log.updates)
    # Frozen profiles are what the averages were then: play the events again up to each.
    frozen = []
    for end, average in vectors:
        then = Explicit(3, len(kinds))
        for row in matrix[:end].tolist():
            then.event(row)
        frozen.append(torch.tensor(then.weights[average], dtype=FP64))
    weights = torch.rand(log.updates, dtype=FP64) + 0.1
    wider, happened = log.matrix(factor, [Constant(0.3), weights], log.updates)
    assert torch.equal(wider[:, :3], matrix)
    expected = [
        min(1.0, 0.3 * factor) if kind == "update" else float(row.all())
        for kind, row in zip(kinds, matrix, strict=True)
    ]
    assert wider[:, 3].tolist() == pytest.approx(expected)
    updates = torch.tensor([kind == "update" for kind in kinds], dtype=torch.bool)
    if log.updates:
        found = profile(wider[:, 4])[1:]
        torch.testing.assert_close(found[updates], weights / weights.sum())
        assert float(found.sum()) == pytest.approx(1)
    assert happened.tolist() == updates.cumsum(0).tolist()
    last = Explicit(3, len(kinds))
    for row in matrix.tolist():
        last.event(row)
    assert last.weights == explicit.weights  # the log has what happened
    stacked = torch.stack(frozen)
    torch.testing.assert_close(gram(matrix, vectors), stacked @ stacked.T, rtol=1e-12, atol=1e-14)
    for (end, average), expected in zip(vectors, frozen, strict=True):
        found = profile(matrix[:end, average])
        torch.testing.assert_close(found, expected[: end + 1], rtol=1e-12, atol=1e-14)


def of(schedule, updates: int) -> Tensor:
    return torch.tensor([schedule(t) for t in range(1, updates + 1)], dtype=FP64)


@pytest.mark.parametrize(("a", "b"), [((0.05, 2000), (0.1, 3000)), ((0.1, 3000), (0.05, 3000))])
def test_edm2_inner_products_of_power_functions_are_the_limit(a, b) -> None:
    (sigma_a, end_a), (sigma_b, end_b) = a, b
    (gamma_a, gamma_b) = (PowerFunction(sigma_rel=s).gamma for s in (sigma_a, sigma_b))
    momenta = torch.stack([of(PowerFunction(sigma_rel=s), 3000) for s in (sigma_a, sigma_b)], 1)
    found = gram(momenta, [(end_a, 0), (end_b, 1)])[0, 1]
    exponent = gamma_b if end_a < end_b else -gamma_a
    continuous = (gamma_a + 1) * (gamma_b + 1) * (end_a / end_b) ** exponent
    continuous /= (gamma_a + gamma_b + 1) * max(end_a, end_b)
    # The continuous profile is taken at the updates' ends instead of over them: relative to the
    # result, half a step's slope, gamma / (2 t) for each of the two.
    assert float(found) == pytest.approx(continuous, rel=(gamma_a + gamma_b) / 2000)
    assert float(found) != pytest.approx(continuous, rel=1e-6)  # it is exact for the updates


def test_the_profile_of_a_power_function_has_its_width() -> None:
    for sigma in (0.03, 0.1, 0.25):
        weights = profile(of(PowerFunction(sigma_rel=sigma), 4000))[1:]
        place = torch.arange(1, 4001, dtype=FP64) / 4000
        mean = (weights * place).sum()
        width = ((weights * (place - mean) ** 2).sum()).sqrt()
        assert float(width) == pytest.approx(sigma, abs=1 / 4000)


def test_weights_known_in_advance_are_momenta() -> None:
    weights = torch.tensor([0.0, 0.0, 3.0, 1.0, 0.0, 4.0], dtype=FP64)
    found = profile(momenta_of(weights))
    torch.testing.assert_close(found, torch.cat([weights.new_zeros(1), weights / 8]))


def test_a_factor_scales_as_in_an_update() -> None:
    momenta = torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=FP64)
    assert scaled(momenta, 3.0).tolist() == pytest.approx([0.0, 0.6, 1.0, 1.0])
    assert scaled(momenta, 0.0).tolist() == [0.0, 0.0, 0.0, 1.0]


def system(target, snapshots: int, updates: int = 1600, eps: float = 1e-9, sigmas=(0.05, 0.1)):
    columns = [of(PowerFunction(sigma_rel=s), updates) for s in sigmas] + [of(target, updates)]
    momenta, every = torch.stack(columns, 1), updates // snapshots
    times = range(every, updates + 1, every)
    ends = [(end, a) for end in times for a in range(len(sigmas))] + [(updates, len(sigmas))]
    noise = torch.full([len(ends) - 1], eps, dtype=FP64)
    return momenta, ends, noise, solve(gram(momenta, ends), noise)[0]


@pytest.mark.parametrize(
    ("sigma", "percent", "gain"), [(0.07, 0.1, 0.9), (0.03, 1.1, 5.3), (0.02, 4.0, 14)]
)
def test_errors_and_gains_are_those_computed_for_edm2(sigma, percent, gain) -> None:
    # With 32 snapshots of continuous profiles; of the discrete ones the first snapshots differ.
    *_, found = system(PowerFunction(sigma_rel=sigma), 32, 32 * 400)
    assert 100 * found.profile_error == pytest.approx(percent, rel=0.15)
    assert found.noise_gain == pytest.approx(gain, rel=0.1)


def test_the_profile_error_is_that_of_the_explicit_profiles() -> None:
    momenta, ends, _, found = system(HalfLife(150), 16)
    columns = [profile(momenta[:end, column]) for end, column in ends]
    padded = [torch.nn.functional.pad(one, (0, 1601 - len(one))) for one in columns]
    difference = padded[-1] - torch.stack(padded[:-1], 1) @ found.coefficients
    expected = float(difference.norm() / padded[-1].norm())
    assert found.profile_error == pytest.approx(expected, rel=1e-6)
    assert float(found.coefficients.sum()) == pytest.approx(1, abs=1e-9)


def test_no_other_coefficients_of_sum_1_are_better() -> None:
    momenta, ends, noise, found = system(HalfLife(150), 8, eps=1e-3)
    matrix, x = gram(momenta, ends), found.coefficients

    def error(x: Tensor) -> float:
        square = matrix[-1, -1]
        off = x @ matrix[:-1, :-1] @ x - 2 * x @ matrix[:-1, -1] + square
        return float(off / square + ((noise * x) ** 2).sum()) ** 0.5

    assert found.expected_error == pytest.approx(error(x), rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        step = torch.randn(len(x), dtype=FP64, generator=generator) * 1e-3
        assert error(x + step - step.mean()) > error(x)


def test_the_noise_of_bfloat16_is_held_down_by_the_ridge() -> None:
    target, eps = PowerFunction(sigma_rel=0.01), 0.2 * torch.finfo(torch.bfloat16).eps
    *_, plain = system(target, 128, 12800)
    *_, ridged = system(target, 128, 12800, eps=eps)
    assert ridged.noise_gain < 0.6 * plain.noise_gain
    assert ridged.expected_error < 0.8 * math.hypot(plain.profile_error, eps * plain.noise_gain)


def test_where_fp64_ends_the_condition_says_so() -> None:
    *_, fine = system(HalfLife(150), 16, eps=0.0)
    assert fine.condition < 1e9
    *_, ended = system(HalfLife(150), 80, eps=0.0, sigmas=(0.05, 0.07, 0.1, 0.12))
    assert ended.condition > 1e15
    assert ended.profile_error < fine.profile_error  # of what fp64 can tell, nothing is lost
    assert bool(ended.coefficients.isfinite().all())


def test_the_spacing_that_is_needed_is_enough_and_twice_of_it_is_not(monkeypatch) -> None:
    target = Constant(1 / 40)
    momenta, ends, noise, found = system(target, 8)
    assert found.profile_error > 0.02
    updates = torch.arange(1, 1601)
    every = spacing_needed(momenta, updates, ends[:-1], ends[-1], noise[0], 0.02)
    assert every is not None
    assert system(target, 1600 // every)[-1].profile_error < 0.02
    assert system(target, 800 // every)[-1].profile_error > 0.02
    momenta, ends, noise, _ = system(EqualAverage(), 8, sigmas=(0.02,))
    momenta[:, -1] = 1.0  # a single update's weights, which takes snapshots next to each other
    ends[-1] = (1597, 1)
    monkeypatch.setattr("ema_triton.posthoc.profiles.MOST", 64)
    assert spacing_needed(momenta, updates, ends[:-1], ends[-1], noise[0], 0.02) is None
