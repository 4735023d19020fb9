"""The parameters and buffers of an online model and its EMA, paired by name."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ema_triton.distributed import dtensor
from ema_triton.modules import Slot, Slots, slots_of
from ema_triton.selection import Selection

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex128, torch.complex64, torch.complex32)

# The dtypes that can be averaged, and the dtype of their real numbers.
REAL_DTYPE = {dtype: dtype.to_real() for dtype in FLOATS + COMPLEX}

# The dtypes that are copied, and converted where online and EMA dtypes differ.
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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
    """All pairs of two models, and buffers of the EMA without a pair."""

    averaged: list[Pair]
    copied: list[Pair]  # at every update; one for each slot
    sync_only: list[Pair]  # the EMA model's own buffers, which only `sync` copies
    unpaired: list[Slot]  # the EMA model's own buffers, which nothing copies
    vanished: list[str]  # copied buffers that the online model has no longer
    shared: dict[str, tuple[Slot, Slot]]  # left out, and one tensor in both models; by name


def pair_models(
    online: Slots,
    ema: Slots,
    handle_buffers: str,
    *,
    selection: Selection,
    left_out: Container[str] = (),
    ema_dtype: torch.dtype | None = None,
    owned: Iterable[int] = (),
    paired: Mapping[str, torch.Size],
    new: bool = False,
) -> Pairs:
    """Pair an online model's tensors with its EMA's.

    A copied buffer of the EMA becomes what the online model's is: it gets its shape, appears and
    vanishes with it. A non-persistent buffer that one model lacks, or that differs in shape, is
    each model's own, e.g. a cache as long as the longest sequence that the model has seen.

    Args:
        online: The online model's slots.
        ema: The EMA's.
        handle_buffers: "copy", "update" or "ema_train".
        selection: Which tensors are averaged with which factor of the momentum; others are copied.
        left_out: Names that the EMA does not hold.
        ema_dtype: For new and for copied real floating tensors; None: their own.
        owned: Ids of the EMA tensors that earlier pairings made for copied pairs.
        paired: The online shape of each name of the pairing before; empty if this is the first.
        new: Whether the EMA has no tensors yet.

    Raises:
        ValueError: Names or shapes disagree, or a tensor has no memory of its own.
        TypeError: A tensor is of a kind that cannot be averaged.
        NotImplementedError: A tensor keeps its data in other tensors.
    """
    excluded = excluded_names(online, selection)
    shared = shared_slots(online, ema, excluded)
    online_names, ema_names = (
        {name for name in slots if name not in shared and slots[name].whole() is not None}
        for slots in (online, ema)
    )
    online_names = {name for name in online_names if name not in left_out}
    if new:
        ema_names = online_names & ema.keys()
    unpaired: list[Slot] = []
    vanished: list[str] = []

    def is_copied_buffer(name: str, slot: Slot) -> bool:
        averaged = _is_averaged(slot, handle_buffers) and name not in excluded
        return slot.is_buffer and not averaged

    for name in online_names ^ ema_names:
        slots = [model[name] for model in (online, ema) if name in model]
        if not slots[0].is_buffer:
            continue
        # Made in one model's forward and not yet in the other's, e.g. a cache. In "ema_train" mode
        # all buffers are the EMA model's own.
        own = handle_buffers == "ema_train" or not all(slot.persistent for slot in slots)
        if name in online_names:
            if own:
                online_names.discard(name)
            elif name in ema:
                ema_names.add(name)
        elif own or (paired and name in online and name not in paired):
            ema_names.discard(name)
            unpaired.append(ema[name])
        elif name in paired and name in online and is_copied_buffer(name, ema[name]):
            ema_names.discard(name)
            vanished.append(name)
    _check_no_other("online model", online, "EMA model", online_names - ema_names)
    _check_no_other("EMA model", ema, "online model", ema_names - online_names)

    averaged: list[Pair] = []
    copied: list[Pair] = []
    sync_only: list[Pair] = []
    by_ema_slot: dict[tuple[int, str], Pair] = {}
    for name in [name for name in online if name in online_names]:
        slot, ema_slot = online[name], ema[name]
        pair = _pair(name, slot, ema_slot, ema_dtype)
        if slot.is_buffer and handle_buffers == "ema_train":
            sync_only.append(pair)
            continue
        if pair.ema.shape != pair.online.shape and slot.is_buffer:
            if not (slot.persistent and ema_slot.persistent):
                unpaired.append(ema_slot)
                continue
            # An averaged one that the EMA model's forward replaced starts anew.
            if is_copied_buffer(name, slot) or paired.get(name) == pair.online.shape:
                pair = _new_pair(name, slot, ema_slot, pair.ema.dtype)
        _check_shapes(pair)
        twin = by_ema_slot.setdefault((id(ema_slot.owner), ema_slot.key), pair)
        if twin.online is not pair.online:
            raise ValueError(
                f"'{twin.name}' and '{name}' are different tensors in the online model but one "
                "slot of a shared module in the EMA model, which cannot hold both. Build a new "
                "ModelEMA (or EMAHandler) after changing the model's structure."
            )
        dtypes = {pair.online.dtype, pair.ema.dtype}  # e.g. float8, or float8 until it was cast
        only_copies = name in excluded and not dtypes <= REAL_DTYPE.keys()
        if _is_averaged(slot, handle_buffers) and not only_copies:
            averaged.append(pair)
        elif twin is pair:  # a module with two names is copied once
            copied.append(pair)
    averaged = _merge_tied(averaged)
    for pair in averaged:
        pair.scale = selection.scale(pair.names)
    _give_own_storage(copied + sync_only if new else copied, ema_dtype, {*owned})
    return Pairs(averaged, copied, sync_only, unpaired, vanished, shared)


def _check_no_other(model: str, slots: Slots, other: str, names: set[str]) -> None:
    if names:
        raise ValueError(
            f"The {model} has tensors that the {other} lacks: "
            f"{quoted([name for name in slots if name in names])}. They would not be averaged. "
            "Build a new ModelEMA (or EMAHandler) after changing the model's structure, or give an "
            "ema_model with the same names."
        )


def _pair(name: str, slot: Slot, ema_slot: Slot, ema_dtype: torch.dtype | None) -> Pair:
    if slot.owner is ema_slot.owner:
        raise ValueError(
            f"'{name}' belongs to a module that the EMA model shares with the online model, so "
            "there is nothing to average. Give an ema_model with modules of its own; or, to share "
            "it on purpose, leave it out by include or exclude."
        )
    check_tensors({name: slot})
    check_tensors({name: ema_slot})
    online, ema = slot.read(), ema_slot.read()
    assert online is not None
    if ema is None:
        return _new_pair(name, slot, ema_slot, ema_dtype)
    whole, ema_whole = slot.whole(), ema_slot.whole()
    if dtensor.sharding(whole) != dtensor.sharding(ema_whole):
        raise ValueError(
            f"'{name}' is {dtensor.describe(whole)} in the online model but "
            f"{dtensor.describe(ema_whole)} in the EMA model, so that a rank has other elements of "
            "the one than of the other. Build the EMA after the model is sharded, with an "
            "ema_model that is sharded likewise, or without: a sharded model needs none, see "
            "ModelEMA.swapped()."
        )
    return Pair([name], [slot], [ema_slot], online, ema, new=False)


def _new_pair(name: str, slot: Slot, ema_slot: Slot, ema_dtype: torch.dtype | None) -> Pair:
    """A pair with an EMA tensor to be made; a floating one of `ema_dtype`, if that is floating."""
    online: Any = slot.read()
    dtype = ema_dtype if ema_dtype in FLOATS and online.dtype in FLOATS else online.dtype
    if online.numel():  # a placeholder: it is expanded, so that it takes no memory
        ema = online.new_zeros((), dtype=dtype).expand(online.shape)
    else:
        ema = torch.empty_like(online, dtype=dtype)
    if isinstance(online, nn.Parameter):
        ema = nn.Parameter(ema, requires_grad=False)
    return Pair([name], [slot], [ema_slot], online, ema, new=True)


def _check_shapes(pair: Pair) -> None:
    if pair.online.shape != pair.ema.shape:
        remedy = "Build a new ModelEMA (or EMAHandler) after changing a shape"
        if pair.online_slots[0].is_buffer:
            remedy += f", or have this buffer copied and not averaged: exclude='{pair.name}'"
        raise ValueError(
            f"'{pair.name}' is {tuple(pair.online.shape)} in the online model but "
            f"{tuple(pair.ema.shape)} in the EMA model: tensors of different shapes cannot be "
            f"averaged. {remedy}."
        )


def _merge_tied(pairs: list[Pair]) -> list[Pair]:
    """One pair for all names of a tensor that is tied in both models, so that it is averaged once.

    An EMA tensor gets a copy of its own where only the EMA model ties it, and where it cannot be
    written: it shares the online tensor's memory, is an integer one or was made in inference mode.
    """
    tied: dict[tuple[int, int], Pair] = {}
    for pair in pairs:
        twin = tied.setdefault((id(pair.online), 0 if pair.new else id(pair.ema)), pair)
        if twin is not pair:
            twin.names += pair.names
            twin.online_slots += pair.online_slots
            twin.ema_slots += pair.ema_slots
    seen: set[int] = set()
    for pair in tied.values():
        online, ema = pair.online, pair.ema
        shared = id(ema) in seen or storage_ptr(online) == storage_ptr(ema) != 0
        seen.add(id(ema))
        if shared or ema.is_inference() or not is_averageable(ema):
            ema = pair.ema = own_copy(ema, ema.dtype if is_averageable(ema) else online.dtype)
        if {online.dtype, ema.dtype} - REAL_DTYPE.keys() or online.is_complex() != ema.is_complex():
            raise TypeError(
                f"'{pair.name}' is {online.dtype} in the online model and {ema.dtype} in the EMA "
                "model, which cannot be averaged. Real tensors (float64, float32, bfloat16, "
                "float16) are averaged into real ones, complex into complex; convert it, or leave "
                "it out by include or exclude."
            )
    return [*tied.values()]


def _give_own_storage(pairs: list[Pair], ema_dtype: torch.dtype | None, owned: set[int]) -> None:
    """Give each EMA tensor contiguous memory of its own, so that a copy changes nothing else.

    Floating tensors keep the EMA's dtype, or get `ema_dtype`; others have the online tensor's.
    Tensors whose id is in `owned` have such memory already.
    """
    for pair in pairs:
        online, ema = pair.online, pair.ema
        dtype = online.dtype
        if dtype in FLOATS and ema.dtype in FLOATS:
            dtype = ema_dtype or ema.dtype
        if id(ema) in owned and (ema.dtype, ema.device) == (dtype, online.device):
            owned.discard(id(ema))  # a second slot with it gets a copy
        else:
            # Values that cannot be cast may be lost: the next copy overwrites them.
            keeps = not pair.new and torch.can_cast(ema.dtype, dtype)
            pair.ema = own_copy(ema if keeps else online, dtype, online.device)


def own_copy(
    tensor: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """A contiguous copy with memory of its own; a parameter if `tensor` is one."""
    copy = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device or tensor.device)
    copy.copy_(tensor.detach())
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def memory_key(tensor: Tensor) -> Hashable:
    """Equal for two tensors exactly if they are the same view of the same memory."""
    view = tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return (tensor.device, tensor.data_ptr(), *view)


def storage_ptr(tensor: Tensor) -> int:
    """The address of the tensor's storage, equal for views of one tensor; 0: it has no memory."""
    return tensor.untyped_storage().data_ptr()


