"""Which tensors belong together: the parameters and buffers of two models, paired by name."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_triton.distributed import dtensor
from ema_triton.modules import Slot, Slots
from ema_triton.selection import Selection

# What can be averaged, and the dtype of the real numbers in it.
REAL_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float16,
    torch.complex128: torch.float64,
    torch.complex64: torch.float32,
    torch.complex32: torch.float16,
}

# What is copied, and converted where dtypes differ.
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def left_out(slots: Slots, selection: Selection) -> set[str]:
    """Names of the parameters that the patterns keep from being averaged."""
    tied: dict[int, list[str]] = {}
    for name, slot in slots.items():
        if not slot.is_buffer:
            tied.setdefault(id(slot.whole()), []).append(name)
    return {name for names in tied.values() if selection.scale(names) is None for name in names}


@dataclass(eq=False)
class Pair:
    """An EMA tensor and the online tensor of the same name; tied ones have a slot per name.

    `scale` is the momentum's factor; None: it is copied. A `new` EMA tensor has no values yet.
    """

    names: list[str]
    online_slots: list[Slot]
    ema_slots: list[Slot]
    online: Tensor
    ema: Tensor
    new: bool
    scale: float | None = None

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def dense(self) -> bool:
        """Whether the online tensor's elements lie in memory without gaps and overlaps."""
        return torch.ops.aten.is_non_overlapping_and_dense(self.online)  # type: ignore[no-any-return]


class Pairs(NamedTuple):
    """All pairs of two models."""

    averaged: list[Pair]
    copied: list[Pair]  # at every update, one for each slot
    sync_only: list[Pair]  # the EMA model's own, which only a sync copies


def pair_models(
    online: Slots,
    ema: Slots,
    handle_buffers: str,
    *,
    selection: Selection,
    left_out: Container[str] = (),
    ema_dtype: torch.dtype | None = None,
    owned: Iterable[int] = (),
    new: bool = False,
) -> Pairs:
    """Pair an online model's tensors with its EMA's.

    Args:
        online: The online model's slots.
        ema: The EMA's.
        handle_buffers: "copy", "update" or "ema_train".
        selection: Which tensors are averaged with which factor of the momentum; others are copied.
        left_out: Names that the EMA does not hold.
        ema_dtype: For new and for copied real floating tensors; None: their own.
        owned: Ids of EMA tensors that were copied before, and so need no copy of their own.
        new: Whether the EMA has no tensors yet.

    Raises:
        ValueError: Names or shapes disagree, or a tensor has no memory of its own.
        TypeError: A tensor is of a kind that cannot be averaged.
        NotImplementedError: A tensor keeps its data in a way of its own.
    """
    here = {name for name in online if name not in left_out and online[name].whole() is not None}
    there = here & ema.keys() if new else {name for name in ema if ema[name].whole() is not None}
    for name in here ^ there:
        slots = [model[name] for model in (online, ema) if name in model]
        if slots[0].is_buffer:
            # A cache may appear in one model's forward and not yet in the other's: whose it is,
            # keeps it. In "ema_train" mode all buffers are the EMA model's own affair.
            if handle_buffers == "ema_train" or not all(slot.persistent for slot in slots):
                here.discard(name)
                there.discard(name)
            elif name in here and name in ema:  # filled in the online model's forward
                there.add(name)
    _raise_extra("the online model has {}s that the EMA model lacks: {}", online, here - there)
    _raise_extra("the EMA model has {}s that the online model lacks: {}", ema, there - here)
    pairs = {
        name: _pair(name, slot, ema[name], ema_dtype)
        for name, slot in online.items()
        if name in here
    }
    buffers = [pair for name, pair in pairs.items() if online[name].is_buffer]
    candidates = [
        pair
        for name, pair in pairs.items()
        if handle_buffers == "update" or not online[name].is_buffer
    ]
    averaged = merge_tied([pair for pair in candidates if is_averageable(pair.online)])
    for pair in averaged:
        check_averaged(pair)
        pair.scale = selection.scale(pair.names)
    copied = [pair for pair in candidates if not is_averageable(pair.online)]
    if handle_buffers == "copy":
        copied += buffers
    kept = buffers if handle_buffers == "ema_train" else []
    for pair in kept:
        if pair.new:
            pair.ema = own_copy(pair.online, pair.ema.dtype)
    return Pairs(averaged, with_own_storage(copied, ema_dtype, {*owned}), kept)


def _raise_extra(what: str, slots: Slots, extra: Container[str]) -> None:
    for kind, is_buffer in (("parameter", False), ("buffer", True)):
        names = [name for name in slots if name in extra and slots[name].is_buffer == is_buffer]
        if names:
            raise ValueError(
                what.format(kind, quoted(names))
                + ". They would not be averaged. Build a new ModelEMA (or EMAHandler) after "
                "changing the model's structure, or give an ema_model with the same names."
            )


