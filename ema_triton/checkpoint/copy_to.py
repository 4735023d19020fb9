"""Copying an EMA into a model: all or nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ema_triton.checkpoint.state_dict import SavedState, listed
from ema_triton.distributed import dtensor
from ema_triton.modules import Slots, check_model, renew_caches, slots_of, unwrap, with_caches
from ema_triton.pairing import check_tensors, storage_ptr
from ema_triton.state import EMAState


def copy_to(ema: EMAState, online: nn.Module, model: nn.Module) -> None:
    """Copy what an EMA shows, parameters and persistent buffers, into a model's tensors.

    Args:
        ema: The EMA's state.
        online: Its online model, which has what the EMA does not hold.
        model: The model to write; perhaps the online model itself.

    Raises:
        ValueError: Names, shapes or kinds of tensors differ. Nothing was written.
        TypeError, NotImplementedError: A tensor of the model is of a kind that cannot be written.
    """
    check_model(model)
    model, weights = unwrap(model), ema.tensors()
    slots = {
        name: slot
        for name, slot in slots_of(model).items()
        if slot.persistent and (model is not online or name in weights)
    }
    check_tensors(slots)
    targets = _tensors(slots)
    if model is not online:
        weights = _tensors(slots_of(online)) | weights
    saved = SavedState(weights, {})
    first = {id(target): name for name, target in reversed(targets.items())}
    tied = {name: first[id(target)] for name, target in targets.items()}

    def compare(name: str, target: Tensor) -> str | None:
        one, other = (dtensor.local_part(weights.get(of)) for of in (name, tied[name]))
        ties = other is not None and storage_ptr(one) != storage_ptr(other)
        if ties and not torch.equal(one, other):
            return f"is tied to '{tied[name]}', but has other values in the EMA"
        return _difference(saved, name, target)

    text = listed(
        [f"'{name}' is not in the EMA" for name in saved.missing(targets)],
        [f"'{name}' is not in the model" for name in saved.unexpected(targets)],
        saved.differing(targets, compare),
    )
    if text:
        raise ValueError(
            f"The EMA does not fit the model given to copy_to(): {text}. Nothing was copied. Give "
            "a model like the online one, sharded likewise if that is. (Of a sharded EMA, "
            "state_dict(full_state_dict=True)['weights'] has whole tensors on rank 0, for any "
            "model's load_state_dict.)"
        )
    for name, target in targets.items():
        dtensor.local_part(target).copy_(saved.value(name, target))
    # A write to its part is not seen by the counter of a DTensor.
    torch.autograd.graph.increment_version([*filter(dtensor.is_sharded, targets.values())])
    torch.clear_autocast_cache()
    renew_caches(with_caches(model))


def _difference(saved: SavedState, name: str, target: Tensor) -> str | None:
    """Why this weight cannot be written into a model's tensor, if so."""
    if difference := saved.difference(name, target):
        return difference
    weight, part = saved.weights[name], dtensor.local_part(target)
    if dtensor.is_sharded(weight) and dtensor.sharding(weight) != dtensor.sharding(target):
        kinds = dtensor.describe(weight), dtensor.describe(target)
        return f"is {kinds[0]} in the EMA but {kinds[1]} in the model"
    if not torch.can_cast(weight.dtype, target.dtype):
        return f"is {weight.dtype} in the state but {target.dtype} here"
    if torch._debug_has_internal_overlap(part) == 1:
        return "cannot be written in place: several of its elements share one place in memory"
    if part.is_inference():
        return "cannot be written in place: it was made in inference mode"
    return None


def _tensors(slots: Slots) -> dict[str, Tensor]:
    """The parameters and persistent buffers there by name."""
    return {
        name: whole
        for name, slot in slots.items()
        if slot.persistent and (whole := slot.whole()) is not None
    }
