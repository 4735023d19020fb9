"""Where kernels run in tests: on a GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter is chosen when triton is imported, so this comes before any such import.
"""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

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


@pytest.fixture
def kernel_device() -> torch.device:
    """The device on which the Triton backend runs in this session."""
    return torch.device("cuda" if GPU else "cpu")


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
