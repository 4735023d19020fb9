"""Any average rebuilt from snapshots: coefficients from the log, weights tensor by tensor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ema_triton.checkpoint.interop import import_safetensors, read_file
from ema_triton.posthoc.log import Log
from ema_triton.posthoc.profiles import Solution, gram, solve, spacing_needed
from ema_triton.schedules import Schedule, check_schedule

T = TypeVar("T")

ELEMENTS = 1 << 21  # that are added up at a time, unless a tensor has more; 16 MiB a target

# Profile errors, as fractions of the target's norm.
WARN, REFUSE = 0.02, 0.2

# Rounding to nearest is wrong by 1/sqrt(12) spacings, which are eps in [1, 2): as a fraction of
# the value 0.2 eps.
RELATIVE_ROUNDING = 0.2


@dataclass(frozen=True)
class Reconstruction:
    """An average that was rebuilt, and how wrong it is.

    With momentum factors the errors are those of the tensors that are worst off.

    Attributes:
        weights: By clean name on the CPU, what `model.load_state_dict` takes; averages in fp32,
            other tensors as they were in the last snapshot up to `update_index`.
        update_index: After which update it is the average.
        profile_error: ‖target - Σ xᵢ wᵢ‖ / ‖target‖, of weights over the updates; below 1e-8 it is
            not told from 0.
        noise_gain: ‖x‖₂, by which the rounding of the snapshots grows.
        expected_error: Of the weights, as a fraction, from the profile error (as if the updates'
            weights had nothing in common) and the rounding of the snapshots' dtype together.
        condition: Of the equations that were solved; fp64 comes to its end near 1e15.
        coefficients: x by the snapshots' file names; of the momentum factor 1, or the smallest.
    """

    weights: dict[str, Tensor] = field(repr=False)
    update_index: int
    profile_error: float
    noise_gain: float
    expected_error: float
    condition: float
    coefficients: dict[str, float] = field(repr=False)


class System(NamedTuple):
    """What was solved for one momentum factor."""

    momenta: Tensor  # fp64 [events, averages + targets]
    updates: Tensor  # int64 [events], of each the number of updates up to it
    ends: list[tuple[int, int]]  # of the snapshots, then of the targets: events, column
    solutions: list[Solution]  # of each target


class Systems(NamedTuple):
    """What was solved for targets, and for what."""

    at: int
    entries: list[dict[str, Any]]  # the snapshots to combine
    by_factor: dict[float, System]

    @property
    def shown(self) -> System:
        """That of the momentum factor 1, or the smallest."""
        return self.by_factor.get(1.0) or next(iter(self.by_factor.values()))


def solve_for(
    targets: Sequence[Schedule | Tensor],
    log: Log,
    entries: list[dict[str, Any]],
    at: int | None,
    *,
    approximate: bool,
) -> Systems:
    """Solve for the coefficients, without reading weights; see `Snapshots.reconstruct`.

    Args:
        targets: Schedules or weights.
        log: What happened.
        entries: The snapshots that are there, in their order, with their files' metadata.
        at: After which update.
        approximate: Whether errors are warnings.
    """
    at = entries[-1]["update_index"] if at is None else at
    if not 1 <= at <= log.updates:
        raise ValueError(
            f"at={at}, but the log has updates 1 to {log.updates}. Give one of them, or leave it "
            "out for the last snapshot's."
        )
    targets = [_check_target(target, at) for target in targets]
    # The first ones from then on have what the last ones before do not.
    until = min((one["update_index"] for one in entries if one["update_index"] >= at), default=at)
    entries = [one for one in entries if one["update_index"] <= until]
    last = entries[-1]
    for entry in entries:
        if entry["factors"] != last["factors"]:
            raise ValueError(
                f"'{entry['file']}' and '{last['file']}' have other averaged tensors or momentum "
                "factors, and cannot be combined. Take another folder when changing the model, "
                "include, exclude or momentum_scale."
            )
    reasons = [reason for since, reason in log.inexact if since <= until]
    if reasons:
        _complain(
            f"The log does not tell all that happened to the averages: {'; '.join(reasons)}. "
            "profile_error is not the error then.",
            refused=not approximate,
        )
    eps = [torch.finfo(getattr(torch, one["dtype"])).eps for one in entries]
    noise = RELATIVE_ROUNDING * torch.tensor(eps, dtype=torch.float64)
    then = max((one["events"] for one in entries if one["update_index"] == at), default=None)
    found = Systems(at, entries, {})
    for factor in sorted({*last["factors"].values()} or {1.0}):
        momenta, updates = log.matrix(factor, targets, at)
        end = int((updates <= at).sum()) if then is None else then
        own = [(one["events"], one["average"]) for one in entries]
        ends = own + [(end, column) for column in range(len(log.averages), momenta.shape[1])]
        unknown = momenta[: max(end for end, _ in ends)].isnan().any(1).nonzero()
        if len(unknown):
            raise ValueError(
                f"The momentum of update {int(updates[unknown[0]])} is unknown, and the average "
                "had no schedule that would tell. Call record(ema) before the first update, and "
                "give floats."
            )
        solutions = solve(gram(momenta, ends), noise)
        found.by_factor[factor] = System(momenta, updates, ends, solutions)
        for number, solution in enumerate(solutions):
            if solution.profile_error > WARN:
                every = spacing_needed(momenta, updates, ends, number, noise, at, WARN)
                needed = f"With snapshots every {every} updates from 0 on it is below {WARN:.0%}."
                if not every:
                    needed = (
                        "More snapshots of these averages would not do either: it takes some of an "
                        "average with this schedule, or one more like it."
                    )
                what = "the weights" if isinstance(targets[number], Tensor) else targets[number]
                _complain(
                    f"These snapshots do not make {what} at update {at}: the profile error is "
                    f"{solution.profile_error:.1%} of its norm. {needed}",
                    refused=solution.profile_error > REFUSE and not approximate,
                )
    return found


def _complain(text: str, *, refused: bool) -> None:
    if refused:
        raise ValueError(f"{text} Nothing was rebuilt; approximate=True gives what there is.")
    warnings.warn(text, UserWarning, stacklevel=5)


def _check_target(target: object, at: int) -> Schedule | Tensor:
    """The schedule, or the weights over the updates in fp64; raise if it is neither."""
    if not isinstance(target, Tensor):
        check_schedule(target)
        return target  # type: ignore[return-value]
    weights = target.detach().to("cpu", torch.float64)
    fine = bool(((weights >= 0) & weights.isfinite()).all()) and bool(weights.any())
    if weights.shape != (at,) or not fine:
        span = f", from {weights.min():g} to {weights.max():g}" if weights.numel() else ""
        raise ValueError(
            f"A target's weights must be a tensor of {at} finite values from 0 on, one for each "
            f"update, not all 0, but got shape {tuple(weights.shape)}{span}. Give those, or a "
            "schedule."
        )
    return weights / weights.sum()


def add_up(folder: Path, systems: Systems) -> list[Reconstruction]:
    """The targets' weights, group by group of tensors, each from all files."""
    entries, shown = systems.entries, systems.shown.solutions
    last = ([one for one in entries if one["update_index"] <= systems.at] or entries)[-1]
    weights: list[dict[str, Tensor]] = [{} for _ in shown]
    readers = [opened(folder, entry) for entry in entries]
    read = opened(folder, last)()
    shapes = {name: read(name).shape for name in last["factors"]}
    for name in last["copied"]:
        for result in weights:
            result[name] = read(name).clone()
    groups = [*_grouped(shapes)]
    # All memory is allocated here: freed piece by piece between the results, malloc would keep it.
    for name in last["factors"]:
        for result in weights:
            result[name] = torch.empty(shapes[name])
    sizes = [[shapes[name].numel() for name in names] for names in groups]
    sums = torch.empty(len(weights), max(map(sum, sizes), default=0), dtype=torch.float64)
    scratch = torch.empty(max(map(max, sizes), default=0), dtype=torch.float64)
    for names, lengths in _with_progress([*zip(groups, sizes, strict=True)]):
        parts: list[Sequence[Tensor]] = [
            torch.split(total[: sum(lengths)].zero_(), lengths) for total in sums
        ]
        for number, (entry, reader) in enumerate(zip(entries, readers, strict=True)):
            read = reader()
            for place, name in enumerate(names):
                value = scratch[: lengths[place]].view(shapes[name])
                value.copy_(_checked(read, folder / entry["file"], name, shapes[name]))
                solutions = systems.by_factor[last["factors"][name]].solutions
                for part, solution in zip(parts, solutions, strict=True):
                    coefficient = float(solution.coefficients[number])
                    part[place].add_(value.view(-1), alpha=coefficient)
        for result, part in zip(weights, parts, strict=True):
            for name, total in zip(names, part, strict=True):
                result[name].view(-1).copy_(total)
    for result in weights:
        result |= {name: torch.view_as_complex(result[name]) for name in last["complex"]}
    results = []
    for number, result in enumerate(weights):
        result |= {name: result[first] for name, first in last["ties"].items()}
        solutions = [system.solutions[number] for system in systems.by_factor.values()]
        x = shown[number].coefficients.tolist()
        results.append(
            Reconstruction(
                weights=result,
                update_index=systems.at,
                profile_error=max(one.profile_error for one in solutions),
                noise_gain=max(one.noise_gain for one in solutions),
                expected_error=max(one.expected_error for one in solutions),
                condition=max(one.condition for one in solutions),
                coefficients={e["file"]: c for e, c in zip(entries, x, strict=True)},
            )
        )
    return results


