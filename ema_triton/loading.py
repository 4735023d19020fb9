"""Loading a saved state into an EMA's tensors: everything is compared first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ema_triton import files, ranks, shards
from ema_triton.pairs import listed
from ema_triton.precision import as_real, split
from ema_triton.rivals import weights_of
from ema_triton.saved import Saved
from ema_triton.state import EMAState


def weights_from(
    source: Mapping[str, Any] | str | os.PathLike[str], ema: EMAState
) -> tuple[Saved, list[str]]:
    """What is in a dict or a file of this or another library; and remarks on what is not.

    Raises:
        ValueError: It is not recognised, or damaged.
        OSError: The file cannot be opened.
    """
    state: Any = source if isinstance(source, Mapping) else files.read(source)
    if isinstance(state, Mapping) and isinstance(state.get("weights"), Mapping):
        return Saved.of(state)._replace(update_index=None, schedule=None), []
    tied: dict[int, str] = {}  # tensors of other libraries may have no names, and an order
    for name, slot in ema.slots().items():
        if not slot.is_buffer and slot.whole() is not None:
            tied.setdefault(id(slot.whole()), name)
    found = weights_of(state, ema.tensors(), [*tied.values()])
    remarks = []
    if found.kept:
        remarks.append(f"{found.source} has no {listed(found.kept)}, which stay as they are")
    if found.updates:
        remarks.append(
            f"{found.source} counts {found.updates} updates: set update_index to go on with a "
            "schedule from there"
        )
    return Saved(found.weights, {}, None, 0, 0, None, None), remarks


def spread_from_first(state: object, ema: EMAState) -> Saved:
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
            weights=ranks.hollow(found.weights), residuals=ranks.hollow(found.residuals)
        )

    hollow = ranks.from_first(checked)
    found = Saved.of(state) if ranks.is_first() else hollow
    return hollow._replace(
        weights=ranks.spread(hollow.weights, found.weights, own),
        residuals=ranks.spread(hollow.residuals, found.residuals, own),
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
        weights={name: shards.part_of(value, own[name]) for name, value in found.weights.items()},
        residuals={
            name: shards.part_of(value, own[name]) for name, value in found.residuals.items()
        },
    )
    parts = {name: shards.local(tensor) for name, tensor in own.items()}
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
            f"keeps its seed {ema.seed} and its count of {ema.rounded_updates} updates"
        )
    if found.update_index is not None:
        ema.update_index = found.update_index
    return remarks
