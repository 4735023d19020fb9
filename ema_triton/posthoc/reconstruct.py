"""Any average rebuilt from snapshots: coefficients from the log, weights tensor by tensor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ema_triton.checkpoint.interop import import_safetensors, read_file
from ema_triton.posthoc.files import add_up, with_progress
from ema_triton.posthoc.log import Log
from ema_triton.posthoc.profiles import Solution, gram, solve, spacing_needed
from ema_triton.schedules import Schedule, check_schedule

ELEMENTS = 1 << 21  # that are added up at a time, unless a tensor has more; 16 MiB a target

# Profile errors, as fractions of the target's norm.
WARN, REFUSE = 0.02, 0.2

# Rounding to nearest is wrong by 1/sqrt(12) spacings, which are eps in [1, 2): as a fraction of
# the value 0.2 eps.
RELATIVE_ROUNDING = 0.2

ERRORS = ("profile_error", "noise_gain", "expected_error", "condition")


@dataclass(frozen=True)
class Reconstruction:
    """An average that was rebuilt, and how wrong it is.

    With momentum factors the errors are those of the tensors that are worst off.

    Attributes:
        weights: By clean name on the CPU, what `model.load_state_dict` takes; averages in fp32
            (fp64 of fp64 snapshots), others as they were in the last one up to `update_index`.
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


class Solved(NamedTuple):
    """What was solved for, from which snapshots, and by factor; 1 or the smallest is the first."""

    at: int
    entries: list[dict[str, Any]]
    systems: dict[float, System]


