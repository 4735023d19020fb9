"""`python -m bench run`: the time of one EMA update, ours and every peer's, in one run."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import averages, gate, jobs, measure, peers, report
from bench.cases import CASES
from bench.jobs import gib
from bench.machine import available_memory, commit, describe
from bench.measure import Stopwatch, Subject, in_one_line, momenta
from bench.models import MODELS, Model, make_module
from bench.results import AGAIN, FOLDER, LIMIT, Results, Row, Spread

SCHEDULES = ("constant", "changing")

# A full run takes ROUNDS samples of each subject, or as many as fit into SECONDS per model, case
# and group of peers; a quick one QUICK_ROUNDS.
ROUNDS = 30
SECONDS = 10.0
QUICK_ROUNDS = 5
QUICK_SECONDS = 2.0
QUICK_MODELS = ("resnet50", "1000x64")

# Inductor alone would take a quick run's minute, and most of a lent GPU's.
QUICK_PEERS = tuple(key for key in peers.PEERS if key != "compiled_lerp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("--models", help="comma-separated; 'all'; default: all, on a CPU the small")
    parser.add_argument(
        "--minutes",
        type=float,
        help="start only what should end in this time, the most telling first, the rest by "
        "--resume; without compiled_lerp, unless --peers names it",
    )
    parser.add_argument(
        "--averages",
        help="how many averages, as 1,2,3: an EMABank beside as many ModelEMA, and nothing else",
    )
    add_common_arguments(parser)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe what `run` and `step` both take."""
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--peers", help=f"comma-separated, of {', '.join(peers.PEERS)}")
    parser.add_argument("--quick", action="store_true", help="a first look, no results file")
    parser.add_argument("--out", type=Path, help="JSON; default: a file in bench/results/")
    add_resume(parser)


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Describe --resume."""
    parser.add_argument(
        "--resume", action="store_true", help="go on with the file of a run that was cut off"
    )


def main(args: argparse.Namespace, clock: Callable[[], float] = time.monotonic) -> None:
    """Say what the jobs take, measure, print a table, write the results file."""
    began = clock()
    device = chosen_device(args)
    models = selected_models(args.models, quick=args.quick, on_cpu=device.type == "cpu")
    default = QUICK_PEERS if args.quick or args.minutes is not None else peers.PEERS
    keys = selected(args.peers, default, peers.PEERS)
    rounds = QUICK_ROUNDS if args.quick else ROUNDS
    seconds = QUICK_SECONDS if args.quick else SECONDS
    machine, measured_commit = describe(device), commit()
    stopwatch = Stopwatch(device, machine.cache)
    if args.averages is not None:
        print(f"{machine.name}; commit {measured_commit}")
        counts = averages.parse(args.averages)
        averages.main(models, CASES, counts, stopwatch, rounds, seconds)
        return

    out = destination(args, machine.slug)
    results = Results("update", machine, measured_commit, date.today().isoformat(), [])
    results.rows.extend(earlier(results, args.resume, out))
    done = {(row.model, row.case) for row in results.rows}
    cases = [case for case in CASES if _measured_keys(case, keys)]
    todo = [(model, case) for model in models for case in cases if (model.name, case) not in done]
    left = planned(jobs.in_order(todo), keys, stopwatch, rounds, seconds)

    spent = foreseen = 0.0

    def corrected(estimate: float) -> float:
        return estimate * spent / foreseen if foreseen else estimate

    def fits(estimate: float) -> bool:
        until = clock() - began + corrected(estimate)
        return args.minutes is None or until <= 60 * args.minutes

    while (job := next((job for job in left if fits(left[job])), None)) is not None:
        model, case = MODELS[job[0]], job[1]
        estimate, start = left.pop(job), clock()
        try:
            results.rows.extend(measured(model, case, keys, stopwatch, rounds, seconds))
        except Exception as error:  # one job's failure is a finding, and not the end of the run
            results.rows.append(_failed(_facts(model, case), error))
        _sort(results.rows)
        if out is not None:
            results.save(out)
        took = clock() - start
        spent, foreseen = spent + took, foreseen + estimate
        progress(f"{model.name} {case}: {took:.1f} s; jobs left: {len(left)}")
        if (broken := _broken(device)) is not None:
            raise SystemExit(
                f"{model.name} {case} left the GPU unusable for this process ({broken}), so "
                "nothing more can be measured in it. Give the same command with --resume."
            )
    publish(results, out)
    if left:
        shortest, longest = (corrected(choose(left.values())) / 60 for choose in (min, max))
        again = "Give the same command with --resume" if out else "With --out, --resume goes on"
        print(
            f"\n{len(left)} jobs did not fit into {args.minutes:g} minutes; each should take "
            f"{shortest:.1f} to {longest:.1f}. {again}."
        )


def planned(
    todo: list[tuple[Model, str]],
    keys: list[str],
    stopwatch: Stopwatch,
    rounds: int,
    seconds: float,
) -> dict[tuple[str, str], float]:
    """Estimated seconds by model and case; prints them, and each job's memory."""
    device = stopwatch.device
    memory, pace = available_memory(device), jobs.pace(stopwatch)
    print(f"What the jobs should take, of {gib(memory)} that are free; they run in this order:")
    found = {}
    for model, name in todo:
        case, asked = CASES[name], filter(jobs.is_present, _measured_keys(name, keys))
        fitted = jobs.fitted(model, case, [*asked], memory, device)
        groups = fitted.groups
        estimate = jobs.seconds(model, case, groups, pace, device, rounds, seconds)
        found[model.name, name] = estimate
        line = f"{estimate:6.0f} s {gib(fitted.peak):>10s}  {model.name} {name}: "
        line += f"{sum(map(len, groups))} peers"
        line += f" in {len(groups)} groups" if len(groups) > 1 else ""
        left_out = [f"{key} needs {gib(need)}" for key, need in fitted.too_large.items()]
        print("; ".join([line, *left_out]))
    print(f"{len(todo)} jobs, some {sum(found.values()) / 60:.1f} minutes\n")
    return found


