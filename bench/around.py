"""`python -m bench around`: what stands around an update: its guard, swaps, distances, states.

Each is shown with the bytes that it must move, and the GB/s, beside a copy of as many bytes as an
update moves.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator

import torch

from bench import jobs, measure
from bench.cases import Case
from bench.jobs import gib
from bench.machine import available_memory, commit, describe
from bench.measure import Stopwatch, Subject, in_one_line
from bench.models import Model, make_module
from bench.results import Lines, Spread
from bench.run import (
    QUICK_ROUNDS,
    QUICK_SECONDS,
    ROUNDS,
    SECONDS,
    add_common_arguments,
    chosen_device,
    selected_models,
)
from ema_triton import ModelEMA

CASES = {
    "fp32<-fp32": Case(torch.float32, torch.float32),
    "bf16<-bf16 exact": Case(torch.bfloat16, torch.bfloat16, "exact"),
}

# Those that are timed in turns where not all fit together: what needs another EMA, or a copy of
# one, stands apart.
COPY, GUARDED, CLONED = "copy", "update, guarded", "state_dict(clone=True)"
PLAIN = (COPY, "update", "swapped(), in and out", "distance()", "state_dict()")
STAGES = (PLAIN, (GUARDED,), (CLONED,))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("--models", help="comma-separated; 'all'; default: all, on a CPU the small")
    add_common_arguments(parser)
    parser.set_defaults(peers=None)


def main(args: argparse.Namespace) -> None:
    """Measure, and print lines as they come; with --out into a file, too."""
    device = chosen_device(args)
    machine = describe(device)
    stopwatch = Stopwatch(device, machine.cache)
    rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if args.quick else (ROUNDS, SECONDS)
    head = f"{machine.name}, commit {commit()}; medians, caches flushed"
    lines = Lines(args.out, head, resume=args.resume)
    columns = f"{'':56s} {'ms':>9s} {'bytes/element':>14s} {'GB/s':>8s}"
    if columns not in lines:
        lines.add(columns)
    for model in selected_models(args.models, quick=args.quick, on_cpu=device.type == "cpu"):
        for name, case in CASES.items():
            title = f"{model.name} {name}"
            if f"{title}: done" not in lines:
                for label, *found in measured(model, case, stopwatch, rounds, seconds):
                    lines.add(line(f"{title} {label}", model, *found))
                lines.add(f"{title}: done")


def line(
    label: str, model: Model, microseconds: float | None, per_element: int, reason: str = ""
) -> str:
    """One line of the table."""
    if microseconds is None:
        return f"{label:56s} {reason}"
    start = f"{label:56s} {microseconds / 1e3:9.3f}"
    if not per_element:
        return start
    return f"{start} {per_element:14d} {per_element * model.elements / microseconds / 1e3:8.1f}"


def needed(model: Model, case: Case, stage: tuple[str, ...]) -> int:
    """Bytes that are alive at a time, at most, while these are timed."""
    total = jobs.sizes(model, case)
    emas = (GUARDED in stage) + ({GUARDED} != {*stage})
    kept = total.online + emas * total.ema
    beside = jobs.copies(model, case) if COPY in stage else 0
    return kept + beside + (total.ema if CLONED in stage else 0)


def measured(
    model: Model,
    case: Case,
    stopwatch: Stopwatch,
    rounds: int,
    seconds: float,
    memory: int | None = None,
) -> Iterator[tuple[str, float | None, int, str]]:
    """What each thing takes, in microseconds, and the bytes that it must move per element.

    Without a time for what does not fit into `memory`, by default that which is free, and why.
    """
    gc.collect()
    device = stopwatch.device
    memory = available_memory(device) if memory is None else memory
    room = jobs.usable(memory, device)
    every = tuple(job for stage in STAGES for job in stage)
    for stage in [every] if needed(model, case, every) <= room else STAGES:
        need = needed(model, case, stage)
        if need > room:
            reason = f"skipped: it needs {gib(need)}, of {gib(memory)} that are free"
            yield from ((job, None, 0, reason) for job in stage)
            continue
        gc.collect()
        try:
            yield from timed(model, case, stage, stopwatch, rounds, seconds)
        except Exception as error:  # the next stage may work
            yield from ((job, None, 0, f"failed: {in_one_line(error)}") for job in stage)


def timed(
    model: Model,
    case: Case,
    stage: tuple[str, ...],
    stopwatch: Stopwatch,
    rounds: int,
    seconds: float,
) -> list[tuple[str, float, int, str]]:
    """The same of what is timed in turns."""
    online = make_module(model, case.online_dtype, stopwatch.device)
    kind = {"ema_dtype": case.ema_dtype, "precision": case.precision}
    size = case.online_dtype.itemsize
    # What is timed, and the bytes that it must move per element.
    calls: dict[str, tuple[Callable[[], object], int]] = {}
    if {*stage} != {GUARDED}:
        ema = ModelEMA(online, **kind)
        calls |= {
            "update": (lambda: ema.update(0.1), case.moved),
            "swapped(), in and out": (lambda: _swap(ema), 2 * 4 * size),
            "distance()": (ema.distance, size + case.stored),
            "state_dict()": (ema.state_dict, 0),
            CLONED: (lambda: ema.state_dict(clone=True), 2 * case.stored),
        }
    if GUARDED in stage:
        guarded = ModelEMA(online, nonfinite="skip", **kind)
        calls[GUARDED] = (lambda: guarded.update(0.1), case.moved)
    if COPY in stage:  # after what building takes
        copy = measure.copy_of(model.elements * case.moved, stopwatch.device)
        calls[COPY] = (copy, case.moved)
    subjects = {job: Subject(calls[job][0]) for job in stage}
    samples = measure.interleaved(subjects, stopwatch.sample, rounds, seconds)
    figure = "device" if stopwatch.device.type == "cuda" else "wall"
    return [(job, Spread.of(samples[job][figure]).median, calls[job][1], "") for job in stage]


def _swap(ema: ModelEMA) -> None:
    with ema.swapped():
        pass
