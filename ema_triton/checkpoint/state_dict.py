"""A saved state: build it; parse it, check that it matches an EMA, load all of it or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ema_triton.checkpoint import interop
from ema_triton.distributed import collectives, dtensor
from ema_triton.modules import clean_name, clean_weights
from ema_triton.ops.precision import (
    PRECISIONS,
    RESIDUAL_DTYPE,
    as_real,
    join_residual,
    split_residual,
)
from ema_triton.pairing import (
    INTEGERS,
    REAL_DTYPE,
    quoted,
    storage_ptr,
    unsupported,
)
from ema_triton.schedules import Schedule, momentum_from, schedule_from_state, schedule_to_state
from ema_triton.state import EMAState

# The format of ModelEMA.state_dict().
VERSION = 2


def build(
    ema: EMAState, weights: Mapping[str, Tensor], *, clone: bool, full_state_dict: bool
) -> dict[str, Any]:
    """What is saved of an EMA: all that its state has, but for skip counts.

    Args:
        ema: The EMA's state.
        weights: Its tensors by name; during a swap they are elsewhere.
        clone: Whether to copy the tensors.
        full_state_dict: Whether to gather them on rank 0, a collective; other ranks get {}.
    """
    residuals = {
        name: dtensor.wrap_like(residual, value)
        for name, value in weights.items()
        if (residual := ema.residual_of(name, dtensor.local_part(value))) is not None
    }
    if full_state_dict:
        weights, residuals = map(collectives.gather_on_rank0, (weights, residuals))
        if not collectives.is_rank0():
            return {}
    elif clone:
        weights, residuals = (
            {name: value.clone() for name, value in tensors.items()}
            for tensors in (weights, residuals)
        )
    schedule = None if ema.schedule is None else schedule_to_state(ema.schedule)
    random_state = {"seed": ema.seed, "updates": ema.stochastic_updates}
    return {
        # Ignite's Checkpoint tells a state that is saved alone from one among others by the name
        # that users give it: none of these keys is one.
        "version": VERSION,
        "update_index": ema.update_index,
        # JSON is one value: torch.distributed.checkpoint would take a dict's keys apart, and miss
        # them where the schedule is another one when it loads.
        "schedule": None if schedule is None else json.dumps(schedule),
        "weights": weights,
        "precision": ema.precision,
        "residuals": residuals,
        "random_state": random_state if ema.precision == "stochastic" else None,
    }


class SavedState(NamedTuple):
    """What `ModelEMA.state_dict` returned, or a module's state dict, by clean name."""

    weights: Mapping[str, Any]
    residuals: Mapping[str, Any]
    precision: str | None = None  # None: it is a module's state dict
    random_state: Mapping[str, int] | None = None
    update_index: int | None = None
    schedule: Schedule | None = None
    strict: bool = True  # whether it must have the EMA's names, all of them and no others
    source: str = "it"  # what warnings call it
    remarks: Sequence[str] = ()  # what there is to say of it

    @classmethod
    def parse(cls, state: object, *, strict: bool = True) -> SavedState:
        """Read a state, whatever EMA it is for.

        Args:
            state: What was saved.
            strict: Whether it must have that EMA's names, all of them and no others.

        Raises:
            ValueError: It is neither of the two, of another version, or damaged.
        """
        state = interop.check_dict(state)
        if not isinstance(state.get("weights"), Mapping):
            named = all(isinstance(name, str) for name in state)
            if not named or not any(isinstance(value, Tensor) for value in state.values()):
                raise ValueError(
                    "The state must be what ModelEMA.state_dict() returned, with 'version' and "
                    f"'weights', or a module's state dict, but got keys {[*state][:5]}."
                )
            return cls(clean_weights(state), {}, strict=strict, source=interop.PLAIN)
        version = state.get("version")
        if type(version) is not int or version != VERSION:
            raise ValueError(
                f"The state has version {version!r}, but this release of ema_triton reads version "
                f"{VERSION}. Load it with the release that wrote it, save its weights there by "
                "save_weights(), and load them here by load_weights()."
            )
        try:
            precision = state["precision"]
            random_state = None
            if precision == "stochastic":
                counts = state["random_state"]
                random_state = {name: _parse_count(counts[name]) for name in ("seed", "updates")}
            if precision not in PRECISIONS or state["random_state"] != random_state:
                raise ValueError(f"precision {precision!r}, random_state {state['random_state']!r}")
            update_index = _parse_count(state["update_index"])
            schedule = None
            if state["schedule"] is not None:
                schedule = schedule_from_state(json.loads(state["schedule"]))
                momentum_from(schedule, update_index + 1)  # raises if it returns no momentum
            weights, residuals = {**state["weights"]}, {**state["residuals"]}
            return cls(weights, residuals, precision, random_state, update_index, schedule, strict)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"The state is damaged ({type(error).__name__}: {error}), so it cannot be loaded. "
                "Give another copy of the checkpoint."
            ) from error

    def check_matches(self, own: Mapping[str, Tensor]) -> None:
        """Compare with an EMA's tensors, by clean name.

        Raises:
            ValueError: Names (unless not `strict`), shapes or kinds of tensors differ, or a part
                is another rank's.
        """
        missing = [f"'{name}' is missing" for name in self.missing(own)]
        unexpected = [f"'{name}' is unexpected" for name in self.unexpected(own)]
        differing = self.differing(own, self.difference)
        nothing = bool(own) and len(missing) == len(own)
        names = [missing, unexpected] if self.strict or nothing else []
        if text := listed(*names, differing):
            what = "does not fit this EMA model"
            remedy = "Load it into the EMA of a model like the one it was saved from"
            if nothing and not self.strict:
                what = "has none of this EMA's tensors"
            elif not nothing and not differing:
                remedy += "; or give strict=False to load what it has, and leave the rest as it is"
            raise ValueError(f"The state {what}: {text}. Nothing was loaded. {remedy}.")
        values = [*self.weights.items(), *self.residuals.items()]
        others = {
            name: value
            for name, value in values
            if name in self.weights.keys() & own.keys()
            and dtensor.shard_like(value, own[name]) is None
        }
        if others:
            name, value = next(iter(others.items()))
            raise ValueError(
                f"The state does not have this rank's part of {quoted([*others])}: in the state "
                f"'{name}' is {dtensor.describe_part(value)}; here it is "
                f"{dtensor.describe_part(own[name])}. Another rank saved it, or a run with other "
                "ranks. Nothing was loaded. Save ema.state_dict(full_state_dict=True), and load it "
                "on all ranks by load_state_dict(state, full_state_dict=True); or use "
                "torch.distributed.checkpoint; or load on each rank what that rank saved."
            )

    def missing(self, own: Mapping[str, Tensor]) -> list[str]:
        """The EMA's names that it does not have."""
        return [name for name in own if name not in self.weights]

    def unexpected(self, own: Mapping[str, Tensor]) -> list[str]:
        """Its names that the EMA does not have."""
        return [name for name in {**self.weights, **self.residuals} if name not in own]

    def differing(
        self, own: Mapping[str, Tensor], compare: Callable[[str, Tensor], str | None]
    ) -> list[str]:
        """What `compare(name, tensor)` says of the tensors that both have."""
        common = ((name, tensor) for name, tensor in own.items() if name in self.weights)
        return [f"'{name}' {text}" for name, tensor in common if (text := compare(name, tensor))]

    def difference(self, name: str, own: Tensor) -> str | None:
        """Why this weight and its residual cannot be loaded into an EMA's tensor, if so."""
        weight = self.weights[name]
        if not isinstance(weight, Tensor):
            return f"is a {type(weight).__name__}, not a tensor"
        if problem := unsupported(dtensor.local_part(weight)):
            return problem.reason
        if weight.shape != own.shape:
            return f"is {tuple(weight.shape)} in the state but {tuple(own.shape)} here"
        if weight.dtype not in (*REAL_DTYPE, *INTEGERS, own.dtype):
            return f"is {weight.dtype}, which has to be converted first"
        if weight.is_complex() != own.is_complex():
            return f"is {weight.dtype} in the state but {own.dtype} here"
        if name in self.residuals:
            residual, real = self.residuals[name], as_real(weight)
            if (
                not isinstance(residual, Tensor)
                or unsupported(dtensor.local_part(residual))
                or residual.dtype != RESIDUAL_DTYPE.get(real.dtype)
                or residual.shape != real.shape
            ):
                return f"has a residual that is not one of {weight.dtype} of its shape"
        return None

    def value(self, name: str, own: Tensor) -> Tensor:
        """This rank's part of a weight, sharded as `own` is; joined with its residual to fp32."""
        weight = dtensor.shard_like(self.weights[name], own)
        assert weight is not None  # as it was compared
        if name not in self.residuals:
            return weight
        residual = dtensor.shard_like(self.residuals[name], own)
        assert residual is not None
        value = join_residual(as_real(weight), residual.to(weight.device))
        return torch.view_as_complex(value) if weight.is_complex() else value

    def map(self, own: Mapping[str, Tensor], function: Callable[[str, Tensor], Any]) -> SavedState:
        """The same with other tensors, made by `function(name, tensor)`; None where `own` has none.

        Args:
            own: An EMA's tensors, with which it was compared.
            function: Of what is to be loaded.
        """
        common = self.weights.keys() & own.keys()
        weights, residuals = (
            {name: function(name, value) if name in common else None for name, value in of.items()}
            for of in (self.weights, self.residuals)
        )
        return self._replace(weights=weights, residuals=residuals)


