"""What the benchmark does with CUDA graphs, profiler and device, tried with stand-ins for them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import gate, peers
from bench.machine import commit
from bench.models import Model, make_module

CPU = torch.device("cpu")


class Waits(TorchDispatchMode):
    """Counts what would wait for a device: values read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )
        return func(*args, **(kwargs or {}))


def test_the_gate_waits_for_the_device_once() -> None:
    shapes = {f"{index}.w": (3,) for index in range(20)}
    online = make_module(Model("many", shapes), torch.float32, CPU)
    with torch.no_grad(), Waits() as waits:
        built = peers.load("foreach_lerp").build(online, 0.1, torch.float32)
        assert gate.fault(built, online, (0.1, 0.2)) is None
        assert waits.count == 1
        assert bool(torch.ones(()))  # the control
        assert waits.count == 2


def test_the_commit_is_unknown_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit() == "unknown"
