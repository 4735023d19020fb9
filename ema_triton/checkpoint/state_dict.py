"""A saved state: what is in it, whether it fits an EMA model, and what each tensor's value was."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ema_triton.checkpoint import interop
from ema_triton.checkpoint.interop import extract_weights
from ema_triton.distributed import collectives, dtensor
from ema_triton.modules import clean_weights
from ema_triton.ops.precision import PRECISIONS, RESIDUAL_DTYPE, as_real, join, split
from ema_triton.pairing import INTEGERS, REAL_DTYPE, quoted, storage_ptr, unsupported
from ema_triton.schedules import Schedule, momentum_from, schedule_from_state
from ema_triton.state import EMAState

# The format of ModelEMA.state_dict().
VERSION = 2


class Saved(NamedTuple):
    """What `ModelEMA.state_dict` returned, or a module's state dict, by clean name."""

    weights: Mapping[str, Any]
    residuals: Mapping[str, Any]
    precision: str | None  # None: a module's state dict does not tell
    seed: int
    updates: int  # that were rounded stochastically
    update_index: int | None  # None: not told
    schedule: Schedule | None

    @classmethod
    def of(cls, state: object) -> Saved:
        """Take it apart.

        Raises:
            ValueError: It is neither of the two, of another version, or damaged.
        """
        if not isinstance(state, Mapping) or not state:
            got = "an empty one" if isinstance(state, Mapping) else f"a {type(state).__name__}"
            raise ValueError(
                "The state must be a dict, what ModelEMA.state_dict() or a module's state_dict() "
                f"returned, but got {got}."
            )
        if not isinstance(state.get("weights"), Mapping):
            named = all(isinstance(name, str) for name in state)
            if not named or not any(isinstance(value, Tensor) for value in state.values()):
                raise ValueError(
                    "The state must be what ModelEMA.state_dict() returned, with 'version' and "
                    f"'weights', or a module's state dict, but got keys {[*state][:5]}."
                )
            return cls(clean_weights(state), {}, None, 0, 0, None, None)
        version = state.get("version")
        if type(version) is not int or version != VERSION:
            raise ValueError(
                f"The state has version {version!r}, but this release of ema_triton reads version "
                f"{VERSION}. Load it with the release that wrote it, and hand its weights on: "
                "save_weights() there, load_weights() here."
            )
        try:
            return cls(**_fields(state))
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"The state is damaged ({type(error).__name__}: {error}), so it cannot be loaded. "
                "Give another copy of the checkpoint."
            ) from error

    def check_fit(self, own: Mapping[str, Tensor]) -> None:
        """Compare with the EMA model's own tensors, by clean name.

        Raises:
            ValueError: Names, shapes or kinds of tensors differ.
        """
        missing = [f"'{name}' is missing" for name in own if name not in self.weights]
        unexpected = [f"'{name}' is unexpected" for name in self.weights if name not in own]
        unexpected += [
            f"'{name}' has a residual and no weight"
            for name in self.residuals
            if name not in self.weights
        ]
        differing = [
            problem
            for name, tensor in own.items()
            if name in self.weights
            for problem in self._problems(name, tensor)
        ]
        problems = [
            ", ".join(found[:5]) + (f" and {len(found) - 5} more {what}" if len(found) > 5 else "")
            for found, what in (
                (missing, "are missing"),
                (unexpected, "are unexpected"),
                (differing, "do not fit"),
            )
            if found
        ]
        if problems:
            raise ValueError(
                f"The state does not fit this EMA model: {', '.join(problems)}. Nothing was "
                "loaded. Load it into the EMA of a model like the one it was saved from."
            )

    def _problems(self, name: str, own: Tensor) -> list[str]:
        weight = self.weights[name]
        if not isinstance(weight, Tensor):
            return [f"'{name}' is a {type(weight).__name__}, not a tensor"]
        if found := unsupported(dtensor.local_part(weight)):
            return [f"'{name}' {found.reason}"]
        if weight.shape != own.shape:
            return [f"'{name}' is {tuple(weight.shape)} in the state but {tuple(own.shape)} here"]
        if weight.dtype not in REAL_DTYPE and weight.dtype not in INTEGERS:
            return [f"'{name}' is {weight.dtype}, which has to be converted first"]
        if weight.is_complex() != own.is_complex():
            return [f"'{name}' is {weight.dtype} in the state but {own.dtype} here"]
        if name in self.residuals:
            residual, real = self.residuals[name], as_real(weight)
            if (
                not isinstance(residual, Tensor)
                or unsupported(dtensor.local_part(residual))
                or residual.dtype != RESIDUAL_DTYPE.get(real.dtype)
                or residual.shape != real.shape
            ):
                return [f"the residual of '{name}' is not one for {weight.dtype} of its shape"]
        return []

    def converted(
        self, own: Mapping[str, Tensor], exact: Container[str]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """The values for an EMA model, all in memory of their own; and remarks on what was lost.

        Args:
            own: This rank's parts of the EMA model's tensors, which this state's fit.
            exact: Names of those that are exact: their values are fp32, complex ones as reals.
        """
        values: dict[str, Tensor] = {}
        rounded: list[str] = []
        unknown: list[str] = []
        shared = set(map(storage_ptr, own.values()))
        for name, tensor in own.items():
            value, target = self._value(name), tensor.dtype
            if storage_ptr(value) in shared:
                value = value.clone()  # it may be overwritten before its turn
            if name in exact:
                target = torch.complex64 if tensor.is_complex() else torch.float32
                if self.precision is None and as_real(value).dtype in RESIDUAL_DTYPE:
                    unknown.append(name)
            if _loses_digits(value, target):
                rounded.append(name)
            if name in exact:
                value = as_real(value).to(tensor.device, torch.float32, copy=True)
            values[name] = value
        remarks = []
        if rounded:
            remarks.append(
                f"{quoted(rounded)} had more digits than are kept here, and were rounded"
            )
        if unknown:
            remarks.append(
                f"what was rounded off {quoted(unknown)} is not in a module's state dict, and the "
                "exact EMA goes on from the weights as they are"
            )
        return values, remarks

    def _value(self, name: str) -> Tensor:
        """What was saved by this name: of an exact tensor its fp32 value, else as it is."""
        weight: Tensor = self.weights[name]
        if name not in self.residuals:
            return weight
        value = join(as_real(weight), self.residuals[name].to(weight.device))
        return torch.view_as_complex(value) if weight.is_complex() else value


def _fields(state: Mapping[str, Any]) -> dict[str, Any]:
    """What `ModelEMA.state_dict` returned, as the fields of `Saved`; any error if it is damaged."""
    precision, update_index = state["precision"], state["update_index"]
    random_state = state["random_state"]
    counts = {"seed": 0, "updates": 0} if random_state is None else {**random_state}
    if (random_state is None) == (precision == "stochastic") or precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} with random_state {random_state!r}")
    if counts.keys() != {"seed", "updates"} or not all(map(_is_count, counts.values())):
        raise ValueError(f"random_state is {random_state!r}")
    if not _is_count(update_index):
        raise ValueError(f"update_index is {update_index!r}")
    schedule = None
    if state["schedule"] is not None:
        schedule = schedule_from_state(json.loads(state["schedule"]))
        momentum_from(schedule, update_index + 1)
    return {
        "weights": {**state["weights"]},
        "residuals": {**state["residuals"]},
        "precision": precision,
        "update_index": update_index,
        "schedule": schedule,
        **counts,
    }


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _loses_digits(value: Tensor, target: torch.dtype) -> bool:
    if not (value.is_floating_point() or value.is_complex()):
        return False
    if torch.promote_types(value.dtype, target) == target:
        return False
    kept = value.to(target).to(value.dtype)
    return not bool(((kept == value) | (value != value)).all())