def listed(*kinds: list[str]) -> str:
    """The first five of each kind, and how many more there are."""
    shown = [one for kind in kinds for one in kind[:5]]
    more = sum(map(len, kinds)) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _parse_count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a count")
    return value


def read_weights(
    source: Mapping[str, Any] | str | os.PathLike[str], ema: EMAState, *, strict: bool
) -> SavedState:
    """Read the weights in a dict or a file of this or another library.

    Raises:
        ValueError: It is not recognised, or damaged.
        OSError: The file cannot be opened.
    """
    state, updates = (source, None) if isinstance(source, Mapping) else interop.read_path(source)
    if isinstance(state, Mapping) and isinstance(state.get("weights"), Mapping):
        return SavedState.parse(state, strict=strict)._replace(update_index=None, schedule=None)
    own = ema.tensors()
    parameters: dict[int, list[str]] = {}  # names by tensor: a tied one has several
    for name, slot in ema.slots().items():
        if not slot.is_buffer and name in own:
            parameters.setdefault(id(slot.whole()), []).append(name)
    found = interop.extract_weights(state, own, [*parameters.values()])
    weights, remarks = found.weights, []
    if not isinstance(source, Mapping):  # a safetensors file has a tied tensor once
        weights |= {
            other: weights[name]
            for names in parameters.values()
            for name in names
            if name in weights
            for other in names
            if other not in weights
        }
    if updates is not None:
        found = found._replace(source=interop.DIFFUSERS, updates=updates)
        averaged = {name for names in parameters.values() for name in names}
        if buffers := [name for name in own if name in weights.keys() - averaged]:
            remarks.append(
                f"its {quoted(buffers)} are those of a new model, as {found.source} averages "
                "parameters only"
            )
    if found.updates:
        remarks.append(
            f"{found.source} counts {found.updates} updates: set update_index to go on with a "
            "schedule from there"
        )
    strict = strict and found.has_all_names
    return SavedState(weights, {}, strict=strict, source=found.source, remarks=remarks)


