"""What the jobs of `bench run` take, and their order. A job is one model in one case.

Memory is that of all that is alive at a time: the online model, the EMAs of the peers that are
timed in turns, what a peer makes for a while, the buffers of the copy. Time is a rough estimate,
which `bench run` corrects by the jobs that it has made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from bench import measure, peers
from bench.cases import Case
from bench.models import ARCHITECTURES, MANY_SMALL, Model
from bench.peers import Sizes

# Of a GPU's free memory, for the kernels' code and what the allocator rounds up.
RESERVE = 1 << 30
# Of a CPU's, which has other things to do too.
CPU_SHARE = 0.85

# The models of the tables; the others are two sweeps, with a picture each.
SHOWN = (*ARCHITECTURES, MANY_SMALL)
# Cases by what they tell: torch's own, what a bf16 model gets by default, then the others.
TELLING = (
    "fp32<-fp32",
    "bf16<-bf16 exact",
    "fp32<-bf16",
    "bf16<-bf16",
    "bf16<-bf16 stochastic",
)
# How many cases a sweep comes later: the pictures show the first one only.
SWEEPS_LATER = 1.5


def in_order(jobs: Sequence[tuple[Model, str]]) -> list[tuple[Model, str]]:
    """The most telling jobs first, the models of a case in the given order."""

    def place(job: tuple[Model, str]) -> float:
        model, case = job
        return TELLING.index(case) + (0 if model in SHOWN else SWEEPS_LATER)

    return sorted(jobs, key=place)


def sizes(model: Model, case: Case) -> Sizes:
    """A model in a case."""
    return Sizes(
        elements=model.elements,
        largest=max(map(math.prod, model.shapes.values())),
        online_width=case.online_dtype.itemsize,
        ema_width=case.stored,
        exact=case.precision == "exact",
    )


def copies(model: Model, case: Case) -> int:
    """Bytes of the buffers of the copy that a case is compared with."""
    return 2 * min(model.elements * case.moved // 2, measure.COPY_BUFFER)


def usable(memory: int, device: torch.device) -> int:
    """How many of the free bytes may be used."""
    return memory - RESERVE if device.type == "cuda" else int(CPU_SHARE * memory)


def gib(size: int) -> str:
    """Bytes, to be read."""
    return f"{size / 2**30:.1f} GiB"


class Fitted(NamedTuple):
    """Which peers are timed together, and which do not fit.

    Attributes:
        groups: Peers that are timed in turns, all of them if the memory can hold them.
        peak: Bytes that are alive at a time, at most.
        too_large: What the others would take, each alone.
    """

    groups: list[list[str]]
    peak: int
    too_large: dict[str, int]


def fitted(
    model: Model, case: Case, keys: Sequence[str], memory: int, device: torch.device
) -> Fitted:
    """Group the peers such that each group fits into the memory.

    Args:
        model: What is averaged.
        case: And into what.
        keys: The peers.
        memory: Bytes that are free.
        device: Where they are.
    """
    total, copy, room = sizes(model, case), copies(model, case), usable(memory, device)
    needs = {key: peers.memory(peers.load(key), total) for key in keys if is_present(key)}

    def peak(group: list[str]) -> int:
        found = [needs[key] for key in group if key in needs]
        alive = high = total.online
        for need in found:
            high = max(high, alive + need.building)
            # A captured graph has a pool of its own.
            alive += total.ema + (need.updating if device.type == "cuda" else 0)
        return max(high, alive + max((need.updating for need in found), default=0) + copy)

    groups: list[list[str]] = []
    too_large = {}
    for key in keys:
        if (alone := peak([key])) > room:
            too_large[key] = alone
        elif groups and peak([*groups[-1], key]) <= room:
            groups[-1].append(key)
        else:
            groups.append([key])
    return Fitted(groups, max(map(peak, groups), default=0), too_large)


def is_present(key: str) -> bool:
    """Whether a peer can be imported; why not, `run.measured` reports."""
    try:
        peers.load(key)
    except Exception:
        return False
    return True


class Pace(NamedTuple):
    """Seconds of this machine."""

    flush: float  # of its caches
    byte: float  # that is read or written
    call: float  # of a torch operation on a single element


def pace(stopwatch: measure.Stopwatch) -> Pace:
    """Measure it."""
    one = torch.zeros(1, device=stopwatch.device)
    flush = _seconds(stopwatch.flush, 5, stopwatch.device)
    call = _seconds(lambda: one.add_(1), 500, stopwatch.device)
    return Pace(flush, flush / stopwatch.flushed, call)


def _seconds(call: measure.Update, calls: int, device: torch.device) -> float:
    call()
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Inductor's seconds per tensor, measured on a CPU.
COMPILED_TENSOR = 0.08


def seconds(
    model: Model,
    case: Case,
    groups: list[list[str]],
    now: Pace,
    device: torch.device,
    rounds: int,
    limit: float,
) -> float:
    """A rough estimate of a job's time; its steps are those of `run.measured`."""
    tensors = len(model.shapes)
    on_cuda = device.type == "cuda"
    # The peers make one to three passes, and half of them a loop over the tensors.
    update = 1.5 * case.moved * model.elements * now.byte + tensors * now.call
    sample = update + now.flush
    # A graph's replay for half of the subjects, or several updates in a row.
    sample += update / 2 if on_cuda else max(update, min(measure.REPEATS * update, 0.02))
    found = 20 * model.elements * now.byte  # random weights
    for keys in groups:
        subjects = 2 * len(keys) + 2  # both schedules, the copy, the second timing of the first
        once = subjects * sample
        found += min(rounds * once, max(measure.LEAST_ROUNDS * once, limit))
        # The copies of the model, and twice the gate's two updates and the warm-up's three; the
        # gate looks at each tensor with some 20 operations per update.
        found += len(keys) * (20 * update + 100 * tensors * now.call)
        found += 1.0 if on_cuda else 0.0  # the profiler
        if "compiled_lerp" in keys and tensors <= 600:
            found += COMPILED_TENSOR * tensors
    return found
