"""What the launcher passes on: one launch per bucket, momenta of either kind, one compilation."""

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA
from ema_triton.ops.precision import PRECISIONS
from tests.plans import plan_of, run

triton_backend = pytest.importorskip("ema_triton.ops.triton_backend")


class Launches:
    """Stands in for the kernel and notes how it was launched."""

    def __init__(self, kernel: object) -> None:
        self.kernel, self.grids, self.arguments = kernel, [], []

    def __getitem__(self, grid: tuple[int]):
        def launch_and_note(*args: object, **kwargs: object) -> None:
            self.grids.append(grid)
            self.arguments.append((args, kwargs))
            self.kernel[grid](*args, **kwargs)

        return launch_and_note

    def variants(self) -> set[tuple[str, ...]]:
        """What Triton would have compiled: dtypes of pointers, kinds of numbers, constexprs."""
        return {
            (*[str(getattr(arg, "dtype", type(arg))) for arg in args], str(sorted(kwargs.items())))
            for args, kwargs in self.arguments
        }


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches(triton_backend.ema_update)
    monkeypatch.setattr(triton_backend, "ema_update", found)
    return found


def test_one_launch_whatever_the_number_of_tensors(
    launches: Launches, kernel_device: torch.device
) -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(40)], nn.BatchNorm1d(3))
    ema = ModelEMA(model.to(kernel_device), backend="triton", handle_buffers="update")
    launches.grids.clear()
    ema.update(0.5)
    # 82 parameters and 2 averaged buffers, each a chunk; the integer buffer is copied aside.
    assert launches.grids == [(84,)]


def test_one_launch_per_dtype(launches: Launches, kernel_device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).bfloat16(), nn.Linear(3, 3).double())
    ema = ModelEMA(model.to(kernel_device), backend="triton")
    launches.grids.clear()
    ema.update(0.5)
    assert launches.grids == [(2,)] * 3


def test_a_changing_momentum_changes_nothing_that_is_compiled_in(
    launches: Launches, kernel_device: torch.device
) -> None:
    ema = ModelEMA(nn.Linear(3, 3).to(kernel_device), backend="triton")
    launches.arguments.clear()
    for momentum in (0.1, 0.2, 0.0, 0.999):
        ema.update(momentum)
    compiled_in = {
        (type(args[5]), args[6], *sorted(map(str, kwargs.items())))
        for args, kwargs in launches.arguments
    }
    # A float is no constexpr and is not specialised on; the annotation makes it a double.
    assert len(compiled_in) == 1
    assert compiled_in.pop()[0] is float


def test_preparing_compiles_and_averages_nothing(
    launches: Launches, kernel_device: torch.device
) -> None:
    model = nn.Linear(3, 3).to(kernel_device)
    ema = ModelEMA(model, backend="triton")
    assert launches.grids == [(0,)] * 3
    assert torch.equal(ema.ema_model.weight, model.weight)


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"momentum_scale": {"*": 0.5}}])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_update_needs_no_variant_that_preparing_did_not_compile(
    precision: str, options: dict, launches: Launches, kernel_device: torch.device
) -> None:
    model = nn.Sequential(nn.Linear(3, 3).bfloat16(), nn.Linear(3, 3)).to(kernel_device)
    ema = ModelEMA(model, backend="triton", precision=precision, exclude="1.bias", **options)
    prepared = launches.variants()
    tensor = torch.tensor(0.5, device=kernel_device)
    for momentum in (0.1, 0.0, 1.0, tensor):
        run(triton_backend, ema._planner.plan, momentum)
    assert launches.variants() == prepared
    run(triton_backend, ema._planner.plan, tensor.double())  # the control
    assert launches.variants() > prepared


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tensor_momentum_is_read_at_every_update(
    dtype: torch.dtype, kernel_device: torch.device
) -> None:
    model = nn.ParameterList([torch.ones(100, dtype=dtype, device=kernel_device)])
    twin = nn.ParameterList([torch.zeros(100, dtype=dtype, device=kernel_device)])
    plan = plan_of(model, twin)
    momentum = torch.tensor(0.25, device=kernel_device)
    run(triton_backend, plan, momentum)
    assert twin[0].eq(0.25).all()
    momentum.fill_(1.0)
    run(triton_backend, plan, momentum)
    assert twin[0].eq(1.0).all()


def with_gaps() -> Tensor:
    return torch.arange(8.0)[::2]


@pytest.mark.parametrize(
    ("online", "ema", "reason"),
    [
        (with_gaps(), torch.zeros(4), "not dense"),
        (torch.ones(4), torch.zeros(4).double(), "does not average torch.float32 into"),
        (torch.ones(4).double(), torch.zeros(4), "does not average torch.float64 into"),
    ],
)
def test_what_the_kernel_cannot_take_is_said_and_averaged(
    online: Tensor, ema: Tensor, reason: str, kernel_device: torch.device
) -> None:
    model = nn.ParameterList([torch.empty(0, dtype=online.dtype), torch.ones(3)])
    # Tensor.to would close the gaps.
    model[0].data = torch.empty_strided(
        online.shape, online.stride(), dtype=online.dtype, device=kernel_device
    ).copy_(online)
    model[1].data = model[1].data.to(kernel_device)
    twin = nn.ParameterList([ema, torch.zeros(3)]).to(kernel_device)
    average = ModelEMA(model, ema_model=twin, backend="triton")
    assert average.backend == "triton"
    assert "averages 1 tensor(s) such as '0'" in average.backend_reason
    assert reason in average.backend_reason
    average.update(0.5)
    assert torch.equal(twin[0], (online * 0.5).to(twin[0]))
    assert twin[1].eq(0.5).all()