def _pair(name: str, slot: Slot, ema_slot: Slot, ema_dtype: torch.dtype | None) -> Pair:
    kind = "buffer" if slot.is_buffer else "parameter"
    if slot.owner is ema_slot.owner:
        raise ValueError(
            f"{kind} '{name}' belongs to a module that the EMA model shares with the online "
            "model, so there is nothing to average. Give an ema_model with modules of its own."
        )
    online, ema = slot.read(), ema_slot.read()
    assert online is not None
    _check_kind(kind, name, online)
    if new := ema is None:
        dtype = ema_dtype if ema_dtype and online.is_floating_point() else online.dtype
        ema = online.detach().new_zeros((), dtype=dtype).expand(online.shape)  # without memory
        if not online.numel():
            ema = torch.empty_like(online, dtype=dtype)
        if isinstance(online, nn.Parameter):
            ema = nn.Parameter(ema, requires_grad=False)
    else:
        _check_kind(kind, name, ema)
        _check_layouts(name, slot.whole(), ema_slot.whole())
        _check_shapes(name, online, ema)
    return Pair([name], [slot], [ema_slot], online, ema, new)


def merge_tied(pairs: list[Pair]) -> list[Pair]:
    """One pair for the names of tensors tied in both models, so that they are averaged once.

    An EMA tensor gets a copy of its own where only the EMA model ties it, or where it cannot be
    written: it shares the online tensor's memory, or was made in inference mode.
    """
    first: dict[int, Pair] = {}
    tied: list[Pair] = []
    for pair in pairs:
        key = id(pair.online if pair.new else pair.ema)
        twin = first.get(key)
        if twin is not None and twin.online is pair.online:
            twin.names += pair.names
            twin.online_slots += pair.online_slots
            twin.ema_slots += pair.ema_slots
            continue
        if twin is not None and pair.ema_slots[0].place in [slot.place for slot in twin.ema_slots]:
            _raise_split(twin.name, pair.name)
        first.setdefault(key, pair)
        shared = storage(pair.online) == storage(pair.ema) != 0
        if twin is not None or shared or pair.ema.is_inference():
            pair.ema = own_copy(pair.ema)
        elif not is_averageable(pair.ema):  # an integer tensor became a floating one
            pair.ema = own_copy(pair.ema, pair.online.dtype)
        tied.append(pair)
    return tied


def with_own_storage(
    pairs: list[Pair], ema_dtype: torch.dtype | None, owned: set[int]
) -> list[Pair]:
    """One pair for every slot, its EMA tensor being its own: not tied, not a view, contiguous.

    So that a copy into it changes nothing else. Floating tensors keep the EMA's dtype, or get
    `ema_dtype`; others have the online tensor's. Tensors whose id is in `owned` are so already.
    """
    places: dict[tuple[int, str], Pair] = {}
    for pair in pairs:
        twin = places.setdefault(pair.ema_slots[0].place, pair)
        if twin is not pair:  # a module with two names
            if twin.online is not pair.online:
                _raise_split(twin.name, pair.name)
            continue
        online, ema = pair.online, pair.ema
        dtype = online.dtype
        if online.is_floating_point() and ema.is_floating_point():
            dtype = ema_dtype or ema.dtype
        if id(ema) in owned and (ema.dtype, ema.device) == (dtype, online.device):
            owned.discard(id(ema))  # a second slot with it gets a copy
            continue
        # Converted values could be anything, and the next copy overwrites them anyway.
        values = ema if ema.dtype == online.dtype or is_averageable(ema) else online
        if pair.new or values.is_complex() != dtype.is_complex:
            values = online
        pair.ema = own_copy(values, dtype, online.device, like=ema)
    return [*places.values()]


def own_copy(
    tensor: Tensor,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    *,
    like: Tensor | None = None,
) -> Tensor:
    """A contiguous copy with memory of its own; a parameter if `tensor`, or `like`, is one."""
    copy = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device or tensor.device)
    copy.copy_(tensor.detach())
    like = tensor if like is None else like
    return nn.Parameter(copy, requires_grad=False) if isinstance(like, nn.Parameter) else copy


def memory_key(tensor: Tensor) -> Hashable:
    """What is equal for two tensors that are the same elements of memory, seen in the same way."""
    seen = tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return (tensor.device, tensor.data_ptr(), *seen)


def storage(tensor: Tensor) -> int:
    """The address of the memory that it may share with other tensors; 0: it has none."""
    return tensor.untyped_storage().data_ptr()