def solve_for(
    targets: Sequence[Schedule | Tensor],
    log: Log,
    entries: list[dict[str, Any]],
    at: int | None,
    *,
    approximate: bool,
) -> Solved:
    """Solve for the coefficients, without reading weights; see `Snapshots.reconstruct`.

    `entries` are the snapshots that are there, in their order, with their files' metadata.
    """
    if not entries:
        raise ValueError(
            "There are no snapshots in the folder. Give the one in which a training saves them: "
            "Snapshots(folder).save(ema)."
        )
    at = entries[-1]["update_index"] if at is None else at
    if not 1 <= at <= log.updates:
        raise ValueError(f"at={at}, but the log has updates 1 to {log.updates}. Give one of them.")
    targets = [_check_target(target, at) for target in targets]
    # The first ones from then on have what the last ones before do not.
    until = min((one["update_index"] for one in entries if one["update_index"] >= at), default=at)
    entries = [one for one in entries if one["update_index"] <= until]
    last = entries[-1]
    for entry in entries:
        if entry["factors"] != last["factors"]:
            raise ValueError(
                f"'{entry['file']}' and '{last['file']}' have other averaged tensors or momentum "
                "factors. Take another folder when changing the model, include, exclude or "
                "momentum_scale."
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
    own = [(one["events"], one["average"]) for one in entries]
    then = max((one["events"] for one in entries if one["update_index"] == at), default=None)
    solved = Solved(at, entries, {})
    for factor in sorted({*last["factors"].values()} or {1.0}, key=lambda f: (f != 1, f)):
        momenta, updates = log.matrix(factor, targets, at)
        end = int((updates <= at).sum()) if then is None else then
        wanted = [(end, column) for column in range(len(log.averages), momenta.shape[1])]
        unknown = momenta[: max(max(own)[0], end)].isnan().any(1).nonzero()
        if len(unknown):
            raise ValueError(
                f"The momentum of update {int(updates[unknown[0]])} is unknown, and there was no "
                "schedule. Call record(ema) before the first update, and give floats."
            )
        solutions = solve(gram(momenta, own + wanted), noise)
        solved.systems[factor] = System(momenta, updates, own + wanted, solutions)
        for target, vector, solution in zip(targets, wanted, solutions, strict=True):
            if solution.profile_error > WARN:
                what = "the weights" if isinstance(target, Tensor) else target
                every = spacing_needed(momenta, updates, own, vector, noise[-1], WARN)
                more = f"every {every} updates from 0 on" if every else "of an average more like it"
                _complain(
                    f"These snapshots do not make {what} at update {at}: the profile error is "
                    f"{solution.profile_error:.1%} of its norm. Below {WARN:.0%} it is with "
                    f"snapshots {more}.",
                    refused=solution.profile_error > REFUSE and not approximate,
                )
    return solved


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
    fine = weights.shape == (at,) and bool(((weights >= 0) & weights.isfinite()).all())
    if not fine or not weights.any():
        raise ValueError(
            f"A target's weights must be a tensor of {at} finite values from 0 on, one for each "
            f"update, not all 0, but got shape {tuple(weights.shape)}, {target}."
        )
    return weights / weights.sum()


def rebuild(folder: Path, solved: Solved) -> list[Reconstruction]:
    """The targets' weights, group by group of tensors, each from all files."""
    at, entries, systems = solved
    last = ([one for one in entries if one["update_index"] <= at] or entries)[-1]
    openers = [_opener(folder, entry) for entry in entries]
    read = _opener(folder, last)()
    shapes = {name: read(name).shape for name in last["factors"]}
    coefficients = {
        factor: [solution.coefficients.tolist() for solution in system.solutions]
        for factor, system in systems.items()
    }
    shown = next(iter(coefficients.values()))
    results: list[dict[str, Tensor]] = [{} for _ in shown]
    for weights in results:
        weights |= {name: read(name).clone() for name in last["copied"]}
        for name, shape in shapes.items():
            dtype = torch.promote_types(read(name).dtype, torch.float32)
            weights[name] = torch.empty(shape, dtype=dtype)
    for names in with_progress(_grouped(shapes), "reconstruct"):
        readers = (
            partial(_checked, opener(), folder / entry["file"], shapes)
            for opener, entry in zip(openers, entries, strict=True)
        )
        add_up(readers, {name: coefficients[last["factors"][name]] for name in names}, results)
    found = []
    for number, weights in enumerate(results):
        weights |= {name: torch.view_as_complex(weights[name]) for name in last["complex"]}
        weights |= {name: weights[first] for name, first in last["ties"].items()}
        solutions = [system.solutions[number] for system in systems.values()]
        errors = {name: max(getattr(one, name) for one in solutions) for name in ERRORS}
        x = {entry["file"]: x for entry, x in zip(entries, shown[number], strict=True)}
        found.append(Reconstruction(weights=weights, update_index=at, coefficients=x, **errors))
    return found


def _opener(folder: Path, entry: Mapping[str, Any]) -> Callable[[], Callable[[str], Tensor]]:
    """What opens a snapshot's file, and gives a function that reads a tensor of it by name.

    Mapped files take memory while they are open. One of torch.save takes long to open, and stays.
    """
    path, prefix = folder / entry["file"], entry.get("prefix")
    if prefix is None:
        return lambda: import_safetensors().safe_open(path, framework="pt").get_tensor
    tensors: Any = read_file(path, mapped=True)
    return lambda: lambda name: tensors[prefix + name]


def _checked(
    read: Callable[[str], Tensor], path: Path, shapes: Mapping[str, torch.Size], name: str
) -> Tensor:
    try:
        value = read(name)
        if value.shape != shapes[name]:
            raise ValueError(f"shape {[*value.shape]}, but {[*shapes[name]]} in the last snapshot")
        if value.numel() and not all(bool(one.isfinite()) for one in value.aminmax()):
            largest = f"{value.dtype} has for values above {torch.finfo(value.dtype).max:g}"
            raise ValueError(f"it has Inf or NaN, as {largest}")
    except Exception as error:
        raise ValueError(
            f"'{name}' cannot be read from '{path}' ({type(error).__name__}: {error}). "
            "Nothing was rebuilt. Delete that file to do without this snapshot."
        ) from error
    return value


def _grouped(shapes: Mapping[str, torch.Size]) -> list[list[str]]:
    """Names of tensors that are added up together: few files are opened then, for little memory."""
    groups, elements = list[list[str]](), ELEMENTS + 1
    for name, shape in shapes.items():
        elements += shape.numel()
        if elements > ELEMENTS:
            groups.append([])
            elements = shape.numel()
        groups[-1].append(name)
    return groups
