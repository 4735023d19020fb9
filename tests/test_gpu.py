"""What only a GPU shows: bits, streams, graphs, synchronisation, allocation, kernel counts.

`make gpu PYTHON=python3` runs these in that interpreter's environment.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from bench import measure
from ema_triton import ModelEMA
from ema_triton.ops.precision import PRECISIONS, join_residual
from tests import oracle
from tests.plans import plan_of, run
from tests.strategies import KERNEL_DTYPES, Layout
from tests.tolerances import assert_update, update_bound

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:momentum .* is below")]

SHAPES = [(), (1,), (7,), (8,), (63, 65), (3, 5, 7), (8192,), (8193,), (100_000,), (0, 4)]
MOMENTA = [0.0, 1e-4, 0.1, 0.4999999, 0.5, 0.9, 1.0]


def network(width: int = 64, depth: int = 20) -> nn.Sequential:
    layers = [nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(depth)]
    return nn.Sequential(*layers).cuda()


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def launched(update: Callable[[], object]) -> list[str]:
    """The names of the kernels that it launches."""
    found = measure.launched(update)
    if not found and not measure.launched(lambda: torch.ones(1, device="cuda")):
        pytest.skip("torch's profiler sees no kernel here: CUPTI is missing or not permitted")
    return found


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_fp32_equals_foreach_lerp_bit_by_bit(momentum: float, offset: int) -> None:
    triton_backend = pytest.importorskip("ema_triton.ops.triton_backend")
    cuda = torch.device("cuda")
    layouts = [Layout(shape, tuple(range(len(shape))), offset, 0) for shape in SHAPES]
    largest = torch.finfo(torch.float32).max
    online = [one.tensor(torch.float32, cuda, 1 + i, largest) for i, one in enumerate(layouts)]
    ema = [
        one.tensor(torch.float32, cuda, 50 + i, largest).clone() for i, one in enumerate(layouts)
    ]
    model = nn.ParameterList([torch.empty(0) for _ in online])
    twin = nn.ParameterList([tensor.clone() for tensor in ema])
    for parameter, tensor in zip(model, online, strict=True):
        parameter.data = tensor
    run(triton_backend, plan_of(model, twin), momentum)
    if momentum == 1:  # where torch's makes NaN of what is not finite in the EMA
        ema = [tensor.clone() for tensor in online]
    else:
        torch._foreach_lerp_(ema, online, momentum)
    for ours, theirs in zip(twin, ema, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        kept = ~theirs.isnan()
        assert torch.equal(ours[kept].view(torch.int32), theirs[kept].view(torch.int32))


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize(("ema_dtype", "online_dtype"), KERNEL_DTYPES)
def test_every_dtype_against_float64(
    ema_dtype: torch.dtype, online_dtype: torch.dtype, momentum: float
) -> None:
    for backend in ("triton", "foreach"):
        model = nn.ParameterList([torch.randn(s, dtype=online_dtype) for s in SHAPES]).cuda()
        twin = nn.ParameterList([torch.randn(s, dtype=ema_dtype) for s in SHAPES]).cuda()
        before = [tensor.detach().clone() for tensor in twin]
        ema = ModelEMA(model, ema_model=twin, backend=backend)
        assert ema.backend == backend
        ema.update(momentum)
        exact = momentum
        if ema_dtype != torch.float64:
            exact = torch.tensor(momentum, dtype=torch.float32).item()
        for old, new, result in zip(before, model, twin, strict=True):
            truth = oracle.lerp(old, new.detach(), exact)
            assert_update(result.detach(), truth, update_bound(old, new.detach(), ema_dtype))


LOW = [torch.bfloat16, torch.float16]


def exact_values(ema: ModelEMA) -> dict[str, Tensor]:
    """The fp32 values of an exact EMA, by name."""
    weights, residuals = (ema.state_dict()[part] for part in ("weights", "residuals"))
    return {name: join_residual(weights[name], residual) for name, residual in residuals.items()}


def shaken(
    precision: str, ema_dtype: torch.dtype, online_dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """What some updates with all momenta make of the EMA, the same online weights every time."""
    torch.manual_seed(3)
    model = nn.ParameterList([torch.randn(s) for s in SHAPES]).to(online_dtype).cuda()
    ema = ModelEMA(model, ema_dtype=ema_dtype, precision=precision, backend=backend)
    assert ema.backend == backend
    for momentum in reversed(MOMENTA):  # from 1, which forgets what was before
        shake(model)
        ema.update(momentum)
    if precision != "exact":
        return [tensor.detach() for tensor in ema.ema_model]
    values = exact_values(ema)
    return [values.get(str(i), tensor.detach()) for i, tensor in enumerate(ema.ema_model)]


@pytest.mark.parametrize("backend", ["triton", "foreach"])
@pytest.mark.parametrize("online_dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("ema_dtype", LOW)
def test_an_exact_ema_accumulates_as_fp32_bit_by_bit(
    ema_dtype: torch.dtype, online_dtype: torch.dtype, backend: str
) -> None:
    exact = shaken("exact", ema_dtype, online_dtype, backend)
    wide = shaken("nearest", torch.float32, online_dtype, backend)
    for ours, expected in zip(exact, wide, strict=True):
        assert torch.equal(ours.float(), expected)


@pytest.mark.parametrize("online_dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("ema_dtype", LOW)
def test_both_backends_round_alike_by_chance(
    ema_dtype: torch.dtype, online_dtype: torch.dtype
) -> None:
    found = [
        shaken("stochastic", ema_dtype, online_dtype, backend) for backend in ("triton", "foreach")
    ]
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)
    nearest = shaken("nearest", ema_dtype, online_dtype, "triton")
    assert not all(map(torch.equal, found[0], nearest))


@pytest.mark.parametrize("dtype", LOW)
def test_each_replay_of_a_graph_rounds_anew(dtype: torch.dtype) -> None:
    model = nn.ParameterList([torch.zeros(100_000, dtype=dtype)]).cuda()
    ema = ModelEMA(model, precision="stochastic", backend="triton")
    ema.update(0.0)
    with torch.no_grad():
        model[0].fill_(1.0)
    momentum = 1 / 3  # of 1, it lies between two numbers
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.update(momentum)
    found = []
    for _ in range(2):
        with torch.no_grad():
            ema.ema_model[0].zero_()
        graph.replay()
        found.append(ema.ema_model[0].detach().clone())
    assert ema.state_dict()["random_state"]["updates"] == 3
    assert not torch.equal(*found)
    low, high = found[0].unique().double().tolist()
    for values in found:
        # Bernoulli: 6 standard deviations of the mean of 100,000.
        error = (values.double().mean() - momentum).abs().item()
        assert error <= 6 * (high - low) / 2 / 100_000**0.5
    twin = ModelEMA(model, precision="stochastic", backend="triton")
    for update in range(3):  # the third update is the second replay
        twin.ema_model[0].data.zero_()
        twin.update(momentum if update else 0.0)
    assert torch.equal(twin.ema_model[0], found[1])


def test_an_exact_ema_that_was_written_before_the_capture_is_captured() -> None:
    model = nn.Linear(8, 8).cuda().bfloat16()
    model.weight.data.zero_()
    ema = ModelEMA(model, backend="triton")
    ema.update(0.5)
    with torch.no_grad():
        ema.ema_model.weight.fill_(8.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.update(0.5)
    graph.replay()
    assert ema.ema_model.weight.eq(4.0).all()


@pytest.mark.parametrize(("precision", "kernels"), [("exact", 1), ("stochastic", 2)])
@pytest.mark.parametrize("dtype", LOW)
def test_kernels_of_a_precision(precision: str, kernels: int, dtype: torch.dtype) -> None:
    """Stochastic rounding has one more, which counts the update, so that a graph counts too."""
    model = network().to(dtype)
    ema = ModelEMA(model, backend="triton", precision=precision)
    ema.update(0.5)
    found = launched(lambda: ema.update(0.25))
    assert len(found) == kernels, found
    assert sum("ema_update" in name for name in found) == 1


def test_auto_takes_triton() -> None:
    pytest.importorskip("triton")
    ema = ModelEMA(network())
    assert (ema.backend, ema.backend_reason) == ("triton", "Triton drives the device")


def test_one_kernel_per_bucket() -> None:
    model = nn.Sequential(network(), network().bfloat16())
    ema = ModelEMA(model, backend="triton", handle_buffers="update")
    ema.update(0.5)
    kernels = launched(lambda: ema.update(0.25))
    assert len(kernels) == 2, kernels
    assert all("ema_update" in name for name in kernels)


def test_a_copy_per_dtype() -> None:
    """ResNet-50 has 106 floating buffers and 53 integer ones, which a mixed list copies singly."""
    model = nn.Sequential(*[nn.BatchNorm1d(8) for _ in range(20)]).cuda()
    ema = ModelEMA(model, backend="triton")
    ema.update(0.5)
    kernels = launched(lambda: ema.update(0.25))
    assert len(kernels) == 3, kernels
    mixed = launched(lambda: torch._foreach_copy_([*ema.ema_model.buffers()], [*model.buffers()]))
    assert len(mixed) == 60, mixed  # the control


@contextmanager
def no_synchronisation() -> Iterator[None]:
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["triton", "foreach"])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    ("ema_dtype", "precision"),
    [
        (None, "exact"),
        (torch.bfloat16, "nearest"),
        (torch.bfloat16, "exact"),
        (torch.float16, "exact"),
        (torch.bfloat16, "stochastic"),
        (torch.float16, "stochastic"),
    ],
)
def test_an_update_neither_synchronises_nor_allocates(
    backend: str, as_tensor: bool, ema_dtype: torch.dtype | None, precision: str
) -> None:
    model = nn.Sequential(network(), nn.BatchNorm1d(64).cuda())
    ema = ModelEMA(model, backend=backend, ema_dtype=ema_dtype, precision=precision)
    momentum: float | Tensor = torch.tensor(0.1, device="cuda") if as_tensor else 0.1
    for _ in range(3):
        ema.update(momentum)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_synchronisation():
        for value in (0.1, 0.2, 0.3):
            ema.update(momentum if as_tensor else value)
    # foreach converts a tensor weight's dtype, and computes Philox's keys.
    if backend == "triton" or not (as_tensor or precision == "stochastic"):
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_the_synchronisation_check_can_fail() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronisation():
        torch.ones(1, device="cuda").item()


def test_a_captured_graph_follows_momentum_and_weights() -> None:
    pytest.importorskip("triton")
    model = network()
    ema = ModelEMA(model, backend="triton")
    momentum = torch.tensor(0.5, device="cuda")
    ema.update(momentum)
    shadow = [parameter.detach().double() for parameter in ema.ema_model.parameters()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.update(momentum)
    for value in (0.5, 0.25, 0.0, 1.0):
        shake(model)
        momentum.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        for index, (parameter, ours) in enumerate(
            zip(model.parameters(), ema.ema_model.parameters(), strict=True)
        ):
            shadow[index] = torch.lerp(shadow[index], parameter.detach().double(), value)
            # At most four updates, each within an eps of values below 32.
            bound = 4 * torch.finfo(torch.float32).eps * 32
            assert (ours.detach().double() - shadow[index]).abs().max() <= bound


def test_a_captured_float_is_frozen() -> None:
    """The control of the test above: a graph repeats the float that it captured."""
    model = nn.Linear(8, 8).cuda()
    ema = ModelEMA(model, backend="triton")
    nn.init.zeros_(ema.ema_model.weight)
    nn.init.ones_(model.weight)
    ema.update(0.0)
    graph = torch.cuda.CUDAGraph()
    momentum = 0.5
    with torch.cuda.graph(graph):
        ema.update(momentum)
    momentum = 1.0
    graph.replay()
    torch.cuda.synchronize()
    assert ema.ema_model.weight.eq(0.5).all()


# What raises has captured nothing by then.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_a_stale_plan_during_capture_is_an_error() -> None:
    model = nn.Linear(8, 8).cuda()
    ema = ModelEMA(model, backend="triton")
    ema.update(0.5)
    model.weight.data = model.weight.data.clone()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="graph is being captured"), torch.cuda.graph(graph):
        ema.update(0.5)
    torch.cuda.synchronize()
    ema.update(0.5)


def test_an_update_runs_on_the_current_stream() -> None:
    model = network(width=1024, depth=8)
    ema = ModelEMA(model, backend="triton")
    before = [parameter.detach().double() for parameter in ema.ema_model.parameters()]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for index, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            if index:
                stream.wait_stream(streams[index - 1])
            torch.cuda._sleep(10_000_000)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float(index))
            ema.update(0.5)
    torch.cuda.synchronize()
    for old, ours in zip(before, ema.ema_model.parameters(), strict=True):
        expected = ((old * 0.5 + 0.0) * 0.5 + 0.5) * 0.5 + 1.0
        torch.testing.assert_close(ours.detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_a_new_plan_has_what_an_update_on_another_stream_wrote() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).cuda()
    ema = ModelEMA(model, backend="triton")
    ema.update(0.0)
    shake(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # some 0.3 s
        ema.update(1.0)
    running = not stream.query()
    model[1].double()  # lays the bucket anew, by copies on this stream
    ema.update(0.0)
    assert running
    for ours, online in zip(ema.ema_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, online.to(ours.dtype))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_devices() -> None:
    model = nn.ModuleList([nn.Linear(8, 8).to(f"cuda:{index}") for index in range(2)])
    ema = ModelEMA(model, backend="triton")
    before = [p.detach().clone() for p in ema.ema_model.parameters()]
    shake(model)
    ema.update(0.5)
    for old, ours, online in zip(
        before, ema.ema_model.parameters(), model.parameters(), strict=True
    ):
        assert ours.device == online.device
        torch.testing.assert_close(ours, torch.lerp(old, online.detach(), 0.5))


def test_a_model_half_on_the_cpu() -> None:
    model = nn.ModuleList([nn.Linear(8, 8).cuda(), nn.Linear(8, 8)])
    ema = ModelEMA(model, backend="triton")
    assert "on cpu, which Triton does not drive" in ema.backend_reason
    shake(model)
    ema.update(1.0)
    for ours, online in zip(ema.ema_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, online)


def test_the_ema_follows_the_model_to_the_gpu_and_back() -> None:
    model = nn.BatchNorm1d(8)
    ema = ModelEMA(model)
    for device, backend in (("cuda", "triton"), ("cpu", "foreach")):
        model.to(device)
        ema.update(1.0)
        assert {tensor.device.type for tensor in ema.ema_model.state_dict().values()} == {device}
        if ema.backend != backend:
            pytest.importorskip("triton")
        assert ema.backend == backend


def test_a_momentum_on_another_device_is_an_error() -> None:
    ema = ModelEMA(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"momentum is a tensor on cuda:0, but 'bias' is on cpu"):
        ema.update(torch.tensor(0.5, device="cuda"))


# Bytes per element at the peak: both models and the bucket; beside an exact one the residuals, and
# the fp32 values that they are split from, twice.
AT_PEAK = {"nearest": 6, "stochastic": 6, "exact": 16}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bucket_beyond_two_to_the_31_elements(precision: str) -> None:
    size = 2**31 + 8192 + 3
    torch.cuda.empty_cache()
    free, needed = torch.cuda.mem_get_info()[0], AT_PEAK[precision] * size
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of GPU memory; {free / 1e9:.0f} GB are free")
    model = nn.ParameterList([torch.zeros(5), torch.zeros(1)]).bfloat16().cuda()
    model[1].data = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    twin = nn.ParameterList([torch.zeros(5), torch.zeros(1)]).bfloat16().cuda()
    twin[1].data = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    ema = ModelEMA(model, ema_model=twin, backend="triton", precision=precision)
    with torch.no_grad():
        model[1].fill_(1.0)
    ema.update(0.5)
    assert twin[1].eq(0.5).all()  # takes a byte per element, where a sum in fp64 takes 8


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_training_step() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)).cuda()
    ema = ModelEMA(model, backend="triton")
    shadow = [parameter.detach().double() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile
    def step(inputs: Tensor, momentum: float) -> None:
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(momentum)

    for index in range(1, 6):
        step(torch.randn(8, 16, device="cuda"), 1 / index)
        for position, parameter in enumerate(model.parameters()):
            shadow[position] = torch.lerp(shadow[position], parameter.detach().double(), 1 / index)
    for ours, truth in zip(ema.ema_model.parameters(), shadow, strict=True):
        torch.testing.assert_close(ours.detach().double(), truth, rtol=1e-6, atol=1e-6)


def test_no_update_compiles_or_loads_a_kernel() -> None:
    triton_backend = pytest.importorskip("ema_triton.ops.triton_backend")
    import triton

    compiled: list[object] = []
    runtime = triton.knobs.runtime
    with runtime.scope():
        runtime.jit_post_compile_hook = lambda **information: compiled.append(information)
        triton_backend.ema_update.device_caches.clear()  # of what other tests have compiled
        ema = ModelEMA(nn.Linear(8, 8).cuda(), backend="triton")
        assert len(compiled) == 3
        for momentum in (0.0, 0.5, 1.0, 1e-4, torch.tensor(0.5, device="cuda")):
            ema.update(momentum)
        assert len(compiled) == 3
        ema.update(torch.tensor(0.5, device="cuda", dtype=torch.float64))  # the control
        assert len(compiled) == 4


def test_the_first_update_with_a_tensor_may_be_captured() -> None:
    ema = ModelEMA(nn.Linear(8, 8).cuda(), backend="triton")
    shake(ema.model)
    momentum = torch.tensor(1.0, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.update(momentum)
    graph.replay()
    assert all(map(torch.equal, ema.ema_model.parameters(), ema.model.parameters()))
