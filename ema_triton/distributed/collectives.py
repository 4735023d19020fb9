"""Full state dicts of sharded models: gathered on rank 0, and scattered from there.

All ranks call these functions, but for `is_rank0`. Building an EMA and updating it call none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_triton.distributed import dtensor

T = TypeVar("T")


def is_rank0() -> bool:
    """Whether this is rank 0, or the only process."""
    return not _in_group() or dist.get_rank() == 0


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def on_rank0(function: Callable[[], T]) -> T:
    """Call a function on rank 0 alone; every rank returns what it returns, or raises its error."""
    if not _in_group():
        return function()
    outcome: list[Any] = [None, None]
    if is_rank0():
        try:
            outcome[0] = function()
        except Exception as error:  # the other ranks wait for the broadcast
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def gather_on_rank0(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the whole tensors on the CPU of rank 0, gathered one by one; elsewhere none."""
    gathered = {}
    for name, tensor in tensors.items():
        whole = dtensor.full_tensor(tensor) if dtensor.is_sharded(tensor) else tensor
        if is_rank0():
            gathered[name] = whole.to("cpu", copy=True)
    return gathered


def scatter_from_rank0(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of rank 0's whole tensor, as a tensor that is sharded as `like` is.

    Args:
        tensor: The whole tensor on rank 0, any device; on other ranks one of its shape and dtype
            without values.
        like: A tensor with the sharding and the device to have.
    """
    device = dtensor.local_part(like).device
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if is_rank0():
        whole.copy_(tensor)
    if _in_group():
        dist.broadcast(whole.view(-1).view(torch.uint8), 0)
    part = dtensor.shard_like(whole, like)
    assert part is not None  # of all elements, any part is a slice
    return dtensor.wrap_like(part.clone(), like)


def gather_model(model: nn.Module) -> dict[str, Any]:
    """The state dict of a sharded model, with whole tensors on the CPU of rank 0; elsewhere {}."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def load_model(model: nn.Module, state: dict[str, Any], *, strict: bool) -> None:
    """Load a state dict with whole tensors, which every rank has, into a model, sharded or not.

    Args:
        model: The model.
        state: Its `state_dict()`; of a sharded one what `gather_model` returned on rank 0.
        strict: Whether the names must be the model's; of a sharded one some may be missing.
    """
    if not any(map(dtensor.is_sharded, model.parameters())):
        model.load_state_dict(state, strict=strict)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=strict)
    set_model_state_dict(model, {**state}, options=options)  # which puts parts into the dict
