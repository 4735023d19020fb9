"""How an update is timed: caches flushed, subjects taking turns, samples kept."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType

Update = Callable[[], object]

# Updates that are not timed before the first that is: allocations, compilations, autotuning.
WARM_UP = 3

# "repeated" times up to REPEATS updates in a row, but no more than REPEATED_SECONDS of them.
REPEATS = 20
REPEATED_SECONDS = 0.02

# Memory that was just allocated made the first two rounds 3 times as slow on a CPU.
LEAST_ROUNDS = 7

# The copy's buffers. More bytes are copied by going over them again.
COPY_BUFFER = 1 << 30


# Graphs whose capture failed. torch's allocator may still ask one whether it captures.
_ABANDONED: list[torch.cuda.CUDAGraph] = []


@dataclass(frozen=True)
class Subject:
    """An update to time, and on a GPU its CUDA graph, or why it has none."""

    update: Update
    graph: torch.cuda.CUDAGraph | None = None
    no_graph: str = ""


class Stopwatch:
    """Times subjects on one device.

    A training step leaves none of the EMA in the caches, so before each timing twice their size is
    written elsewhere. A small model timed in a loop would stay in the L2 and seem faster than the
    memory.
    """

    def __init__(self, device: torch.device, cache: int) -> None:
        """Prepare to flush `cache` bytes."""
        self.device = device
        self._junk = torch.zeros(2 * cache, dtype=torch.uint8, device=device)
        self.flushed = 2 * self._junk.nbytes  # read and written by a flush

    def flush(self) -> None:
        """Leave nothing in the caches but what is not timed."""
        self._junk.add_(1)

    def sample(self, subject: Subject) -> dict[str, float]:
        """Time one update; microseconds by figure, as `results.Row.times` describes them."""
        return self._on_cuda(subject) if self.device.type == "cuda" else self._on_cpu(subject)

    def _on_cpu(self, subject: Subject) -> dict[str, float]:
        self.flush()
        start = time.perf_counter()
        subject.update()
        first = time.perf_counter() - start
        repeats = max(1, min(REPEATS, int(REPEATED_SECONDS / first)))
        start = time.perf_counter()
        for _ in range(repeats):
            subject.update()
        repeated = (time.perf_counter() - start) / repeats
        return {"wall": 1e6 * first, "repeated": 1e6 * repeated}

    def _on_cuda(self, subject: Subject) -> dict[str, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        self.flush()
        start.record()
        called = time.perf_counter()
        subject.update()
        returned = time.perf_counter()
        end.record()
        torch.cuda.synchronize(self.device)
        times = {"device": 1e3 * start.elapsed_time(end), "host": 1e6 * (returned - called)}
        if subject.graph is not None:
            self.flush()
            start.record()
            subject.graph.replay()
            end.record()
            torch.cuda.synchronize(self.device)
            times["graph"] = 1e3 * start.elapsed_time(end)
        return times


def interleaved(
    subjects: dict[str, Subject],
    sample: Callable[[Subject], dict[str, float]],
    rounds: int,
    seconds: float,
) -> dict[str, dict[str, list[float]]]:
    """Samples of every subject by figure, all subjects taking a turn in each round.

    Whatever disturbs the machine disturbs all of them. Each round begins with another subject, so
    that none always follows the same one. Rounds end early when `seconds` are over, but not before
    LEAST_ROUNDS.
    """
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in subjects}
    for subject in subjects.values():
        for _ in range(WARM_UP):
            subject.update()
    names = [*subjects]
    deadline = time.perf_counter() + seconds
    for index in range(rounds):
        if index >= LEAST_ROUNDS and time.perf_counter() > deadline:
            break
        first = index % len(names)
        for name in names[first:] + names[:first]:
            for figure, value in sample(subjects[name]).items():
                samples[name].setdefault(figure, []).append(value)
    return samples


def copy_of(size: int, device: torch.device) -> Update:
    """A device copy that moves `size` bytes: reads one half of them and writes as many."""
    half = size // 2
    length = max(1, min(half, COPY_BUFFER))
    source = torch.randint(255, (length,), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    whole, rest = divmod(half, length)

    def copy() -> None:
        for _ in range(whole):
            target.copy_(source)
        if rest:
            target[:rest].copy_(source[:rest])

    return copy


def captured(update: Update) -> tuple[torch.cuda.CUDAGraph | None, str]:
    """The update as a CUDA graph, or None and why it cannot be captured.

    An update that waits for the device is found before the capture, which it would invalidate: in
    torch 2.11 the capture's stream then stays the current one, and the allocator frees nothing.
    """
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream), _synchronization_is_an_error():
            update()
    except Exception as error:  # whatever a peer raises is a finding
        torch.cuda.synchronize()
        waits = "synchronizing CUDA operation" in str(error)
        return None, "it waits for the device" if waits else in_one_line(error)
    before.wait_stream(stream)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    raised: Exception | None = None
    try:
        with warnings.catch_warnings():
            # The update may raise before it has launched anything.
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            with torch.cuda.graph(graph, pool=pool):
                try:
                    update()
                except Exception as error:
                    raised = error
                    raise
    except Exception as error:
        _abandon(graph, pool, before)
        return None, in_one_line(raised or error)
    return graph, ""


def _abandon(graph: torch.cuda.CUDAGraph, pool: object, before: torch.cuda.Stream) -> None:
    """Undo what a failed capture leaves: its stream, and an allocator that serves its pool."""
    torch.cuda.set_stream(before)
    torch.cuda.synchronize()
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # the end of the capture did so
        return
    _ABANDONED.append(graph)
    torch._C._cuda_releasePool(device, pool)


@contextmanager
def _synchronization_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # Where warnings are errors it is raised when the mode is set already.
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def launched(update: Update) -> list[str]:
    """The names of the kernels, copies and fills that one update puts on the GPU.

    Raises:
        RuntimeError: The profiler sees nothing of the GPU.
    """
    found = launched_by_each([update])
    if found is None:
        raise RuntimeError(
            "The profiler saw none of the GPU's kernels, so launches cannot be counted: CUPTI is "
            "missing, or its use not permitted. Install nvidia-cuda-cupti, or ask for permission."
        )
    return found[0]


def launched_by_each(updates: Sequence[Update]) -> list[list[str]] | None:
    """The same of several updates, in one profiler session; None where it sees nothing.

    Before each update torch's spin kernel runs, which no update uses: it parts them, and shows that
    the profiler sees kernels at all.
    """
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        # torch 2.11 warns of it at every use.
        warnings.filterwarnings("ignore", message="Warning. Profiler clears events at the end")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for update in updates:
                torch.cuda._sleep(1)
                update()
                torch.cuda.synchronize()
        events = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    names = [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
    marks = [index for index, name in enumerate(names) if "spin_kernel" in name]
    if len(marks) != len(updates):
        return None
    ends = [*marks[1:], len(names)]
    return [names[begin + 1 : end] for begin, end in zip(marks, ends, strict=True)]


def extra_memory(update: Update) -> int:
    """Peak bytes that one update allocates on the GPU beyond those in use before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    update()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def momenta(schedule: str) -> Iterator[float]:
    """The momentum of each update: always 0.1, or different each time, as in a warm-up."""
    index = 0
    while True:
        yield 0.1 if schedule == "constant" else 0.1 + 0.1 / (1 + index)
        index += 1


def in_one_line(error: Exception) -> str:
    """An exception in one line of a table."""
    first_line = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first_line}"[:200]