def opened(folder: Path, entry: Mapping[str, Any]) -> Callable[[], Callable[[str], Tensor]]:
    """What opens a snapshot's file, and gives a function that reads a tensor of it by name.

    Mapped files take memory while they are open. One of torch.save takes long to open, and stays.
    """
    path, prefix = folder / entry["file"], entry.get("prefix")
    if prefix is None:
        return lambda: import_safetensors().safe_open(path, framework="pt").get_tensor
    tensors: Any = read_file(path, mapped=True)
    return lambda: lambda name: tensors[prefix + name]


def _checked(read: Callable[[str], Tensor], path: Path, name: str, shape: torch.Size) -> Tensor:
    try:
        value = read(name)
        if value.shape != shape:
            raise ValueError(f"shape {[*value.shape]}, but {[*shape]} in the last snapshot")
        if not bool(value.isfinite().all()):
            kind = str(value.dtype).removeprefix("torch.")
            largest = f", as {kind} has for values above {torch.finfo(value.dtype).max:g}"
            raise ValueError(f"it has Inf or NaN{largest}")
    except Exception as error:
        raise ValueError(
            f"'{name}' cannot be read from '{os.fspath(path)}' ({type(error).__name__}: {error}). "
            "Nothing was rebuilt. Delete that file to do without this snapshot."
        ) from error
    return value


def _grouped(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """Names of tensors that are added up together: few files are opened then, for little memory."""
    group, elements = list[str](), 0
    for name, shape in shapes.items():
        if group and elements + shape.numel() > ELEMENTS:
            yield group
            group, elements = [], 0
        group.append(name)
        elements += shape.numel()
    if group:
        yield group


def _with_progress(groups: list[T]) -> Iterable[T]:
    """The same, with tqdm's bar on a terminal, if it is installed."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return groups
    bar: Iterable[T] = tqdm(groups, desc="reconstruct", disable=None)
    return bar
