"""What an EMA model is to load: a saved state that fits it, converted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ema_triton import files, ranks, shards
from ema_triton.pairs import clean_name, listed, renamed
from ema_triton.plan import Memory, Plan
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
    own = {clean_name(name): value for name, value in ema_model.state_dict().items()}
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
    own = {clean_name(name): value for name, value in ema_model.state_dict().items()}

    def checked() -> Saved:
        found = Saved.of(state)
        found.check_fit(own)
        return found._replace(
            weights=ranks.hollow(found.weights), companions=ranks.hollow(found.companions)
        )

    hollow = ranks.from_first(checked)
    found = Saved.of(state) if ranks.is_first() else hollow
    return hollow._replace(
        weights=ranks.spread(hollow.weights, found.weights, own),
        companions=ranks.spread(hollow.companions, found.companions, own),
    )


def fitted(
    found: Saved, ema_model: nn.Module, plan: Plan, precision: str
) -> tuple[dict[str, Any], Memory, list[str]]:
    """Check that it fits, and convert it.

    Args:
        found: What was saved.
        ema_model: The EMA model.
        plan: Its plan, not stale.
        precision: How bf16 and fp16 EMA tensors are averaged.

    Returns:
        What the EMA model is to load; what the next plan has to know beside it; and remarks on
        what was lost.

    Raises:
        ValueError: Names or shapes do not fit.
    """
    state = ema_model.state_dict()
    names = {clean_name(name): name for name in state}
    own = dict(zip(names, state.values(), strict=True))
    found.check_fit(own)
    exact = {name: exact.pair.name for name, exact in plan.exact_in(own).items()}
    found = found._replace(
        weights=_parts(found.weights, own), companions=_parts(found.companions, own)
    )
    parts = {name: shards.local(value) for name, value in own.items()}
    weights, values, remarks = found.converted(parts, exact)
    seed, updates = plan.seed, plan.updates
    if precision == "stochastic":
        if found.precision == "stochastic":
            seed, updates = found.seed, found.updates
        elif found.precision is None:
            remarks.append(
                "a module's state dict does not tell from where stochastic rounding goes on, which "
                f"keeps its seed {seed} and its count of {updates} updates"
            )
    loaded = renamed(
        found.weights,
        lambda name: names.get(name, name),
        lambda name, _: shards.like(weights[name], own[name]),
    )
    return loaded, Memory(values, seed, updates, plan.nonfinite_counts()), remarks


def _parts(values: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """This rank's parts of what fits `own`, in the same order."""
    return renamed(
        values,
        value=lambda name, value: (
            shards.part_of(value, own[name]) if isinstance(value, Tensor) else value
        ),
    )
