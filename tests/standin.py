"""A pytest plugin that runs the GPU tests on a CPU, as far as only the device's name matters.

`python -m pytest -p tests.standin -m gpu -ra`. What is asked for on "cuda" is on the CPU, NCCL is
gloo, and backend="auto" takes Triton's kernels. Where a test needs more of CUDA, it is skipped, and
the reason says what. So the tests' own logic is tried before they run on a GPU for the first time.
`--one-each` runs each test with the first of its parameters only.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from ema_triton import planner

# What reading one of these from torch.cuda means.
CUDA_ONLY = {
    "CUDAGraph": "CUDA graphs",
    "Event": "CUDA events",
    "Stream": "CUDA streams",
    "set_sync_debug_mode": "CUDA's synchronisation check",
    **dict.fromkeys(
        ["mem_get_info", "memory_allocated", "memory_stats", "reset_peak_memory_stats"],
        "CUDA's allocator",
    ),
}

TWO = "a second device"
NEEDED = {
    "test_an_update_neither_synchronises_nor_allocates": CUDA_ONLY["memory_stats"],
    "test_auto_takes_triton": "a device that Triton drives",
    "test_a_model_half_on_the_cpu": TWO,
    "test_the_ema_follows_the_model_to_the_gpu_and_back": TWO,
    "test_a_momentum_on_another_device_is_an_error": TWO,
    "test_a_compiled_training_step": "Inductor's code for a GPU",
    "test_a_fused_optimizer_that_skips_its_step_is_no_step": "GradScaler on a GPU",
    "test_figures_of_a_gpu": CUDA_ONLY["Event"],
    "test_an_invalidated_capture_leaves_a_gpu_as_it_was": CUDA_ONLY["CUDAGraph"],
    "test_no_update_compiles_or_loads_a_kernel": "compiled kernels",
}


class CpuForCuda(TorchFunctionMode):
    """Makes every tensor on the CPU that is asked for on a CUDA device."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.device:
            return on_cpu(function(*args, **(kwargs or {})))
        kwargs = {name: on_cpu(value) for name, value in (kwargs or {}).items()}
        return function(*map(on_cpu, args), **kwargs)


class CpuGenerator(torch.Generator):
    """A generator on the CPU, whatever its device was to be."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return super().__new__(cls, on_cpu(device))


def on_cpu(value: Any) -> Any:
    """The CPU for any name of a CUDA device; anything else as it is."""
    is_cuda = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
    return torch.device("cpu") if is_cuda else value


def skipping(reason: str) -> Any:
    """A function that skips the test that calls it."""

    def skip(*args: object, **kwargs: object) -> None:
        pytest.skip(f"needs {reason}")

    return skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-each", action="store_true", help="only each test's first parameters")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Take off the mark with which conftest.py skips GPU tests; skip what a CPU cannot run."""
    for item in items:
        item.own_markers = [
            mark for mark in item.own_markers if mark.kwargs.get("reason") != "needs a GPU"
        ]
        if reason := NEEDED.get(item.originalname):
            item.add_marker(pytest.mark.skip(reason=f"needs {reason}"))
    if config.getoption("--one-each"):
        first = {(item.path, item.originalname): item for item in reversed(items)}
        items[:] = reversed(first.values())


@pytest.fixture(autouse=True)
def _standing_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, reason in CUDA_ONLY.items():
        monkeypatch.setattr(torch.cuda, name, skipping(reason))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.profiler, "profile", skipping("CUDA's profiler"))
    monkeypatch.setattr(torch, "Generator", CpuGenerator)
    choose, init = planner.choose, dist.init_process_group

    def choose_triton(requested: str, plan: Any) -> Any:
        return choose("triton" if requested == "auto" else requested, plan)

    def init_gloo(backend: str, *, device_id: object = None, **options: Any) -> None:
        init(backend.replace("nccl", "gloo"), **options)

    monkeypatch.setattr(planner, "choose", choose_triton)
    monkeypatch.setattr(dist, "init_process_group", init_gloo)
    with CpuForCuda():
        yield