def progress(line: str) -> None:
    """Print it apart from the tables."""
    print(line, file=sys.stderr, flush=True)


def _sort(rows: list[Row]) -> None:
    """In the order of models and cases, whatever the jobs' was."""
    models, cases = [*MODELS], [*CASES]
    rows.sort(key=lambda row: (models.index(row.model), cases.index(row.case)))


def _broken(device: torch.device) -> str | None:
    """What any further use of the device would raise, such as after an illegal access."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        return in_one_line(error)
    return None


def chosen_device(args: argparse.Namespace) -> torch.device:
    """The device asked for, or the GPU if there is one."""
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def destination(args: argparse.Namespace, name: str) -> Path | None:
    """Where results go: a quick run leaves none unless told where."""
    return args.out or (None if args.quick else FOLDER / f"{name}.json")


def earlier(results: Results, resume: bool, out: Path | None) -> list[Any]:
    """The rows of the run to go on with, which has to be one of this commit on this machine."""
    if not resume:
        return []
    if out is None or not out.exists():
        raise SystemExit(f"--resume: there is no results file {out or '(a quick run has none)'}")
    before = Results.load(out)
    if (before.kind, before.machine, before.commit) != (
        results.kind,
        results.machine,
        results.commit,
    ):
        raise SystemExit(
            f"--resume: {out} is of commit {before.commit} on {before.machine.name}, and this is "
            f"commit {results.commit} on {results.machine.name}, or other packages"
        )
    return before.rows


def publish(results: Results, out: Path | None) -> None:
    """Print the table and write the results file."""
    print(report.table(results))
    if out is not None:
        results.save(out)
        print(f"\nresults: {out}")


def selected(asked: str | None, default: tuple[str, ...], known: tuple[str, ...]) -> list[str]:
    """The names on the command line; exits with the known ones where one is unknown."""
    if asked is None:
        return [*default]
    if asked == "all":
        return [*known]
    names = asked.split(",")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"unknown: {', '.join(unknown)}. Known are: {', '.join(known)}")
    return names


def selected_models(asked: str | None, *, quick: bool, on_cpu: bool) -> list[Model]:
    """The models to measure."""
    default = tuple(name for name, model in MODELS.items() if not (on_cpu and model.big))
    names = selected(asked, QUICK_MODELS if quick else default, tuple(MODELS))
    return [MODELS[name] for name in names]


def _facts(model: Model, case: str) -> dict[str, Any]:
    return {
        "model": model.name,
        "tensors": len(model.shapes),
        "elements": model.elements,
        "case": case,
        "bytes": model.elements * CASES[case].moved,
    }


def _measured_keys(case: str, keys: list[str]) -> list[str]:
    """The peers that have the case's precision."""
    if CASES[case].precision == "nearest":
        return keys
    return [key for key in keys if key in peers.OURS]


