"""Loading a saved state into an EMA's tensors: everything is compared first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from ema_triton import files, ranks, shards
from ema_triton.pairs import clean_name, listed, persistent_tensors
from ema_triton.plan import Plan
from ema_triton.precision import split
from ema_triton.rivals import weights_of
from ema_triton.saved import Saved


def weights_from(
    source: Mapping[str, Any] | str | os.PathLike[str], ema_model: nn.Module
) -> tuple[Saved, list[str]]:
    """What is in a dict or a file of this or another library; and remarks on what is not.

    Raises:
        ValueError: It is not recognised, or damaged.
        OSError: The file cannot be opened.
    """
    state: Any = source if isinstance(source, Mapping) else files.read(source)
    if isinstance(state, Mapping) and isinstance(state.get("weights"), Mapping):
        return Saved.of(state)._replace(update_index=None, schedule=None), []
    own = persistent_tensors(ema_model)
    found = weights_of(state, own, [clean_name(name) for name, _ in ema_model.named_parameters()])
    remarks = []
    if found.kept:
        remarks.append(f"{found.source} has no {listed(found.kept)}, which stay as they are")
    if found.updates:
        remarks.append(
            f"{found.source} counts {found.updates} updates: set update_index to go on with a "
            "schedule from there"
        )
    return Saved(found.weights, {}, None, 0, 0, None, None), remarks


def spread_from_first(state: object, ema_model: nn.Module) -> Saved:
    """The parts of the whole state that rank 0 has, on every rank, all of which call this.

    Args:
        state: The state, on rank 0.
        ema_model: The EMA model.

    Raises:
        ValueError: On every rank, if on rank 0 it is no state or does not fit.
    """
    own = persistent_tensors(ema_model)

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


def load(found: Saved, ema_model: nn.Module, plan: Plan) -> list[str]:
    """Check that a state fits, then write its values into the EMA's tensors.

    Args:
        found: What was saved.
        ema_model: The EMA model.
        plan: Its plan, not stale.

    Returns:
        Remarks on what was lost.

    Raises:
        ValueError: Names or shapes do not fit.
    """
    own = persistent_tensors(ema_model)
    found.check_fit(own)
    found = found._replace(
        weights={name: shards.part_of(value, own[name]) for name, value in found.weights.items()},
        residuals={
            name: shards.part_of(value, own[name]) for name, value in found.residuals.items()
        },
    )
    exact = {name: one for one in plan.exact for name in one.pair.names}
    parts = {name: shards.local(tensor) for name, tensor in own.items()}
    values, remarks = found.converted(parts, exact)
    for name, value in values.items():
        if name in exact:
            split(value, exact[name].weight, exact[name].residual)
        else:
            parts[name].copy_(value)
    plan.wrote()
    return remarks