def read_weights(
    source: Mapping[str, Any] | str | os.PathLike[str], ema: EMAState
) -> tuple[Saved, list[str]]:
    """What is in a dict or a file of this or another library; and remarks on what is not.

    Raises:
        ValueError: It is not recognised, or damaged.
        OSError: The file cannot be opened.
    """
    state: Any = source if isinstance(source, Mapping) else interop.read_file(source)
    if isinstance(state, Mapping) and isinstance(state.get("weights"), Mapping):
        return Saved.of(state)._replace(update_index=None, schedule=None), []
    tied: dict[int, str] = {}  # tensors of other libraries may have no names, and an order
    for name, slot in ema.slots().items():
        if not slot.is_buffer and slot.whole() is not None:
            tied.setdefault(id(slot.whole()), name)
    found = extract_weights(state, ema.tensors(), [*tied.values()])
    remarks = []
    if found.kept:
        remarks.append(f"{found.source} has no {quoted(found.kept)}, which stay as they are")
    if found.updates:
        remarks.append(
            f"{found.source} counts {found.updates} updates: set update_index to go on with a "
            "schedule from there"
        )
    return Saved(found.weights, {}, None, 0, 0, None, None), remarks


def scatter_state(state: object, ema: EMAState) -> Saved:
    """The parts of the whole state that rank 0 has, on every rank, all of which call this.

    Args:
        state: What was saved, on rank 0.
        ema: The state to load it into.

    Raises:
        ValueError: On every rank, if on rank 0 it is no state or does not fit.
    """
    own = ema.tensors()

    def checked() -> Saved:
        found = Saved.of(state)
        found.check_fit(own)
        return found._replace(
            weights=collectives.to_meta(found.weights),
            residuals=collectives.to_meta(found.residuals),
        )

    hollow = collectives.on_rank0(checked)
    found = Saved.of(state) if collectives.is_rank0() else hollow
    return hollow._replace(
        weights=collectives.scatter_from_rank0(hollow.weights, found.weights, own),
        residuals=collectives.scatter_from_rank0(hollow.residuals, found.residuals, own),
    )


def load(found: Saved, ema: EMAState) -> list[str]:
    """Check that what was saved fits an EMA, then write it into the EMA's state.

    Args:
        found: What was saved.
        ema: The state.

    Returns:
        Remarks on what was lost, and what was not told.

    Raises:
        ValueError: Names or shapes do not fit.
    """
    own = ema.tensors()
    found.check_fit(own)
    found = found._replace(
        weights={
            name: dtensor.shard_like(value, own[name]) for name, value in found.weights.items()
        },
        residuals={
            name: dtensor.shard_like(value, own[name]) for name, value in found.residuals.items()
        },
    )
    parts = {name: dtensor.local_part(tensor) for name, tensor in own.items()}
    exact = {
        name: residual
        for name, part in parts.items()
        if (residual := ema.residual_of(name, part)) is not None
    }
    values, remarks = found.converted(parts, exact)
    for name, value in values.items():
        if name in exact:
            split(value, as_real(parts[name]), exact[name])
        else:
            parts[name].copy_(value)
    if ema.precision == "stochastic" and found.precision == "stochastic":
        ema.set_random_state(found.seed, found.updates)
    elif ema.precision == "stochastic" and found.precision is None:
        remarks.append(
            "a module's state dict does not tell from where stochastic rounding goes on, which "
            f"keeps its seed {ema.seed} and its count of {ema.stochastic_updates} updates"
        )
    if found.update_index is not None:
        ema.update_index = found.update_index
    return remarks
