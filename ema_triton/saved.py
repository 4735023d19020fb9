"""A saved state: what is in it, whether it fits an EMA model, and what each tensor's value was."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ema_triton.pairs import REAL_DTYPE, clean_name, listed
from ema_triton.precision import COMPANION_DTYPE, PRECISIONS, as_real, join, shown
from ema_triton.schedules import Schedule, momentum_from, schedule_from_state

# The format of ModelEMA.state_dict().
VERSION = 1

# What can be copied into another dtype, beside what can be averaged.
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Saved(NamedTuple):
    """What `ModelEMA.state_dict` returned, or a module's state dict, by clean name."""

    weights: Mapping[str, Any]
    companions: Mapping[str, Any]
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
            weights: Any = OrderedDict((clean_name(name), value) for name, value in state.items())
            weights._metadata = _module_versions(state)
            return cls(weights, {}, None, 0, 0, None, None)
        version = state.get("version")
        if type(version) is not int or version != VERSION:
            raise ValueError(
                f"The state has version {version!r}, but this release of ema_triton "
                f"reads version {VERSION}. Use the release that wrote it."
            )
        precision, companions = state.get("precision"), state.get("companions")
        rounding: Any = state.get("rounding")
        if (
            precision not in PRECISIONS
            or not isinstance(companions, Mapping)
            or not (
                isinstance(rounding, Mapping) if precision == "stochastic" else rounding is None
            )
            or not {"rounding", "update_index", "schedule"} <= state.keys()
        ):
            raise ValueError(
                f"The state's precision is {precision!r}, with companions of type "
                f"{type(companions).__name__} and rounding of type {type(rounding).__name__}, "
                f"among the keys {[*state][:9]}. That is no state of a precision of "
                f"{', '.join(PRECISIONS)}: the checkpoint is damaged."
            )
        counts = {"seed": 0, "updates": 0} if rounding is None else {**rounding}
        if counts.keys() != {"seed", "updates"} or not all(map(_is_count, counts.values())):
            raise ValueError(
                f"The state's rounding should be a seed and a number of updates, but is "
                f"{rounding!r}. The checkpoint is damaged."
            )
        update_index, schedule = state["update_index"], state["schedule"]
        if not _is_count(update_index):
            raise ValueError(
                f"The state's update_index must be the number of updates made, but is "
                f"{update_index!r}. The checkpoint is damaged."
            )
        if schedule is not None:
            try:
                schedule = json.loads(schedule)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"The state's schedule should be JSON, but is {schedule!r}. The checkpoint is "
                    "damaged."
                ) from error
            schedule = schedule_from_state(schedule)
            try:
                momentum_from(schedule, update_index + 1)
            except (ArithmeticError, TypeError, ValueError) as error:
                raise ValueError(
                    f"The state's schedule gives no momentum for its next update: {error}. The "
                    "checkpoint is damaged."
                ) from error
        weights = OrderedDict(state["weights"])
        weights._metadata = _module_versions(state["weights"])
        return cls(
            weights, companions, precision, **counts, update_index=update_index, schedule=schedule
        )

    def check_fit(self, own: Mapping[str, Any]) -> None:
        """Compare with the EMA model's own state, by clean name.

        Raises:
            ValueError: Names, shapes or kinds of tensors differ.
        """
        missing = [f"'{name}' is missing" for name in own if name not in self.weights]
        unexpected = [f"'{name}' is unexpected" for name in self.weights if name not in own]
        unexpected += [
            f"'{name}' has a companion and no weight"
            for name in self.companions
            if name not in self.weights or not isinstance(own.get(name), Tensor) or _is_extra(name)
        ]
        differing = [
            problem
            for name, tensor in own.items()
            # Whatever a module makes of its extra state.
            if isinstance(tensor, Tensor) and name in self.weights and not _is_extra(name)
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
        if not _is_whole(weight):
            return [f"'{name}' is sparse, nested, quantized, uninitialized, or a lazy view"]
        if weight.shape != own.shape:
            return [f"'{name}' is {tuple(weight.shape)} in the state but {tuple(own.shape)} here"]
        if weight.is_meta:
            return [f"'{name}' is on the meta device, without values"]
        if weight.dtype not in REAL_DTYPE and weight.dtype not in INTEGERS:
            return [f"'{name}' is {weight.dtype}, which has to be converted first"]
        if weight.is_complex() != own.is_complex():
            return [f"'{name}' is {weight.dtype} in the state but {own.dtype} here"]
        if name in self.companions:
            companion, real = self.companions[name], as_real(weight)
            if (
                not isinstance(companion, Tensor)
                or not _is_whole(companion)
                or companion.dtype != COMPANION_DTYPE.get(real.dtype)
                or companion.shape != real.shape
                or companion.is_meta
            ):
                return [f"the companion of '{name}' is not one for {weight.dtype} of its shape"]
        return []

    def converted(
        self, own: Mapping[str, Any], exact: Mapping[str, str]
    ) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
        """The weights for an EMA model to load; exact values; and remarks on what was lost.

        Args:
            own: The EMA model's state, which this one fits.
            exact: Names of those that are exact, and what their values go by.

        Returns:
            Weights by name, where they are exact as they show; fp32 values of those.
        """
        weights: dict[str, Any] = {}
        values: dict[str, Tensor] = {}
        rounded: list[str] = []
        unknown: list[str] = []
        shared = {_storage(tensor) for tensor in own.values() if isinstance(tensor, Tensor)}
        for name in self.weights:
            mine, value = own[name], self._value(name)
            if isinstance(value, Tensor) and _storage(value) in shared:
                value = value.clone()  # it may be overwritten before its turn
            weights[name] = value
            if not isinstance(mine, Tensor) or _is_extra(name):
                continue
            target = mine.dtype
            if name in exact:
                real = as_real(value)
                if self.precision is None and real.dtype in COMPANION_DTYPE:
                    unknown.append(name)
                full = values[exact[name]] = real.to(mine.device, torch.float32)
                low = shown(full, as_real(mine).dtype)
                weights[name] = torch.view_as_complex(low) if mine.is_complex() else low
                target = torch.complex64 if mine.is_complex() else torch.float32
            if _loses_digits(value, target):
                rounded.append(name)
        remarks = []
        if rounded:
            remarks.append(
                f"{listed(rounded)} had more digits than are kept here, and were rounded"
            )
        if unknown:
            remarks.append(
                f"what was rounded off {listed(unknown)} is not in a module's state dict, and the "
                "exact EMA goes on from the weights as they are"
            )
        return weights, values, remarks

    def _value(self, name: str) -> Any:  # noqa: ANN401
        """What was saved by this name: of an exact tensor its fp32 value, else as it is."""
        weight = self.weights[name]
        if name not in self.companions:
            return weight
        value = join(as_real(weight), self.companions[name].to(weight.device))
        return torch.view_as_complex(value) if weight.is_complex() else value


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _module_versions(weights: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """The modules' versions beside a state dict, which nn.Module.load_state_dict compares."""
    versions = getattr(weights, "_metadata", None)
    if not isinstance(versions, Mapping):
        return None
    return OrderedDict(
        (name, version)
        for name, version in versions.items()
        if isinstance(version, Mapping) and type(version.get("version")) in (int, type(None))
    )


def _is_whole(tensor: Tensor) -> bool:
    """Whether its values are in its memory, as they are."""
    return not (
        nn.parameter.is_lazy(tensor)
        or tensor.layout != torch.strided
        or tensor.is_nested
        or tensor.is_quantized
        or tensor.is_conj()
        or tensor.is_neg()
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == "_extra_state"


def _loses_digits(value: Tensor, target: torch.dtype) -> bool:
    if not (value.is_floating_point() or value.is_complex()):
        return False
    if torch.promote_types(value.dtype, target) == target:
        return False
    kept = value.to(target).to(value.dtype)
    return not bool(((kept == value) | (value != value)).all())
