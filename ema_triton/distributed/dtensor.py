"""Sharded tensors: the part of a `DTensor` that lies on this rank, and the way back.

An EMA is elementwise, so each rank averages its own part and knows nothing of the others. What is
here talks to other ranks only where it says so.
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
    """The plain tensor behind a `DTensor`: this rank's part of it; all else as it is."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def wrap_like(part: Tensor, whole: Any) -> Tensor:  # noqa: ANN401
    """This rank's part as a tensor of the same kind as `whole`: sharded alike, a parameter or not.

    A part of another dtype, or with a last dimension more (a complex tensor's reals), will do.
    """
    if not is_sharded(whole):
        return part
    from torch.distributed.tensor import DTensor

    shape, stride = whole.shape, whole.stride()
    if part.dim() > whole.dim():
        shape, stride = (*shape, 2), (*(2 * step for step in stride), 1)
    # Around a view with an offset, the DTensor itself would have that offset, and be taken for a
    # plain tensor by what stages asynchronous checkpoints.
    tensor = DTensor.from_local(
        part.new_empty(()).expand(part.shape),
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=shape,
        stride=stride,
    )
    tensor._local_tensor = part
    if isinstance(whole, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=False)
    return tensor


def sharding(tensor: Any) -> Hashable:  # noqa: ANN401
    """How it is sharded, to be compared with how others are; None: it is not."""
    return (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None


def version_owners(tensor: Any) -> list[Tensor]:  # noqa: ANN401
    """What counts writes to it: a `DTensor` those through itself, its part the others."""
    return [tensor, local_part(tensor)] if is_sharded(tensor) else [tensor]


def version(tensor: Any) -> int:  # noqa: ANN401
    """A number that grows with every write to it."""
    return sum(0 if part.is_inference() else part._version for part in version_owners(tensor))


def describe(tensor: Any) -> str:  # noqa: ANN401
    """How it is sharded, for a message."""
    if not is_sharded(tensor):
        return "not sharded"
    places = ", ".join(map(str, tensor.placements))
    return f"sharded over {tensor.device_mesh.size()} ranks ({places})"


def local_part_of(value: Tensor, whole: Any) -> Tensor:  # noqa: ANN401
    """This rank's part of a value, sharded as `whole` is.

    A value that is not sharded is the whole one, the same on every rank, and is sliced. One that is
    sharded in another way goes between the ranks: all of them have to call this.
    """
    if not is_sharded(whole):
        return full_tensor(value) if is_sharded(value) else value
    if sharding(value) == sharding(whole):
        return local_part(value)  # type: ignore[no-any-return]
    if is_sharded(value):
        value = full_tensor(value)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        whole.shape, whole.device_mesh, whole.placements
    )
    if whole.device_mesh.get_coordinate() is None:  # this rank has no part in it
        return value.new_empty(shape)
    return value[tuple(slice(o, o + size) for o, size in zip(offset, shape, strict=True))]


def full_tensor(tensor: Any) -> Tensor:  # noqa: ANN401
    """The whole of a `DTensor`, on every rank, all of which have to call this."""
    if tensor.dtype != torch.int16:
        return tensor.full_tensor()  # type: ignore[no-any-return]
    # NCCL moves no int16; half-precision numbers are bits as good.
    bits: Any = wrap_like(local_part(tensor).view(torch.bfloat16), tensor)
    return bits.full_tensor().view(torch.int16)  # type: ignore[no-any-return]


def sum_over_ranks(numbers: Tensor, whole: Any) -> Tensor:  # noqa: ANN401
    """The sums of what the ranks found in their parts of `whole`, all of which have to call this.

    Ranks with the same part, as where it is replicated, count once.
    """
    if not is_sharded(whole):
        return numbers
    from torch.distributed.tensor import DTensor, Partial

    kinds = [place if place.is_replicate() else Partial() for place in whole.placements]
    here = numbers.to(local_part(whole).device)
    return DTensor.from_local(here, whole.device_mesh, kinds, run_check=False).full_tensor()


def reshard(*models: nn.Module) -> None:
    """Have FSDP2 modules show their shards, and forget what they gathered of them.

    After a forward without a backward the root of the model still holds its gathered parameters,
    which it would go on using whatever became of the shards.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for model in models:
            for module in model.modules():
                if isinstance(module, fsdp.FSDPModule):
                    module.reshard()
