"""What the benchmark does with CUDA graphs, profiler and device, tried with stand-ins for them."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from bench import gate, measure, peers, report, run
from bench.machine import Machine, commit
from bench.models import Model, make_module
from bench.peers import Built
from bench.results import Results, Row, Spread

CPU = torch.device("cpu")
MACHINE = Machine(
    "cpu", "Slow, 2 cores", 2**34, 2**20, "Slow", 2, None, None, "3.12", {"torch": "2"}
)
TINY = Model("tiny", {"a.weight": (5, 3), "a.bias": (5,)})
SYNCHRONIZED = "called a synchronizing CUDA operation"
MILLISECOND = Spread(9, 1000.0, 1000.0, 1000.0)


class StandIn:
    """What torch.cuda does around a capture in torch 2.11, as far as its callers see it.

    `torch.cuda.graph` is torch's own, which leaves the capture's stream current where the end of
    the capture fails; the allocator then keeps serving the graph's pool.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream = self.default = self.new_stream()
        self.mode, self.capturing, self.invalid = 0, False, False
        self.pools: list[object] = []  # that the allocator serves
        self.released: list[object] = []
        self.launched, self.begun = 0, 0
        cuda = {
            "current_stream": lambda: self.stream,
            "current_device": lambda: 0,
            "Stream": self.new_stream,
            "stream": lambda stream: On(self, stream),
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "synchronize": self.synchronize,
            "empty_cache": lambda: None,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": self.set_mode,
            "graph_pool_handle": object,
            "CUDAGraph": lambda: StandInGraph(self),
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
        allocator = {
            "_host_emptyCache": lambda: None,
            "_cuda_endAllocateToPool": self.end_pool,
            "_cuda_releasePool": lambda _, pool: self.released.append(pool),
        }
        for name, value in allocator.items():
            monkeypatch.setattr(torch._C, name, value, raising=False)
        monkeypatch.setattr(measure, "_ABANDONED", [])

    @staticmethod
    def new_stream() -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: None)

    def set_mode(self, mode: int | str) -> None:
        self.mode = {"default": 0, "error": 2}.get(mode, mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    def end_pool(self, _: int, pool: object) -> None:
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)

    def launch(self) -> None:
        self.launched += 1

    def synchronize(self) -> None:
        """Not seen by the debug mode."""
        if self.capturing:
            self.invalid = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def copy_from_host(self) -> None:
        """Such as `tensor.to(device)`."""
        if self.mode == 2:
            raise RuntimeError(SYNCHRONIZED)
        self.synchronize()

    def is_as_before(self) -> bool:
        return (self.stream, self.mode, self.capturing, self.pools) == (self.default, 0, False, [])


class On:
    """`torch.cuda.stream`; not a generator, which would end when it is forgotten."""

    def __init__(self, device: StandIn, stream: object) -> None:
        self.device, self.stream = device, stream

    def __enter__(self) -> None:
        self.before, self.device.stream = self.device.stream, self.stream

    def __exit__(self, *_: object) -> None:
        self.device.stream = self.before


class StandInGraph:
    def __init__(self, device: StandIn) -> None:
        self.device = device

    def capture_begin(self, pool: object, **_: object) -> None:
        self.pool, self.device.launched = pool, 0
        self.device.pools.append(pool)
        self.device.capturing = True
        self.device.begun += 1

    def capture_end(self) -> None:
        invalid, self.device.invalid, self.device.capturing = self.device.invalid, False, False
        if invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.device.pools.remove(self.pool)
        if not self.device.launched:
            warnings.warn("The CUDA Graph is empty. This usually means", stacklevel=2)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


def refuses_to_be_captured(device: StandIn) -> Callable[[], None]:
    def update() -> None:
        if device.capturing:
            raise ValueError("not in a graph, please\nmore")

    return update


def synchronizes_in_secret(device: StandIn) -> Callable[[], None]:
    return lambda: (device.launch(), device.synchronize())


def test_an_update_is_captured(device: StandIn) -> None:
    graph, reason = measure.captured(device.launch)
    assert isinstance(graph, StandInGraph)
    assert (reason, device.begun, device.launched) == ("", 1, 1)
    assert device.is_as_before()