def scatter_state(state: object, ema: EMAState, *, strict: bool) -> SavedState:
    """This rank's parts of the whole state that rank 0 gives; a collective, which all ranks call.

    Args:
        state: What was saved; only rank 0's is read.
        ema: The state to load it into.
        strict: Whether it must have the EMA's names; only rank 0's is looked at.

    Raises:
        ValueError: On every rank, if rank 0's is no state or does not match.
    """
    own = ema.tensors()
    wholes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in own.items()
    }

    def parse_to_meta() -> SavedState:
        saved = SavedState.parse(state, strict=strict)
        saved.check_matches(wholes)
        return saved.map(own, lambda _, tensor: dtensor.local_part(tensor).to("meta"))

    saved = meta = collectives.on_rank0(parse_to_meta)
    if collectives.is_rank0():
        whole = SavedState.parse(state)
        saved = meta._replace(weights=whole.weights, residuals=whole.residuals)
        saved = saved.map(own, lambda _, tensor: dtensor.local_part(tensor))
    return saved.map(own, lambda name, tensor: collectives.scatter_from_rank0(tensor, own[name]))


def read_several(
    state: Any,  # noqa: ANN401
    emas: Mapping[str, EMAState],
    *,
    full_state_dict: bool,
    strict: bool,
) -> dict[str, SavedState]:
    """Read what a bank saved of its EMAs; with `full_state_dict`, as `scatter_state` does.

    Raises:
        ValueError: One of them is no state, or damaged; it says which.
    """
    averages = state["averages"] if not full_state_dict or collectives.is_rank0() else {}
    found = {}
    for name, ema in emas.items():
        with _naming(name):
            if full_state_dict:
                found[name] = scatter_state(averages.get(name), ema, strict=strict)
            else:
                found[name] = SavedState.parse(averages[name], strict=strict)
    return found


