"""What only a GPU shows of swaps, the non-finite guard, distances and following an optimizer."""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn

from ema_triton import Constant, ModelEMA
from ema_triton.ops import foreach_backend
from tests.test_gpu import LOW, launched, network, no_synchronisation, shake

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:momentum .* is below")]

DTYPES = [torch.float32, torch.float64, *LOW]


def values(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in model.parameters()]


@pytest.mark.parametrize("precision", ["exact", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_swap_exchanges_values_in_place_and_back(dtype: torch.dtype, precision: str) -> None:
    model = network().to(dtype)
    model.append(nn.Linear(7, 13, device="cuda", dtype=dtype))  # misaligned for the kernel
    ema = ModelEMA(model, backend="triton", precision=precision)
    shake(model)
    ema.update(0.3)
    online, averaged = values(model), values(ema.ema_model)
    addresses = [p.data_ptr() for p in (*model.parameters(), *ema.ema_model.parameters())]
    with ema.swapped():
        assert all(map(torch.equal, model.parameters(), averaged))
        assert all(map(torch.equal, ema.ema_model.parameters(), online))
    assert all(map(torch.equal, model.parameters(), online))
    assert all(map(torch.equal, ema.ema_model.parameters(), averaged))
    after = [p.data_ptr() for p in (*model.parameters(), *ema.ema_model.parameters())]
    assert after == addresses
    plan = ema._planner.plan
    ema.update(0.5)
    assert ema._planner.plan is plan  # no tensor moved


def test_a_swap_is_one_kernel_per_dtype_and_takes_no_memory() -> None:
    model = nn.Sequential(network(), network().bfloat16())
    ema = ModelEMA(model, backend="triton")
    with ema.swapped():
        pass  # compiles
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with ema.swapped():
        pass
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before
    swap = ema.swapped()
    kernels = launched(lambda: swap.__enter__())
    swap.__exit__(None, None, None)
    assert len(kernels) == 2, kernels
    assert all("exchange" in name for name in kernels)


@pytest.mark.parametrize("precision", ["exact", "stochastic", "nearest"])
@pytest.mark.parametrize("online_dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("ema_dtype", [torch.float32, *LOW])
def test_both_backends_spare_the_same_elements(
    ema_dtype: torch.dtype, online_dtype: torch.dtype, precision: str
) -> None:
    found = []
    for backend in ("triton", "foreach"):
        torch.manual_seed(0)
        model = nn.ParameterList([torch.randn(n) for n in (8192 * 3 + 8, 8191, 1)])
        model = model.to(online_dtype).cuda()
        kind = {"backend": backend, "precision": precision, "ema_dtype": ema_dtype}
        ema = ModelEMA(model, nonfinite="skip", **kind)
        clean = ModelEMA(model, **kind)
        with torch.no_grad():
            for tensor in model:
                tensor.add_(1)
        clean.update(0.5)
        with torch.no_grad():
            model[0][8191:8200:4] = float("inf")
            model[1][::1000] = float("nan")
        ema.update(0.5)
        bad = [~tensor.isfinite() for tensor in model]
        assert ema.nonfinite_count() == sum(int(mask.sum()) for mask in bad) == 3 + 9
        assert ema.nonfinite_counts() == {"0": 3, "1": 9, "2": 0}
        for ours, theirs, mask in zip(ema.ema_model, clean.ema_model, bad, strict=True):
            assert ours.isfinite().all()
            assert torch.equal(ours[~mask], theirs[~mask])
        found.append(values(ema.ema_model))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["triton", "foreach"])
def test_the_guard_does_not_wait_for_what_is_still_running(backend: str) -> None:
    model = network()
    ema = ModelEMA(model, backend=backend, nonfinite="skip")
    for _ in range(2):
        ema.update(0.1)
    torch.cuda.synchronize()
    with no_synchronisation():
        ema.update(0.2)
        ema.update(0.3)


def test_a_guarded_update_is_captured() -> None:
    model = network()
    ema = ModelEMA(model, backend="triton", nonfinite="skip")
    ema.update(0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.update(0.1)
    with torch.no_grad():
        next(model.parameters())[0, :3] = float("inf")
    graph.replay()
    graph.replay()
    assert ema.nonfinite_count() == 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_distance_is_what_a_cpu_measures(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = network().to(dtype).append(nn.Linear(7, 13, device="cuda", dtype=dtype))
    found = []
    for measured in (model, copy.deepcopy(model).cpu()):
        ema = ModelEMA(measured)
        with torch.no_grad():
            for tensor in ema.ema_model.parameters():
                tensor.mul_(2)
        found.append(ema.distance())
    (ours, theirs), elements = found, sum(p.numel() for p in model.parameters())
    assert ours.modules.keys() == theirs.modules.keys()
    # Sums of squares in fp64, in another order.
    bound = elements * torch.finfo(torch.float64).eps
    for one, other in ((ours, theirs), (ours.modules["20"], theirs.modules["20"])):
        assert one.distance == pytest.approx(other.distance, rel=bound)
        assert one.norm == pytest.approx(other.norm, rel=bound)
    assert ours.distance == pytest.approx(ours.norm, rel=bound)


def test_a_distance_waits_once_and_takes_the_memory_of_a_chunk() -> None:
    ema = ModelEMA(nn.Sequential(network(), network(2048, 4).bfloat16()))
    bound = 64 * foreach_backend.SCRATCH  # doubles, and where an exact EMA is joined
    assert sum(p.numel() * p.itemsize for p in ema.model.parameters()) > bound / 2
    ema.distance()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        caught.clear()  # of its notice, at the first use in a process, that it is a prototype
        ema.distance()
        torch.cuda.set_sync_debug_mode("default")
    assert [str(w.message) for w in caught if "synchroniz" not in str(w.message)] == []
    assert len(caught) == 1
    assert torch.cuda.max_memory_allocated() - before <= bound


def test_a_fused_optimizer_that_skips_its_step_is_no_step() -> None:
    model = nn.Linear(4, 1).cuda()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    ema = ModelEMA(model)
    ema.follow(optimizer, Constant(0.1))
    scaler = torch.amp.GradScaler("cuda")
    for value, updates in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        optimizer.zero_grad()
        scaler.scale(model(torch.full((1, 4), value, device="cuda")).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert ema.update_index == updates
