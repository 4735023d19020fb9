"""How an update is timed: caches flushed, subjects taking turns, samples kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType

Update = Callable[[], object]

# Updates that are not timed before the first that is: allocations, compilations, autotuning.
WARM_UP = 3

# "repeated" times up to REPEATS updates in a row, but no more than REPEATED_SECONDS of them.
REPEATS = 20
REPEATED_SECONDS = 0.02

# The copy's buffers. More bytes are copied by going over them again.
COPY_BUFFER = 1 << 30


@dataclass(frozen=True)
class Subject:
    """An update to time, and on a GPU its CUDA graph, if it could be captured."""

    update: Update
    graph: torch.cuda.CUDAGraph | None = None


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

    def sample(self, subject: Subject) -> dict[str, float]:
        """Time one update; microseconds by figure, as `results.Row.times` describes them."""
        return self._on_cuda(subject) if self.device.type == "cuda" else self._on_cpu(subject)

    def _on_cpu(self, subject: Subject) -> dict[str, float]:
        self._junk.add_(1)
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
        self._junk.add_(1)
        start.record()
        called = time.perf_counter()
        subject.update()
        returned = time.perf_counter()
        end.record()
        torch.cuda.synchronize(self.device)
        times = {"device": 1e3 * start.elapsed_time(end), "host": 1e6 * (returned - called)}
        if subject.graph is not None:
            self._junk.add_(1)
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
    the seventh: memory that was just allocated made the first two 3 times as slow on a CPU.
    """
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in subjects}
    for subject in subjects.values():
        for _ in range(WARM_UP):
            subject.update()
    names = [*subjects]
    deadline = time.perf_counter() + seconds
    for index in range(rounds):
        if index >= 7 and time.perf_counter() > deadline:
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


def captured(update: Update) -> torch.cuda.CUDAGraph | None:
    """The update as a CUDA graph; None if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            update()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            update()
    except Exception:
        # What failed here may wait for the device, which is not allowed in a capture.
        torch.cuda.synchronize()
        return None
    return graph


def launched(update: Update) -> list[str]:
    """The names of the kernels, copies and fills that one update puts on the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        update()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]


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
