"""`python -m bench tune`: the kernel's constants, and choices that did not ship, in one sweep.

Chunk, block and warps are tried in all combinations; a persistent loop, eviction policies and the
width of accesses each beside what ships. Every variant's result is held against the shipped kernel,
bit by bit, before it is timed, piece by piece where whole copies do not fit. Each is timed as a
CUDA graph after a flush of the caches, all in turns, beside a copy of as many bytes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench import jobs, measure
from bench.candidates import candidate
from bench.cases import CASES as RUN_CASES
from bench.cases import Case
from bench.machine import available_memory, commit, describe
from bench.measure import Stopwatch, Subject
from bench.models import Model, make_module
from bench.results import LIMIT, Lines, Spread
from bench.run import add_resume, chosen_device, progress, selected, selected_models
from ema_triton import ModelEMA
from ema_triton.ops import triton_backend
from ema_triton.plan import Launch
from ema_triton.state import CHUNK

CASES = {name: case for name, case in RUN_CASES.items() if case.precision != "stochastic"}
# From 25 M to 7 B parameters, from 161 to 1,680 tensors.
MODELS = "resnet50,vit-l16,gpt2-xl,sdxl-unet,llama-7b"

CHUNKS = (4096, 8192, 16384, 32768)
BLOCKS = (1024, 2048, 4096)
WARPS = (4, 8)
# Each chunk begins at a multiple of its size in its tensor, so that a piece of as many elements as
# the largest has whole chunks of every size.
LEAST_PIECE = CHUNKS[-1]
# Programs per multiprocessor of a persistent loop.
PROGRAMS = (4, 8, 16)
HINTS = (("evict_first", ""), ("evict_first", "evict_first"), ("", "evict_first"))

ROUNDS = 15
SECONDS = 12.0
MOMENTUM = 0.1

SHIPPED = "the shipped kernel itself"


@dataclass(frozen=True)
class Variant:
    """One way to launch an update.

    Attributes:
        chunk: Elements in a row of the table.
        block: Elements that a program handles at a time.
        warps: Of a program.
        programs: Per multiprocessor, of a persistent loop; None for a program per chunk.
        online_hint: Eviction policy of the online loads.
        ema_hint: Eviction policy of the EMA's loads and stores.
        width: Elements per access; 0 for as many as 128 bits hold.
    """

    chunk: int
    block: int
    warps: int
    programs: int | None
    online_hint: str
    ema_hint: str
    width: int

    def __str__(self) -> str:
        """For tables."""
        grid = "one per chunk" if self.programs is None else f"{self.programs} per SM, persistent"
        hints = ", ".join(
            f"{side} {hint}"
            for side, hint in (("online", self.online_hint), ("EMA", self.ema_hint))
            if hint
        )
        width = f", {self.width} elements at a time" if self.width else ""
        return (
            f"chunk {self.chunk:5d} block {self.block:4d} warps {self.warps} {grid}"
            f"{', ' + hints if hints else ''}{width}"
        )


def shipped(case: Case) -> Variant:
    """What `ema_triton.ops.triton_backend` does in this case."""
    exact = case.precision == "exact"
    block = triton_backend.EXACT_BLOCK if exact else triton_backend.BLOCK[case.ema_dtype.itemsize]
    # The kernel takes 4 elements at a time where types of different widths meet.
    mixed = not exact and case.ema_dtype.itemsize != case.online_dtype.itemsize
    return Variant(CHUNK, block, triton_backend.WARPS, None, "", "", 4 if mixed else 0)


def variants(case: Case) -> list[Variant]:
    """What ships, and what is tried beside it."""
    ships = shipped(case)
    grid = [
        replace(ships, chunk=chunk, block=block, warps=warps)
        for chunk, block, warps in itertools.product(CHUNKS, BLOCKS, WARPS)
        if block <= chunk
    ]
    beside = [replace(ships, programs=programs) for programs in PROGRAMS]
    beside += [replace(ships, online_hint=online, ema_hint=ema) for online, ema in HINTS]
    if case.online_dtype.itemsize < 4:
        beside.append(replace(ships, width=0 if ships.width else 4))
    return [*dict.fromkeys([ships, *grid, *beside])]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("--models", default=MODELS, help="comma-separated; default: %(default)s")
    parser.add_argument("--cases", help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--out", type=Path, help="text file, written case by case")
    add_resume(parser)


def main(args: argparse.Namespace) -> None:
    """Measure, and print a table per model and case, the fastest variant first."""
    device = chosen_device(args)
    machine = describe(device)
    stopwatch = Stopwatch(device, machine.cache)
    cases = selected(args.cases, tuple(CASES), tuple(CASES))
    models = selected_models(args.models, quick=False, on_cpu=False)
    triton_version = machine.packages.get("triton", "unknown")
    head = f"{machine.name}, triton {triton_version}, commit {commit()}"
    lines = Lines(args.out, head, resume=args.resume)
    for model, name in itertools.product(models, cases):
        title = f"{model.name} {name}"
        if title not in lines:
            progress(f"{title}: up to a minute")
            lines.add("", title, *rows(model, CASES[name], stopwatch))


def rows(
    model: Model, case: Case, stopwatch: Stopwatch, memory: int | None = None
) -> Iterator[str]:
    """The table of one model in one case, or why there is none.

    Args:
        model: What is averaged.
        case: And into what.
        stopwatch: Times it, on its device.
        memory: Bytes that may be used; by default those that are free.
    """
    gc.collect()
    device = stopwatch.device
    memory = available_memory(device) if memory is None else memory
    room = jobs.usable(memory, device)
    total = jobs.sizes(model, case)
    built = total.online + total.ema
    compared = 2 * case.stored + 1  # per element: before, expected, and where they are equal
    beside = max(jobs.copies(model, case), LEAST_PIECE * compared)
    need = built + beside
    if need > room:
        yield f"skipped: it needs {jobs.gib(need)}, of {jobs.gib(memory)} that are free"
        return
    piece = max(LEAST_PIECE, (room - built) // compared)
    try:
        online = make_module(model, case.online_dtype, device)
        yield from table(measured(online, case, stopwatch, piece), shipped(case))
    except Exception as error:  # the other cases may work
        yield f"failed: {measure.in_one_line(error)}"


def table(found: dict[str, Spread], ships: Variant) -> list[str]:
    """What was timed, the fastest first, with its share of the copy's bandwidth."""
    copy = found[LIMIT].median
    return [
        f"{spread.median:10.1f} us {copy / spread.median:5.0%} of the copy  "
        f"{name}{'  <- ships' if name == str(ships) else ''}"
        for name, spread in sorted(found.items(), key=lambda item: item[1].median)
    ]