def restore_several(found: Mapping[str, SavedState], emas: Mapping[str, EMAState]) -> list[str]:
    """`restore` for each of a bank's EMAs, after all of them have been compared.

    Raises:
        ValueError: One does not match; it says which. Nothing was written.
    """
    for name, saved in found.items():
        with _naming(name):
            saved.check_matches(emas[name].tensors())
    return [
        f"Average {name!r}: {remark}"
        for name, saved in found.items()
        for remark in restore(saved, emas[name])
    ]


@contextmanager
def _naming(average: str) -> Iterator[None]:
    """Say of which average an error is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Average {average!r}: {error}") from error


def load(saved: SavedState, ema: EMAState) -> list[str]:
    """Check that a saved state matches an EMA's state, then write it there.

    Args:
        saved: The saved state.
        ema: The EMA's state.

    Returns:
        Remarks on what was rounded, and what the saved state does not have.

    Raises:
        ValueError: Names, shapes or kinds of tensors differ. Nothing was written.
    """
    own = ema.tensors()
    saved.check_matches(own)
    own_storages = {storage_ptr(dtensor.local_part(tensor)) for tensor in own.values()}
    writes: list[Callable[[], object]] = []
    rounded: list[str] = []
    without_residual: list[str] = []
    for name, tensor in own.items():
        if name not in saved.weights:
            continue
        target, value = dtensor.local_part(tensor), saved.value(name, tensor)
        residual, dtype = ema.residual_of(name, target), target.dtype
        if residual is None:
            if storage_ptr(value) in own_storages:
                value = value.clone()  # or the write of another tensor could change it
            writes.append(partial(target.copy_, value))
        else:
            value, dtype = as_real(value), torch.float32
            if saved.precision is None and value.dtype in RESIDUAL_DTYPE:
                without_residual.append(name)
            copy = value.to(target.device, dtype, copy=True)  # split_residual() uses it up
            writes.append(partial(split_residual, copy, as_real(target), residual))
        if value.dtype in REAL_DTYPE and torch.promote_types(value.dtype, dtype) != dtype:
            back = value.to(dtype).to(value.dtype)
            if not torch.allclose(back, value, rtol=0, atol=0, equal_nan=True):
                rounded.append(name)
    for write in writes:
        write()
    if saved.update_index is not None:
        ema.update_index = saved.update_index
    remarks = []
    # One name of a tied tensor is enough.
    written = {storage_ptr(dtensor.local_part(own[name])) for name in own.keys() & saved.weights}
    if missing := [
        name
        for name in saved.missing(own)
        if storage_ptr(dtensor.local_part(own[name])) not in written
    ]:
        remarks.append(f"{saved.source} has no {quoted(missing)}, which stay as they are")
    if unexpected := saved.unexpected(own):
        remarks.append(f"its {quoted(unexpected)} are not in this EMA, and were left out")
    if rounded:
        remarks.append(f"{quoted(rounded)} had more digits than this EMA holds, and were rounded")
    if without_residual:
        remarks.append(
            f"what was rounded off {quoted(without_residual)} is not in a module's state dict, "
            "and the exact EMA goes on from the weights as they are"
        )
    if ema.precision == "stochastic" and saved.random_state is not None:
        ema.set_random_state(**saved.random_state)
    elif ema.precision == "stochastic" and saved.precision is None:
        remarks.append(
            "a module's state dict has no random state, and stochastic rounding goes on from its "
            f"seed {ema.seed} and its count of {ema.stochastic_updates} updates"
        )
    return remarks


def restore(saved: SavedState, ema: EMAState) -> list[str]:
    """Load a saved state, and have its schedule replace the EMA's.

    Args:
        saved: The saved state.
        ema: The EMA's state.

    Returns:
        Warnings: what was lost, and that another schedule was replaced.

    Raises:
        ValueError: Names, shapes or kinds of tensors differ. Nothing was written.
    """
    lost = [*load(saved, ema), *saved.remarks]
    said = [f"The state was loaded; but {'; '.join(lost)}."] if lost else []
    if saved.schedule is not None:
        if ema.schedule not in (None, saved.schedule):
            said.append(
                f"The checkpoint's schedule {saved.schedule} replaces {ema.schedule}. To use "
                "another one, assign `schedule` after loading."
            )
        ema.schedule = saved.schedule
    return said


def with_weights(
    state: Mapping[str, Any], weights: Mapping[str, Any], submodule: str = ""
) -> dict[str, Any]:
    """A model's state dict with the weights of an EMA of it, or of a part of it, in their places.

    Args:
        state: The model's, whose names may have what wrappers inserted.
        weights: The EMA's, by clean name.
        submodule: The name of the part.
    """
    return {
        name: weights.get(_within(name, submodule) or "", value) for name, value in state.items()
    }


def of_weight_averaging(checkpoint: Mapping[str, Any], submodule: str = "") -> dict[str, Any]:
    """The average in a checkpoint of Lightning's `WeightAveraging`, as an EMA's state.

    It may have more than the EMA, namely what metrics save: it is to be loaded with strict=False.

    Args:
        checkpoint: All of it; {} is returned if it has no such average.
        submodule: The name of the part of the model that the EMA is of.
    """
    if not {"averaging_state", "state_dict"} <= checkpoint.keys():
        return {}
    weights = {
        own: value
        for name, value in clean_weights(checkpoint["state_dict"]).items()
        if (own := _within(name, submodule)) is not None
    }
    return {
        "version": VERSION,
        "update_index": int(checkpoint["averaging_state"]["n_averaged"]),
        "schedule": None,
        "weights": weights,
        "precision": "nearest",
        "residuals": {},
        "random_state": None,
    }


def _within(name: str, submodule: str) -> str | None:
    """A model's name of what is in a submodule as the submodule's own, clean; None if it is not."""
    name, prefix = clean_name(name), clean_name(f"{submodule}.") if submodule else ""
    return name.removeprefix(prefix) if name.startswith(prefix) else None