def test_an_empty_graph_is_no_failure(device: StandIn) -> None:
    """torch warns of it, which is an error here: it would stand in for what the update raised."""
    assert isinstance(measure.captured(lambda: None)[0], StandInGraph)
    assert device.is_as_before()


def test_an_update_that_waits_for_the_device_is_not_captured(device: StandIn) -> None:
    assert measure.captured(device.copy_from_host) == (None, "it waits for the device")
    assert device.begun == 0
    assert device.is_as_before()


def test_an_update_that_fails_is_not_captured(device: StandIn) -> None:
    def update() -> None:
        raise RuntimeError("no memory")

    assert measure.captured(update) == (None, "RuntimeError: no memory")
    assert device.begun == 0
    assert device.is_as_before()


def test_an_update_that_fails_in_the_capture_harms_no_other(device: StandIn) -> None:
    failed = measure.captured(refuses_to_be_captured(device))
    assert failed == (None, "ValueError: not in a graph, please")
    assert device.is_as_before()
    assert device.released == []  # the graph itself releases its pool
    assert measure.captured(device.launch)[1] == ""


def test_an_invalidated_capture_harms_no_other(device: StandIn) -> None:
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert measure.captured(synchronizes_in_secret(device)) == (None, reason)
    assert device.is_as_before()
    assert len(device.released) == len(measure._ABANDONED) == 1
    assert measure.captured(device.launch)[1] == ""


def test_torchs_own_context_leaves_the_stream_of_an_invalidated_capture(device: StandIn) -> None:
    """The control: what `captured` undoes is there to be undone."""
    pool = object()
    with (
        pytest.raises(RuntimeError, match="during capture"),
        torch.cuda.graph(StandInGraph(device), pool=pool),
    ):
        device.synchronize()
    assert device.stream is not device.default
    assert device.pools == [pool]


