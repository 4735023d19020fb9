"""What a bf16 or fp16 EMA promises in each precision: long runs, rounding, errors, mixtures."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ema_triton import ModelEMA
from tests.low_precision import (
    LOW,
    PRECISIONS,
    Z,
    accumulated,
    assert_nearest,
    assert_same_bits,
    move,
    no_warning,
    small,
    zoo,
)
from tests.states import saved
from tests.tolerances import update_bound

MOMENTUM, REPLICAS = 1e-4, 512


# An update of the stochastic kind takes some 0.35 ms on a CPU: fp16 has a quarter of them.
RUNS = [(torch.bfloat16, 20_000), (torch.float16, 5_000)]


def long_run(dtype: torch.dtype, precision: str, updates: int) -> tuple[ModelEMA, float]:
    """Updates of an EMA that starts at 1, and the float64 EMA of the same targets.

    They drift from 1.25 to 1.5 and back: every value is inside [1, 2).
    """
    model = nn.ParameterList([nn.Parameter(torch.ones(REPLICAS), requires_grad=False)])
    ema = ModelEMA(model, ema_dtype=dtype, precision=precision, backend="foreach", seed=1)
    truth = 1.0
    for step in range(updates):
        online = 1.25 + 0.25 * (1 - abs(1 - 2 * step / updates))
        online = float(torch.tensor(online, dtype=torch.float32))
        model[0].fill_(online)
        ema.update(MOMENTUM)
        truth += MOMENTUM * (online - truth)
    assert 1.1 < truth < 1.5  # far from where it started
    return ema, truth


@pytest.mark.parametrize(("dtype", "updates"), RUNS)
def test_exact_long_run_is_right(dtype: torch.dtype, updates: int) -> None:
    ema, truth = long_run(dtype, "exact", updates)
    # An fp32 update errs by at most eps * 2 (no value exceeds 2), the momentum's own rounding
    # included; what is there shrinks by 1 - momentum at each: in sum at most 2 eps / momentum.
    bound = 2 * torch.finfo(torch.float32).eps / MOMENTUM
    assert bound < (truth - 1) / 50
    assert (accumulated(ema)["0"].double() - truth).abs().max() <= bound
    half = torch.finfo(dtype).eps / 2
    assert (ema.ema_model[0].double() - truth).abs().max() <= bound + half


@pytest.mark.parametrize(("dtype", "updates"), RUNS)
def test_stochastic_long_run_is_right_in_the_mean(dtype: torch.dtype, updates: int) -> None:
    ema, truth = long_run(dtype, "stochastic", updates)
    shown = ema.ema_model[0].double()
    eps = torch.finfo(dtype).eps
    assert shown.min() >= 1
    assert shown.max() < 2
    # A step s from a representable value is rounded with a variance of at most |s| * spacing,
    # |s| <= momentum (targets and EMA are within 1 of each other), spacing <= eps below 2. Steps
    # are independent and shrink by 1 - momentum: momentum * eps / (1 - (1 - momentum)**2)
    # < 0.51 * eps in sum, for each of the replicas. Rounding in fp32 comes before, as above.
    deviation = (0.51 * eps) ** 0.5
    rounding = 2 * torch.finfo(torch.float32).eps / MOMENTUM
    bound = Z * deviation / REPLICAS**0.5 + rounding
    assert bound < (truth - 1) / 10
    assert abs(shown.mean() - truth) <= bound
    # A sample's deviation scatters by 1 in sqrt(2 * 512) = 32 parts; the bound is generous anyway.
    assert 0 < shown.std() < deviation * (1 + Z / 32)


@pytest.mark.parametrize(("dtype", "updates"), RUNS)
def test_nearest_long_run_stands_still_and_says_so(dtype: torch.dtype, updates: int) -> None:
    with pytest.warns(UserWarning, match="stands still") as caught:
        ema, _ = long_run(dtype, "nearest", updates)
    assert len(caught) == 1
    assert torch.equal(ema.ema_model[0].float(), torch.ones(REPLICAS))


def test_nearest_does_not_warn_where_the_dtype_resolves_the_momentum(
    backend: str, device: torch.device
) -> None:
    ema = ModelEMA(small(torch.bfloat16, device), precision="nearest", backend=backend)
    wide = ModelEMA(small(torch.float32, device), precision="nearest", backend=backend)
    with no_warning():
        ema.update(0.1)
        wide.update(1e-4)


@pytest.mark.parametrize("dtype", LOW)
def test_nearest_rounds_as_torch_does(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    ema = ModelEMA(zoo(dtype, device), precision="nearest", backend=backend)
    for step in range(3):
        before = {name: v.float() for name, v in ema.state_dict()["weights"].items()}
        move(ema.model, step)
        ema.update(0.25)
        for name, value in ema.model.named_parameters(remove_duplicate=False):
            # A quarter is exact: the sum is rounded to fp32 and then to nearest, both once.
            expected = torch.lerp(before[name], value.float(), 0.25).to(dtype)
            assert torch.equal(ema.state_dict()["weights"][name], expected)


@pytest.mark.parametrize("precision", ["kahan", "Exact", "", None, torch.float32])
def test_unknown_precision(precision: object) -> None:
    with pytest.raises(ValueError, match="'exact', 'stochastic', 'nearest'") as caught:
        ModelEMA(nn.Linear(2, 1), precision=precision)
    assert repr(precision) in str(caught.value)


@pytest.mark.parametrize("seed", [-1, True, 2**63, 1.0, "0", None])
def test_unknown_seed(seed: object) -> None:
    for precision in PRECISIONS:
        with pytest.raises(ValueError, match=re.escape("from 0 to 2**63 - 1")) as caught:
            ModelEMA(nn.Linear(2, 1), precision=precision, seed=seed)
        assert repr(seed) in str(caught.value)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_ends_of_the_seeds(seed: int) -> None:
    ema = ModelEMA(nn.Linear(2, 1).bfloat16(), precision="stochastic", seed=seed)
    ema.update(0.5)
    assert saved(ema.state_dict())["random_state"] == {"seed": seed, "updates": 1}


MIXED = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


@pytest.mark.parametrize("backend_name", ["foreach", "triton"])
@settings(max_examples=20)
@given(data=st.data())
def test_mixtures_of_dtypes(data: st.DataObject, backend_name: str) -> None:
    if backend_name == "triton":
        pytest.importorskip("triton")
    device = torch.device(
        "cuda" if backend_name == "triton" and torch.cuda.is_available() else "cpu"
    )
    kinds = data.draw(
        st.lists(
            st.tuples(st.sampled_from(MIXED), st.lists(st.integers(0, 9), max_size=3).map(tuple)),
            min_size=1,
            max_size=7,
        )
    )
    momenta = data.draw(
        st.lists(
            st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1, width=32)),
            min_size=1,
            max_size=5,
        )
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))

    def values() -> list[Tensor]:
        drawn = []
        for dtype, shape in kinds:
            value = torch.randn((*shape, 2), generator=generator, dtype=torch.float64)
            value = torch.view_as_complex(value) if dtype.is_complex else value[..., 0].clone()
            drawn.append(value.to(dtype).to(device))
        return drawn

    model = nn.ParameterList([nn.Parameter(value) for value in values()])
    exact = ModelEMA(model, backend=backend_name)
    wide = ModelEMA(model, backend=backend_name, ema_dtype=torch.float32)

    def real(value: Tensor) -> Tensor:
        value = value.detach()
        return torch.view_as_real(value) if value.is_complex() else value

    truth = [real(value).double().clone() for value in model]
    largest = [value.abs() for value in truth]
    for momentum in momenta:
        for parameter, value in zip(model, values(), strict=True):
            parameter.data.copy_(value)
        exact.update(momentum)
        wide.update(momentum)
        online = [real(value).double() for value in model]
        truth = [torch.lerp(e, o, momentum) for e, o in zip(truth, online, strict=True)]
        largest = [torch.maximum(a, o.abs()) for a, o in zip(largest, online, strict=True)]
    sums = accumulated(exact)
    for index, (dtype, _) in enumerate(kinds):
        shown, value = exact.ema_model[index], sums[str(index)]
        assert shown.dtype == dtype
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        # Each update errs by one bound at most, and an average never exceeds the largest value.
        bound = len(momenta) * update_bound(largest[index], largest[index], accumulator)
        error = (real(value).double() - truth[index]).abs()
        assert (error <= bound).all()
        if dtype in LOW:
            assert_same_bits({"": value}, {"": accumulated(wide)[str(index)]})
            assert_nearest(shown, value)
        else:
            assert torch.equal(shown, value)