def _raise_split(name: str, other: str) -> None:
    raise ValueError(
        f"'{name}' and '{other}' are different tensors in the online model but one slot of a "
        "shared module in the EMA model, which cannot hold both. Build a new ModelEMA (or "
        "EMAHandler) after changing the model's structure."
    )


def quoted(names: list[str]) -> str:
    """The first few of them, for a message."""
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class Unsupported(NamedTuple):
    """Why a tensor can be neither averaged nor copied, and what to do about it."""

    error: type[Exception]
    reason: str
    remedy: str


def unsupported(tensor: Tensor) -> Unsupported | None:
    """What is wrong with a tensor; None if its values are in its memory, as they are."""
    if hasattr(tensor, "__tensor_flatten__"):
        return Unsupported(
            NotImplementedError,
            f"is a {type(tensor).__name__}, which keeps its data in other tensors in a way of its "
            "own",
            "Build the EMA before the model is converted, e.g. quantized.",
        )
    if nn.parameter.is_lazy(tensor):
        return Unsupported(
            ValueError,
            "is uninitialized (a lazy module), so it has no shape",
            "Run one forward pass before building the EMA.",
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return Unsupported(
            TypeError,
            f"has layout {tensor.layout} and dtype {tensor.dtype}, and is not strided, or is "
            "quantized or nested",
            "Keep it out of the model's parameters and buffers, or convert it with .to_dense() or "
            ".dequantize().",
        )
    if tensor.is_conj() or tensor.is_neg():
        return Unsupported(
            ValueError,
            "is a lazy conjugate or negative view: its memory does not hold its values",
            "Assign tensor.resolve_conj().resolve_neg() instead.",
        )
    if tensor.numel() and tensor.data_ptr() == 0:
        return Unsupported(
            ValueError,
            f"has no memory (device {tensor.device}, address 0), so it has no values",
            "Materialize it first: meta tensors with model.to_empty(device=...), storages freed by "
            "a sharding engine by gathering them.",
        )
    return None


def _check_kind(kind: str, name: str, tensor: Tensor) -> None:
    if (found := unsupported(tensor)) is not None:
        raise found.error(
            f"{kind} '{name}' {found.reason}, and can be neither averaged nor copied. "
            f"{found.remedy}"
        )


def _check_layouts(name: str, online: Tensor | None, ema: Tensor | None) -> None:
    if ema is not None and dtensor.sharding(online) != dtensor.sharding(ema):
        raise ValueError(
            f"'{name}' is {dtensor.describe(online)} in the online model but "
            f"{dtensor.describe(ema)} in the EMA model, so that a rank has other elements of the "
            "one than of the other. Build the EMA after the model is sharded, with an ema_model "
            "that is sharded likewise, or without: a sharded model needs none, see "
            "ModelEMA.swapped()."
        )


def _check_shapes(name: str, online: Tensor | None, ema: Tensor | None) -> None:
    online_shape = "nothing" if online is None else tuple(online.shape)
    ema_shape = "nothing" if ema is None else tuple(ema.shape)
    if online_shape != ema_shape or online is None:
        raise ValueError(
            f"'{name}' is {online_shape} in the online model but {ema_shape} in the EMA model: "
            "tensors of different shapes cannot be averaged. Build a new ModelEMA (or EMAHandler) "
            "after changing a shape."
        )


def is_averageable(tensor: Tensor) -> bool:
    """Whether an average means anything; integers and booleans are copied instead."""
    return tensor.is_floating_point() or tensor.is_complex()


def check_averaged(pair: Pair) -> None:
    """Raise TypeError unless the online tensor can be averaged into the EMA tensor."""
    online, ema = pair.online.dtype, pair.ema.dtype
    if online not in REAL_DTYPE or ema not in REAL_DTYPE or online.is_complex != ema.is_complex:
        raise TypeError(
            f"'{pair.name}' is {online} in the online model and {ema} in the EMA model, which "
            "cannot be averaged. Real tensors (float64, float32, bfloat16, float16) are averaged "
            "into real ones, complex into complex; convert it, or keep it out of the parameters."
        )


def check_tensors(slots: Slots) -> None:
    """Raise unless every tensor of the online model is of a kind that can be averaged or copied."""
    for name, slot in slots.items():
        if (tensor := slot.read()) is not None:
            _check_kind("buffer" if slot.is_buffer else "parameter", name, tensor)


def check_selection(selection: Selection, slots: Slots, handle_buffers: str) -> None:
    """Raise ValueError if one of the patterns would do nothing, or if all leave nothing."""
    found = {name: tensor for name, slot in slots.items() if (tensor := slot.read()) is not None}
    averaged = [
        name
        for name, tensor in found.items()
        if is_averageable(tensor) and (handle_buffers == "update" or not slots[name].is_buffer)
    ]
    selection.check([name for name in slots if name in found or slots[name].is_buffer], averaged)
