"""Sharded tensors: a `DTensor` and this rank's part of it.

An EMA is elementwise, so each rank averages its own part. Functions that communicate with other
ranks say so.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: object) -> bool:
    """Whether it is a `DTensor`."""
    # Via sys.modules: importing it takes 0.6 s, and where there is a DTensor it is imported.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Any) -> Any:  # noqa: ANN401  # whatever is in a slot or a state
    """This rank's part of a `DTensor`, a plain tensor; anything else as it is."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def wrap_like(part: Tensor, whole: Any) -> Tensor:  # noqa: ANN401
    """A `DTensor` around this rank's part, sharded as `whole` is; a parameter if `whole` is one.

    The part may have another dtype, and one more dimension at the end (a complex tensor's reals).
    Where `whole` is not sharded, the part is returned as it is.
    """
    if not is_sharded(whole):
        return part
    from torch.distributed.tensor import DTensor

    shape, stride = whole.shape, whole.stride()
    if part.dim() > whole.dim():
        shape, stride = (*shape, 2), (*(2 * step for step in stride), 1)
    # Around a view with an offset, the DTensor itself would have that offset, and staging of
    # asynchronous checkpoints would take it for a plain tensor.
    tensor = DTensor.from_local(
        part.new_empty(()).expand(part.shape),
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=shape,
        stride=stride,
    )
    tensor._local_tensor = part
    return nn.Parameter(tensor, requires_grad=False) if isinstance(whole, nn.Parameter) else tensor


def sharding(tensor: Any) -> Hashable:  # noqa: ANN401
    """The mesh and placements of a `DTensor`, for comparison; None if it is not sharded."""
    return (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None


def version_owners(tensor: Any) -> list[Tensor]:  # noqa: ANN401
    """The tensors with the version counters of its writes: a `DTensor` and its part, or itself."""
    return [tensor, local_part(tensor)] if is_sharded(tensor) else [tensor]


def version(tensor: Any) -> int:  # noqa: ANN401
    """A number that every write to it raises."""
    return sum(0 if part.is_inference() else part._version for part in version_owners(tensor))


def describe(tensor: Any) -> str:  # noqa: ANN401
    """How it is sharded, for a message."""
    if not is_sharded(tensor):
        return "not sharded"
    placements = ", ".join(map(str, tensor.placements))
    return f"sharded over {tensor.device_mesh.size()} ranks ({placements})"


def describe_part(tensor: Any) -> str:  # noqa: ANN401
    """The same, and which part it is."""
    if not is_sharded(tensor):
        return describe(tensor)
    coordinate, shape = tensor.device_mesh.get_coordinate(), tuple(local_part(tensor).shape)
    return f"{describe(tensor)}, at mesh coordinate {coordinate} with shape {shape}"


def _splits(tensor: Any) -> list[Hashable]:  # noqa: ANN401
    """What decides which part a rank has.

    Of each mesh dimension that splits the tensor: how it does, into how many parts, and the rank's
    coordinate, which survives `torch.load`.
    """
    if not is_sharded(tensor):
        return []
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    return [
        (placement, mesh.size(dim), coordinate and coordinate[dim])
        for dim, placement in enumerate(tensor.placements)
        if not placement.is_replicate()
    ]


def shard_like(value: Tensor, whole: Any) -> Tensor | None:  # noqa: ANN401
    """This rank's part of a value, sharded as `whole` is; None if the value has other elements.

    It has those that the rank has which made it, or all, of which the part is a slice. Nothing is
    gathered: the mesh of a file's `DTensor` may be that of ranks that are not there.

    Args:
        value: A tensor of `whole`'s shape, or with one more dimension at the end.
        whole: A `DTensor` with the sharding to have, or a plain tensor.
    """
    part, own = local_part(value), local_part(whole)
    if _splits(value) == _splits(whole) and part.shape[: own.dim()] == own.shape:
        return part  # type: ignore[no-any-return]
    if _splits(value) or part.shape != value.shape or not is_sharded(whole):
        return None
    value = part
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        whole.shape, whole.device_mesh, whole.placements
    )
    if whole.device_mesh.get_coordinate() is None:  # this rank has no part in it
        return value.new_empty(shape)
    return value[tuple(slice(o, o + size) for o, size in zip(offset, shape, strict=True))]


def full_tensor(tensor: Any) -> Tensor:  # noqa: ANN401
    """A `DTensor` gathered on every rank, all of which have to call this; a plain one as it is."""
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    if tensor.dtype != torch.int16:
        return tensor.full_tensor()  # type: ignore[no-any-return]
    # NCCL has no int16: the same bits are sent as bfloat16.
    bits: Any = wrap_like(local_part(tensor).view(torch.bfloat16), tensor)
    return bits.full_tensor().view(torch.int16)  # type: ignore[no-any-return]


def sum_over_ranks(numbers: Tensor, whole: Any) -> Tensor:  # noqa: ANN401
    """The sums over the ranks of numbers that each computed from its part of `whole`.

    Ranks with the same part, as where it is replicated, count once. All ranks have to call this.
    """
    if not is_sharded(whole):
        return numbers
    from torch.distributed.tensor import DTensor, Partial

    kinds = [place if place.is_replicate() else Partial() for place in whole.placements]
    here = numbers.to(local_part(whole).device)
    return DTensor.from_local(here, whole.device_mesh, kinds, run_check=False).full_tensor()


def reshard_fsdp2(*models: nn.Module) -> None:
    """Make FSDP2 modules free their gathered parameters, and have their shards in the slots.

    After a forward without a backward the model's root module still holds its gathered parameters,
    and would go on using them when the shards change.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for model in models:
            for module in model.modules():
                if isinstance(module, fsdp.FSDPModule):
                    module.reshard()
