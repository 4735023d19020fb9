"""`python -m bench around`: what stands around an update: its guard, swaps, distances, states.

Each is shown with the bytes that it must move, and the GB/s, beside a copy of as many bytes as an
update moves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from bench import measure
from bench.machine import describe
from bench.measure import Stopwatch, Subject
from bench.models import Model, make_module
from bench.results import Spread
from bench.run import (
    QUICK_ROUNDS,
    QUICK_SECONDS,
    ROUNDS,
    SECONDS,
    Case,
    add_common_arguments,
    chosen_device,
    selected_models,
)
from ema_triton import ModelEMA

CASES = {
    "fp32<-fp32": Case(torch.float32, torch.float32),
    "bf16<-bf16 exact": Case(torch.bfloat16, torch.bfloat16, "exact"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("--models", help="comma-separated; 'all'; default: all, on a CPU the small")
    add_common_arguments(parser)
    parser.set_defaults(peers=None)


def main(args: argparse.Namespace) -> None:
    """Measure and print a table; with --out into a file, too."""
    device = chosen_device(args)
    machine = describe(device)
    stopwatch = Stopwatch(device, machine.cache)
    rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if args.quick else (ROUNDS, SECONDS)
    lines = [
        f"{machine.name}; medians, caches flushed",
        f"{'':56s} {'ms':>9s} {'bytes/element':>14s} {'GB/s':>8s}",
    ]
    for model in selected_models(args.models, quick=args.quick, on_cpu=device.type == "cpu"):
        for name, case in CASES.items():
            found = measured(model, case, stopwatch, rounds, seconds)
            lines += [line(f"{model.name} {name} {job}", model, *row) for job, row in found.items()]
    text = "\n".join(lines)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


def line(label: str, model: Model, microseconds: float, per_element: int) -> str:
    """One line of the table."""
    start = f"{label:56s} {microseconds / 1e3:9.3f}"
    if not per_element:
        return start
    return f"{start} {per_element:14d} {per_element * model.elements / microseconds / 1e3:8.1f}"


def measured(
    model: Model, case: Case, stopwatch: Stopwatch, rounds: int, seconds: float
) -> dict[str, tuple[float, int]]:
    """What each thing takes, in microseconds, and the bytes that it must move per element."""
    online = make_module(model, case.online_dtype, stopwatch.device)
    kind = {"ema_dtype": case.ema_dtype, "precision": case.precision}
    ema, guarded = ModelEMA(online, **kind), ModelEMA(online, nonfinite="skip", **kind)
    size = case.online_dtype.itemsize
    # What is timed, and the bytes that it must move per element.
    jobs: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (measure.copy_of(model.elements * case.moved, stopwatch.device), case.moved),
        "update": (lambda: ema.update(0.1), case.moved),
        "update, guarded": (lambda: guarded.update(0.1), case.moved),
        "swapped(), in and out": (lambda: _swap(ema), 2 * 4 * size),
        "distance()": (ema.distance, size + case.stored),
        "state_dict()": (ema.state_dict, 0),
        "state_dict(clone=True)": (lambda: ema.state_dict(clone=True), 2 * case.stored),
    }
    subjects = {job: Subject(call) for job, (call, _) in jobs.items()}
    samples = measure.interleaved(subjects, stopwatch.sample, rounds, seconds)
    figure = "device" if stopwatch.device.type == "cuda" else "wall"
    return {
        job: (Spread.of(samples[job][figure]).median, per_element)
        for job, (_, per_element) in jobs.items()
    }


def _swap(ema: ModelEMA) -> None:
    with ema.swapped():
        pass