def measured(online: nn.Module, case: Case, stopwatch: Stopwatch, piece: int) -> dict[str, Spread]:
    """The time of each variant, in microseconds, of the shipped kernel, and of the copy.

    `piece` is how many elements are compared at a time.
    """
    ema = ModelEMA(online, backend="triton", ema_dtype=case.ema_dtype, precision=case.precision)
    (one,) = ema._planner.plan.launches
    prepared = prepare(one, variants(case))
    check(one, [*prepared.values()], piece)
    updates: dict[str, Callable[[], object]] = {
        str(variant): partial(one.launch, one.table) for variant, one in prepared.items()
    }
    # The candidate does less than it, and may be compiled to other code.
    updates[SHIPPED] = partial(triton_backend._launch, one, MOMENTUM, len(one.chunk_table))
    elements = sum(source.numel() for source in one.sources)
    updates[LIMIT] = measure.copy_of(elements * case.moved, stopwatch.device)
    on_cuda = stopwatch.device.type == "cuda"
    subjects = {
        name: Subject(update, *(measure.captured(update) if on_cuda else ()))
        for name, update in updates.items()
    }
    for name, subject in subjects.items():
        if subject.no_graph:
            raise RuntimeError(f"no CUDA graph of {name}: {subject.no_graph}")
    samples = measure.interleaved(subjects, stopwatch.sample, ROUNDS, SECONDS)
    figure = "graph" if on_cuda else "wall"
    return {name: Spread.of(found[figure]) for name, found in samples.items()}


class Prepared(NamedTuple):
    """An update in one way: a launch that takes rows of its table."""

    table: Tensor
    launch: Callable[[Tensor], object]


def prepare(one: Launch, variants: Sequence[Variant]) -> dict[Variant, Prepared]:
    """The update of a launch in each way; those of one chunk size share their table."""
    tables = {chunk: one.table(chunk) for chunk in {variant.chunk for variant in variants}}
    return {
        variant: Prepared(tables[variant.chunk], partial(_launch, one, variant))
        for variant in variants
    }


def _launch(one: Launch, variant: Variant, table: Tensor) -> None:
    grid = len(table)
    if variant.programs is not None:
        grid = min(grid, variant.programs * _multiprocessors(table.device))
    candidate[(grid,)](
        table,
        one.bucket.flat,
        one.bucket.residual,
        len(table),
        MOMENTUM,
        ONLINE=triton_backend._online(one),
        PERSISTENT=variant.programs is not None,
        WIDTH=variant.width,
        ONLINE_HINT=variant.online_hint,
        EMA_HINT=variant.ema_hint,
        BLOCK=variant.block,
        num_warps=variant.warps,
    )


def check(one: Launch, prepared: list[Prepared], piece: int) -> None:
    """Raise AssertionError unless each does bit by bit what the shipped kernel does.

    Args:
        one: What they are of.
        prepared: The launches.
        piece: Elements of which copies are made at a time.
    """
    # Somewhere on the way: an EMA that equals the online weights stays what it is.
    one.bucket.flat.mul_(0.5)
    tables = [one.chunk_table, *(way.table for way in prepared)]
    begins = one.table(LEAST_PIECE)[:, 1].tolist()
    for begin, end in pieces([*begins, one.bucket.flat.numel()], piece):
        stored = [t[begin:end] for t in (one.bucket.flat, one.bucket.residual) if t is not None]
        before = [tensor.clone() for tensor in stored]
        ships, *rows = (table[(table[:, 1] >= begin) & (table[:, 1] < end)] for table in tables)
        part = replace(one)
        vars(part)["chunk_table"] = ships
        triton_backend._launch(part, MOMENTUM, len(ships))
        expected = [tensor.clone() for tensor in stored]
        for way, own in zip(prepared, rows, strict=True):
            for tensor, value in zip(stored, before, strict=True):
                tensor.copy_(value)
            way.launch(own)
            if not all(map(torch.equal, stored, expected)):
                raise AssertionError(
                    f"a variant differs from the shipped kernel in elements {begin} to {end} of "
                    f"{one.bucket.flat.numel()}: {way.launch}"
                )


def pieces(bounds: list[int], size: int) -> Iterator[tuple[int, int]]:
    """Stretches from bound to bound, each as long as fits into `size`, or one step long."""
    begin = last = bounds[0]
    for bound in bounds[1:]:
        if bound - begin > size and last > begin:
            yield begin, last
            begin = last
        last = bound
    if last > begin:
        yield begin, last


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1