def quoted(names: list[str]) -> str:
    """The names for a message: five of them, and how many more there are."""
    first = ", ".join(f"'{name}'" for name in names[:5])
    return first + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class Unsupported(NamedTuple):
    """Why a tensor can be neither averaged nor copied, and what to do about it."""

    error: type[Exception]
    reason: str
    remedy: str


def unsupported(tensor: Tensor) -> Unsupported | None:
    """Why a tensor is unsupported; None if its memory holds its values as they are."""
    if hasattr(tensor, "__tensor_flatten__"):
        return Unsupported(
            NotImplementedError,
            f"is a {type(tensor).__name__}, a subclass that keeps its data in other tensors",
            "Build the EMA before the model is converted, e.g. quantized; or, where it is not to "
            "be averaged, leave it out by include or exclude, with as_module=False, which does not "
            "look at it, or with an ema_model that shares its module.",
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


def check_tensors(slots: Slots) -> None:
    """Raise unless every tensor there is of a kind that can be averaged or copied."""
    for name, slot in slots.items():
        tensor = slot.read()
        if tensor is not None and (problem := unsupported(tensor)):
            raise problem.error(
                f"'{name}' {problem.reason}, and can be neither averaged nor copied. "
                f"{problem.remedy}"
            )


def check_online(
    online: Slots,
    ema_model: nn.Module | None,
    selection: Selection,
    handle_buffers: str,
    *,
    as_module: bool,
) -> set[str]:
    """Raise unless an EMA of these tensors can be made; the names that the selection leaves out.

    Args:
        online: The online model's slots.
        ema_model: A given EMA model.
        selection: Which tensors are averaged.
        handle_buffers: "copy", "update" or "ema_train".
        as_module: Whether what is left out is held, and so may be of no other kind.

    Raises:
        ValueError, TypeError, NotImplementedError: A tensor can be neither averaged nor copied, or
            the selection leaves nothing.
    """
    excluded = excluded_names(online, selection)
    unheld: Container[str] = excluded if not as_module else ()
    if ema_model is not None:
        unheld = shared_slots(online, slots_of(ema_model), excluded)
    check_tensors({name: slot for name, slot in online.items() if name not in unheld})
    _check_selection(selection, online, handle_buffers)
    return excluded


def is_averageable(tensor: Tensor) -> bool:
    """Whether an average means anything; integers and booleans are copied instead."""
    return tensor.is_floating_point() or tensor.is_complex()


def _is_averaged(slot: Slot, handle_buffers: str) -> bool:
    """Whether the tensor there is averaged unless `include` and `exclude` leave it out."""
    tensor = slot.read()
    averages_kind = not slot.is_buffer or (handle_buffers == "update" and not slot.copied_only)
    return averages_kind and tensor is not None and is_averageable(tensor)


def _check_selection(selection: Selection, slots: Slots, handle_buffers: str) -> None:
    """Raise ValueError if one of the patterns would do nothing, or if all leave nothing."""
    selection.check(
        [name for name, slot in slots.items() if slot.is_buffer or slot.whole() is not None],
        [name for name, slot in slots.items() if _is_averaged(slot, handle_buffers)],
    )


def excluded_names(slots: Slots, selection: Selection) -> set[str]:
    """Names of the tensors that `include` and `exclude` keep from being averaged."""
    if selection.include is None and not selection.exclude:
        return set()
    tied: dict[int | str, list[str]] = {}
    for name, slot in slots.items():
        key = name if slot.whole() is None else id(slot.whole())
        tied.setdefault(key, []).append(name)
    return {name for names in tied.values() if selection.scale(names) is None for name in names}


def shared_slots(
    online: Slots, ema: Slots, excluded: Container[str]
) -> dict[str, tuple[Slot, Slot]]:
    """The slots of tensors that are not averaged, and that an EMA model has from the online one.

    There is nothing to copy, and they are the online model's: the EMA neither holds nor saves them.
    """
    return {
        name: (slot, ema[name])
        for name, slot in online.items()
        if name in excluded
        and name in ema
        and (slot.owner is ema[name].owner or slot.whole() is ema[name].whole() is not None)
    }