def measured(
    model: Model,
    case: str,
    keys: list[str],
    stopwatch: Stopwatch,
    rounds: int,
    seconds: float,
    memory: int | None = None,
) -> Iterator[Row]:
    """The rows of one model in one case.

    Args:
        model: What is averaged.
        case: And into what, by name.
        keys: The peers.
        stopwatch: Times them, on its device.
        rounds: Samples of each.
        seconds: For each group of peers that are timed in turns; see `measure.interleaved`.
        memory: Bytes that may be used; by default those that are free.
    """
    gc.collect()
    device = stopwatch.device
    memory = available_memory(device) if memory is None else memory
    facts, keys = _facts(model, case), _measured_keys(case, keys)
    fitted = jobs.fitted(model, CASES[case], keys, memory, device)
    for key, need in fitted.too_large.items():
        reason = f"{model.name} needs {gib(need)}, of {gib(memory)} that are free"
        name = peers.load(key).NAME if jobs.is_present(key) else key
        skipped = {"peer": name, "status": "skipped", "reason": reason}
        yield Row(**facts, schedule="constant", **skipped)
    if not fitted.groups:
        return
    online = make_module(model, CASES[case].online_dtype, device)
    for group in fitted.groups:
        yield from _measured_group(facts, online, group, stopwatch, rounds, seconds)


def _failed(facts: dict[str, Any], error: Exception) -> Row:
    """The row of what failed as a whole, and not in one peer."""
    reason = in_one_line(error)
    return Row(**facts, schedule="constant", peer=LIMIT, status="error", reason=reason)


def _measured_group(facts: dict[str, Any], *rest: Any) -> list[Row]:  # noqa: ANN401
    """The rows of one group of peers; of its failure, after which another may still fit."""
    try:
        return [*_measured_together(facts, *rest)]
    except Exception as error:
        return [_failed(facts, error)]


def _measured_together(
    facts: dict,
    online: nn.Module,
    keys: list[str],
    stopwatch: Stopwatch,
    rounds: int,
    seconds: float,
) -> Iterator[Row]:
    gc.collect()  # engines and closures hold the last group's EMAs in cycles
    on_cuda = stopwatch.device.type == "cuda"
    built: dict[str, tuple[Row, Subject]] = {}
    for key in keys:
        for row, subject in _built(facts, online, key, stopwatch):
            if subject is None:
                yield row
            else:
                built[f"{row.peer}, {row.schedule}"] = row, subject
        gc.collect()  # what a peer that failed had allocated
    if on_cuda:
        _count(built)
    copy = measure.copy_of(facts["bytes"], stopwatch.device)  # after what building takes
    waiting = {LIMIT: Row(**facts, schedule="constant", peer=LIMIT, status="timed")}
    subjects = {LIMIT: _subject(copy, stopwatch, graph=True)}
    for name, (row, subject) in built.items():
        waiting[name], subjects[name] = row, subject
        if AGAIN not in subjects:
            waiting[AGAIN] = Row(**facts, schedule="constant", peer=AGAIN, status="timed")
            subjects[AGAIN] = subject
    samples = measure.interleaved(subjects, stopwatch.sample, rounds, seconds)
    for name, row in waiting.items():
        times = {figure: Spread.of(values) for figure, values in samples[name].items()}
        yield replace(row, times=times)