def test_peers_that_cannot_be_captured_are_timed_without_a_graph(
    device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    also = {
        "waits": device.copy_from_host,
        "refuses": refuses_to_be_captured(device),
        "invalidates": lambda: device.capturing and device.synchronize(),
        "right": device.launch,
    }

    def load(key: str) -> SimpleNamespace:
        def build(model, momentum: float, ema_dtype: torch.dtype) -> Built:
            built = right.build(model, momentum, ema_dtype)
            return Built(lambda momentum: (built.update(momentum), also[key]()), built.tensors)

        return SimpleNamespace(NAME=key, build=build)

    right = peers.load("foreach_lerp")
    monkeypatch.setattr(peers, "load", load)
    facts = run._facts(TINY, "fp32<-fp32")
    online = make_module(TINY, torch.float32, CPU)
    stopwatch = SimpleNamespace(device=torch.device("cuda"))
    found = {key: [*run._built(facts, online, key, stopwatch)] for key in also}
    reasons = {
        "waits": "no CUDA graph: it waits for the device",
        "refuses": "no CUDA graph: ValueError: not in a graph, please",
        "invalidates": "no CUDA graph: RuntimeError: operation not permitted when stream is "
        "capturing",
        "right": "",
    }
    for key, ((row, subject), (changing, _)) in found.items():
        assert (row.status, row.reason) == ("timed", reasons[key])
        assert (subject.graph is None) == (key != "right")
        assert (changing.status, changing.reason) == ("timed", "")
    assert device.is_as_before()
    rows = [replace(row, times={"wall": MILLISECOND}) for (row, _), _ in found.values()]
    text = report.table(Results("update", MACHINE, "c", "d", rows))
    assert "- waits: no CUDA graph: it waits for the device.\n" in text
    assert "- right" not in text


class StandInProfile:
    """Sees the events of `happen`, in no order; without CUPTI, none."""

    def __init__(self, *, cupti: bool = True) -> None:
        self.cupti, self.found, self.sessions = cupti, [], 0

    def __call__(self, activities: list[object]) -> "StandInProfile":
        self.sessions += 1
        self.found.clear()
        return self

    def __enter__(self) -> "StandInProfile":
        return self

    def __exit__(self, *_: object) -> None:
        warnings.warn(
            "Warning: Profiler clears events at the end of each cycle. Only events", stacklevel=2
        )

    def happen(self, name: str, kind: DeviceType = DeviceType.CUDA) -> None:
        start = SimpleNamespace(start=len(self.found))
        self.found.append(SimpleNamespace(name=name, device_type=kind, time_range=start))

    def events(self) -> list[SimpleNamespace]:
        return self.found[::-1] if self.cupti else []


@pytest.fixture
def profile(device: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandInProfile:
    profile = StandInProfile()
    monkeypatch.setattr(torch.profiler, "profile", profile)
    spin = "at::cuda::(anonymous namespace)::spin_kernel(long)"
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: profile.happen(spin), raising=False)
    return profile


def test_launches_of_several_updates_are_counted_in_one_session(profile: StandInProfile) -> None:
    updates = [
        lambda: (profile.happen("lerp"), profile.happen("cudaLaunchKernel", DeviceType.CPU)),
        lambda: None,
        lambda: (profile.happen("mul"), profile.happen("add")),
    ]
    assert measure.launched_by_each(updates) == [["lerp"], [], ["mul", "add"]]
    assert profile.sessions == 1
    assert measure.launched(updates[2]) == ["mul", "add"]


def test_launches_without_cupti_are_unknown_and_not_none(profile: StandInProfile) -> None:
    profile.cupti = False
    assert measure.launched_by_each([lambda: profile.happen("lerp")]) is None
    with pytest.raises(RuntimeError, match="CUPTI is missing, or its use not permitted"):
        measure.launched(lambda: profile.happen("lerp"))


@pytest.mark.parametrize("cupti", [True, False])
def test_each_peer_is_counted_once(
    profile: StandInProfile, monkeypatch: pytest.MonkeyPatch, cupti: bool
) -> None:
    profile.cupti = cupti
    asked = []
    monkeypatch.setattr(measure, "extra_memory", lambda update: asked.append(update) or 2**20)
    subject = measure.Subject(lambda: profile.happen("lerp"))
    facts = {
        "schedule": "constant",
        "status": "timed",
        "set_up": 3000.0,
        "times": {"device": MILLISECOND},
    }
    built = {
        f"{peer}, {schedule}": (
            Row(**run._facts(TINY, "fp32<-fp32"), **{**facts, "schedule": schedule}, peer=peer),
            subject,
        )
        for peer in ("one", "two")
        for schedule in run.SCHEDULES
    }
    run._count(built)
    assert (profile.sessions, len(asked)) == (1, 2)
    assert {row.launches for row, _ in built.values()} == {1 if cupti else None}
    machine = replace(MACHINE, device="cuda")
    rows = [row for row, _ in built.values()]
    table = report.table(Results("update", machine, "c", "d", rows))
    assert f"| one | {1 if cupti else 'unknown'}; 1; 3 |" in table


def test_a_profiler_that_fails_leaves_launches_unknown(
    device: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(activities: list[object]) -> None:
        raise RuntimeError("no Kineto")

    monkeypatch.setattr(torch.profiler, "profile", fails)
    monkeypatch.setattr(measure, "extra_memory", lambda update: 0)
    row = Row(**run._facts(TINY, "fp32<-fp32"), schedule="constant", peer="p", status="timed")
    built = {"p, constant": (row, measure.Subject(lambda: None))}
    run._count(built)
    assert built["p, constant"][0].launches is None
    assert capsys.readouterr().err == "launches are unknown: RuntimeError: no Kineto\n"


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


@pytest.mark.gpu
def test_an_invalidated_capture_leaves_a_gpu_as_it_was() -> None:
    before, x = torch.cuda.current_stream(), torch.zeros(10, device="cuda")
    graph, reason = measure.captured(lambda: (x.add_(1), torch.cuda.synchronize()))
    assert graph is None
    assert reason
    assert torch.cuda.current_stream() == before
    # The allocator frees what it keeps.
    torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    reserved = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved - (1 << 28)
    graph, reason = measure.captured(lambda: x.fill_(3))
    assert reason == ""
    x.zero_()
    graph.replay()
    assert x.tolist() == [3.0] * 10
