"""`precision="stochastic"`: each neighbour by its distance, drawn by seed, update and element."""

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA
from tests.low_precision import (
    LOW,
    Z,
    accumulated,
    assert_same_bits,
    assert_same_ema,
    magnitude,
    run,
    spacing,
    zoo,
)


def stochastic(values: Tensor, dtype: torch.dtype, backend: str, seed: int = 0) -> ModelEMA:
    """A stochastic EMA that an update by 1 sets to the rounded `values`."""
    model = nn.ParameterList([nn.Parameter(values, requires_grad=False)])
    return ModelEMA(model, ema_dtype=dtype, precision="stochastic", backend=backend, seed=seed)


# A quarter of a normal's spacing above 1; both sides of 0; subnormals; a large one; near a power
# of two, where the spacing changes. What is left of each, in units of its spacing, is its chance.
PARTS = (0.25, 0.5, 0.03, 0.9)


def between(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    starts = [0.0, tiny, 5 * tiny, info.smallest_normal - tiny, info.smallest_normal, 0.1, 1.0]
    starts += [2 - info.eps, 3.0, 1000.0, info.max / 4, info.max / 2]
    low = torch.tensor(starts, dtype=torch.float64).to(dtype)
    values = low.double()[:, None] + spacing(low, dtype)[:, None] * torch.tensor(PARTS).double()
    values = values.flatten()
    return torch.cat([values, -values]).float()


def z_scores(result: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Z-score of each value's count of draws away from zero; only its neighbours may occur."""
    values = values.double()
    count = result.shape[1]
    grid = values.abs().to(dtype).view(torch.int16).int()
    low = magnitude(grid, dtype)
    grid = torch.where(low > values.abs(), grid - 1, grid)
    low, high = magnitude(grid, dtype), magnitude(grid + 1, dtype)
    shown = result.double() * torch.where(values < 0, -1.0, 1.0)[:, None]
    away = shown == high[:, None]
    assert (away | (shown == low[:, None])).all()
    chance = (values.abs() - low) / (high - low)
    spread = (count * chance * (1 - chance)).sqrt()
    return (away.sum(1) - count * chance) / spread


@pytest.mark.parametrize("momentum", [1.0, 0.25])
@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_draws_each_neighbour_by_its_distance(
    dtype: torch.dtype, momentum: float, backend: str, device: torch.device
) -> None:
    values = between(dtype)
    if momentum < 1:
        # From 0 a quarter of the online value is exact; what underflows fp32 cannot be asked.
        values = values[(values.abs() < 2.0**14) & (values.abs() > 2.0**-120)]
    count = 2000
    online = (values / momentum)[:, None].repeat(1, count).to(device)
    ema = stochastic(torch.zeros_like(online), dtype, backend)
    ema.model[0].copy_(online)
    ema.update(momentum)
    result = ema.ema_model[0]
    assert result.dtype == dtype
    scores = z_scores(result.cpu(), values, dtype)
    assert scores.abs().max() < Z
    # A bias too small for one value shows in all: the sum is chi-squared, of variance 2 n.
    assert scores.square().sum() < len(values) + Z * (2 * len(values)) ** 0.5
    # Nearest rounding would not pass.
    assert z_scores(online.cpu().mul(momentum).to(dtype), values, dtype).abs().max() > 10


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_keeps_what_is_representable(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    values = torch.arange(-(2**15), 2**15, 5).to(torch.int16).view(dtype)
    values = values[values.isfinite()].to(device)
    ema = stochastic(values.float(), dtype, backend)
    assert_same_bits(accumulated(ema), {"0": values})
    for momentum in (0.25, 1.0, 1e-4):
        ema.update(momentum)
        assert torch.equal(ema.ema_model[0], values)


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_keeps_what_is_not_finite(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    special = torch.tensor([0x7F800000, 0x7FFFFFFF, 0x7F800001, 0x7FC00000, 0x7F80FFFF]).int()
    special = torch.cat([special, special | -(2**31)]).view(torch.float32)
    values = special[:, None].repeat(1, 500).to(device)
    shown = values.to(dtype)
    ema = stochastic(values, dtype, backend)
    assert_same_bits(accumulated(ema), {"0": shown})
    ema.sync()
    assert_same_bits(accumulated(ema), {"0": shown})
    ema = stochastic(torch.ones_like(values), dtype, backend)
    ema.model[0].copy_(values)
    ema.update(0.25)
    assert_same_bits(accumulated(ema), {"0": shown})
    ema.model[0].zero_()
    ema.update(0.25)
    lerp = torch.lerp(shown.float(), torch.zeros_like(values), 0.25).to(dtype)
    assert_same_bits(accumulated(ema), {"0": lerp})


def coins(
    backend: str,
    device: torch.device,
    seed: int = 0,
    updates: int = 1,
    count: int = 16_000,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """0 or 1 by element: whether 1 and a half spacing was rounded up by the last update."""
    info = torch.finfo(dtype)
    values = torch.full((count,), 1 + info.eps / 2, device=device)
    ema = stochastic(values, dtype, backend, seed)
    for _ in range(updates):
        ema.update(1.0)
    result = ema.ema_model[0]
    assert set(result.tolist()) == {1.0, 1 + info.eps}
    return (result > 1).double().cpu()


def correlation(left: Tensor, right: Tensor) -> float:
    """The correlation of two series of fair coins, in standard deviations."""
    return float(((2 * left - 1) * (2 * right - 1)).sum() / len(left) ** 0.5)


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_depends_on_seed_and_update_alone(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    first = coins(backend, device, dtype=dtype)
    torch.manual_seed(123)
    torch.rand(10, device=device)
    assert torch.equal(first, coins(backend, device, dtype=dtype))
    # An element's draw depends on its place, not on how many others there are.
    for count in (1, 7, 8, 9, 4099, 8192):
        few = stochastic(
            torch.full((count,), 1 + torch.finfo(dtype).eps / 2, device=device), dtype, backend
        )
        few.update(1.0)
        assert torch.equal((few.ema_model[0] > 1).double().cpu(), first[:count])
    others = [coins(backend, device, seed, dtype=dtype) for seed in (1, 2**32, 2**62, 2**63 - 1)]
    others += [coins(backend, device, 0, updates, dtype=dtype) for updates in (2, 3)]
    for other in others:
        assert not torch.equal(first, other)
    series = [first, *others]
    for i, left in enumerate(series):
        for right in series[:i]:
            assert abs(correlation(left, right)) < Z
    assert abs(correlation(first, first)) > 10 * Z


def test_stochastic_draws_of_neighbouring_elements_are_independent(
    backend: str, device: torch.device
) -> None:
    lanes = coins(backend, device).view(-1, 8)
    for i in range(8):
        for j in range(i):
            assert abs(correlation(lanes[:, i], lanes[:, j])) < Z
    flat = lanes.flatten()
    for lag in (8, 16, 256, 1024, 2048, 4096):
        assert abs(correlation(flat[lag:], flat[:-lag])) < Z


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_parameters_do_not_share_their_draws(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    value = torch.full((64, 64), 1 + torch.finfo(dtype).eps / 2, device=device)
    model = nn.ParameterList([nn.Parameter(value.clone(), requires_grad=False) for _ in range(3)])
    ema = ModelEMA(model, ema_dtype=dtype, precision="stochastic", backend=backend)
    ema.update(1.0)
    draws = [(shown > 1).double().flatten().cpu() for shown in ema.ema_model]
    for i in range(3):
        assert abs(correlation(draws[i], draws[i - 1])) < Z


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_is_the_same_under_both_backends(
    dtype: torch.dtype, kernel_device: torch.device
) -> None:
    pytest.importorskip("triton")
    emas = [
        ModelEMA(zoo(dtype, kernel_device), precision="stochastic", backend=backend, seed=9)
        for backend in ("foreach", "triton")
    ]
    for ema in emas:
        run(ema, range(4), 0.25)
    assert_same_ema(*emas)
