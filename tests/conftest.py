"""Where kernels run in tests: on a GPU where there is one, else on the CPU, compiled for sm_90."""

import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("tests.low_precision", "tests.plain", "tests.sharded")

GPU = torch.cuda.is_available()

hypothesis.settings.register_profile("dev", max_examples=50, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not GPU:
        for item in items:
            if item.get_closest_marker("gpu") or item.get_closest_marker("memcheck"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how much of the suite was left out, so that a green run does not look complete."""
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if "needs a GPU" in str(report.longrepr)
    ]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} GPU tests were skipped: run them with `make gpu` on a GPU."
        )


@pytest.fixture(scope="session", autouse=True)
def _kernels() -> Iterator[Callable[[torch.device], str | None] | None]:
    """Where there is no GPU, backend="triton" runs on the CPU; "auto" does not take it there."""
    if GPU or find_spec("triton") is None:
        yield None
        return
    from ema_triton import backend
    from ema_triton.ops import triton_backend
    from ema_triton.plan import Launch
    from tests.ptx.run import compiled_for

    unsupported_device, decide = triton_backend.unsupported_device, backend._unsupported_reason

    def decide_here(launches: Sequence[Launch], *, explicit: bool) -> str | None:
        with pytest.MonkeyPatch.context() as patch:
            if not explicit and triton_backend.unsupported_device is stand_in:
                patch.setattr(triton_backend, "unsupported_device", unsupported_device)
            return decide(launches, explicit=explicit)

    with compiled_for(90), pytest.MonkeyPatch.context() as patch:
        stand_in = triton_backend.unsupported_device
        patch.setattr(backend, "_unsupported_reason", decide_here)
        yield unsupported_device


@pytest.fixture
def no_cpu(
    _kernels: Callable[[torch.device], str | None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton does not drive the CPU, as outside of these tests."""
    if _kernels is not None:
        monkeypatch.setattr("ema_triton.ops.triton_backend.unsupported_device", _kernels)


@pytest.fixture
def kernel_device() -> torch.device:
    """The device on which the Triton backend runs in this session."""
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(params=["foreach", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def device(backend: str, kernel_device: torch.device) -> torch.device:
    """The device on which the test's backend runs."""
    return kernel_device if backend == "triton" else torch.device("cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order; and on small tensors, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=GPU)
def _device_modes_end_with_the_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """A capture, or a check for synchronisation, left open by one test would fail the next ones."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    stream = torch.cuda.current_stream()
    yield
    torch.cuda.set_stream(stream)
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