def _count(built: dict[str, tuple[Row, Subject]]) -> None:
    """Put each peer's launches and extra memory into its rows; the schedule changes neither."""
    updates = {row.peer: subject.update for row, subject in built.values()}
    try:
        launched = measure.launched_by_each([*updates.values()])
    except Exception as error:
        progress(f"launches are unknown: {in_one_line(error)}")
        launched = None
    counts = [None] * len(updates) if launched is None else [*map(len, launched)]
    found = {
        peer: {"launches": count, "extra_memory": measure.extra_memory(update)}
        for (peer, update), count in zip(updates.items(), counts, strict=True)
    }
    for name, (row, subject) in built.items():
        built[name] = replace(row, **found[row.peer]), subject


def _built(
    facts: dict, online: nn.Module, key: str, stopwatch: Stopwatch
) -> Iterator[tuple[Row, Subject | None]]:
    """A peer's rows, one per schedule; each with the subject to time, unless there is none."""
    row = {**facts, "schedule": "constant", "peer": key, "status": "error"}
    try:
        peer = peers.load(key)
    except Exception as error:
        absent = "absent" if isinstance(error, ImportError) else "error"
        yield Row(**{**row, "status": absent, "reason": in_one_line(error)}), None
        return
    row["peer"] = peer.NAME
    first_momentum = next(momenta("constant"))
    try:
        case = CASES[facts["case"]]
        precision = {"precision": case.precision} if key in peers.OURS else {}
        with torch.no_grad():
            start = time.perf_counter()
            built = peer.build(online, first_momentum, case.ema_dtype, **precision)
            built.update(first_momentum)
            if stopwatch.device.type == "cuda":
                torch.cuda.synchronize()
            row["set_up"] = 1e6 * (time.perf_counter() - start)
    except Exception as error:  # whatever a peer raises is a finding
        yield Row(**{**row, "status": status_of(error), "reason": in_one_line(error)}), None
        return
    for schedule in SCHEDULES:
        row |= {"schedule": schedule, "status": "error", "reason": ""}
        values = momenta(schedule)
        try:
            with torch.no_grad():
                fault = gate.fault(built, online, (next(values), next(values)))
            if fault is not None:
                yield Row(**{**row, "status": "wrong", "reason": fault}), None
                continue
            update = partial(_next_update, built, values)
            subject = _subject(update, stopwatch, graph=schedule == "constant")
        except Exception as error:
            yield Row(**{**row, "status": status_of(error), "reason": in_one_line(error)}), None
            continue
        reason = f"no CUDA graph: {subject.no_graph}" if subject.no_graph else ""
        yield Row(**{**row, "status": "timed", "reason": reason}), subject


def _next_update(built: peers.Built, momenta: Iterator[float]) -> None:
    built.update(next(momenta))


def _subject(update: measure.Update, stopwatch: Stopwatch, *, graph: bool) -> Subject:
    @torch.no_grad()
    def without_autograd() -> None:
        update()

    # A graph replays the momentum it was captured with.
    if not graph or stopwatch.device.type != "cuda":
        return Subject(without_autograd)
    return Subject(without_autograd, *measure.captured(without_autograd))


def status_of(error: Exception) -> str:
    """What an exception makes of a peer: NotImplementedError is how its file declines."""
    return "skipped" if isinstance(error, NotImplementedError) else "error"
