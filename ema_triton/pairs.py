"""Which tensors belong together: the parameters and buffers of two models, paired by name."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ema_triton import shards

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


class Slot(NamedTuple):
    """Where a tensor lives: its module's `_parameters` or `_buffers`, and the key in it."""

    owner: dict[str, Tensor | None]
    key: str

    def read(self) -> Tensor | None:
        """The tensor that is there now, also after it was replaced; of a sharded one, its part."""
        return shards.local(self.whole())  # type: ignore[no-any-return]

    def whole(self) -> Tensor | None:
        """The same, sharded or not."""
        return self.owner.get(self.key)

    def write(self, tensor: Tensor) -> None:
        """Put it there, or have the sharded tensor that is there be around it."""
        whole = self.whole()
        if shards.local(whole) is not tensor or (whole is not None and whole.dtype != tensor.dtype):
            self.owner[self.key] = shards.like(tensor, whole)

    @property
    def place(self) -> tuple[int, str]:
        """Tells slots apart; equal for two names of one module."""
        return id(self.owner), self.key


@dataclass(eq=False)
class Pair:
    """An EMA tensor and the online tensor of the same name; tied ones have a slot per name."""

    names: list[str]
    online_slots: list[Slot]
    ema_slots: list[Slot]
    online: Tensor
    ema: Tensor

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


class Slots(NamedTuple):
    """Where a model's tensors live, by clean name; a tied tensor under each of its names."""

    parameters: dict[str, Slot]
    buffers: dict[str, Slot]
    empty_buffers: dict[str, Slot]  # which hold None, for now
    caches: set[str]  # names of the buffers that are not persistent
    persistent: dict[str, Slot]  # all others, in the order of the model's state dict

    @classmethod
    def of(cls, model: nn.Module) -> Slots:
        """Find them all."""
        slots = cls({}, {}, {}, set(), {})
        for prefix, module in model.named_modules(remove_duplicate=False):
            for found, owner in (
                (slots.parameters, module._parameters),
                (slots.buffers, module._buffers),
            ):
                for key, tensor in owner.items():
                    name = clean_name(f"{prefix}.{key}" if prefix else key)
                    if tensor is not None:
                        found[name] = Slot(owner, key)
                    elif found is slots.buffers:
                        slots.empty_buffers[name] = Slot(owner, key)
                    if key in module._non_persistent_buffers_set:
                        slots.caches.add(name)
                    elif tensor is not None:
                        slots.persistent[name] = Slot(owner, key)
        return slots


# What torch.compile, and checkpoint_wrapper of activations, put into the names.
WRAPPER_NAMES = ("_orig_mod", "_checkpoint_wrapped_module")


def clean_name(name: str) -> str:
    """The name without what wrappers inside the model put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)


def clean_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """A module's state dict by clean name, without extra state, which is not a weight."""
    return {
        clean_name(name): value
        for name, value in state.items()
        if name.rpartition(".")[2] != "_extra_state"
    }


def persistent_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and persistent buffers by clean name, without autograd.

    A sharded one is a `DTensor` around this rank's part; a tied one stands under each of its names.
    """
    found: dict[str, Tensor] = {}
    for name, slot in Slots.of(model).persistent.items():
        whole = slot.whole()
        assert whole is not None  # empty slots are not listed
        found[name] = shards.like(shards.local(whole.detach()), whole.detach())
    return found


def pair_by_name(kind: str, online_slots: dict[str, Slot], ema: dict[str, Slot]) -> list[Pair]:
    """A pair for every name, also for each name of a tied tensor."""
    for here, there, whose in (
        (online_slots, ema, "the online model has {}s that the EMA model lacks: {}"),
        (ema, online_slots, "the EMA model has {}s that the online model lacks: {}"),
    ):
        if names := [name for name in here if name not in there]:
            raise ValueError(
                whose.format(kind, listed(names))
                + ". They would not be averaged. Build a new ModelEMA (or EMAHandler) after "
                "changing the model's structure, or give an ema_model with the same names."
            )
    pairs: list[Pair] = []
    for name, slot in online_slots.items():
        if slot.owner is ema[name].owner:
            raise ValueError(
                f"{kind} '{name}' belongs to a module that the EMA model shares with the online "
                "model, so there is nothing to average. Give an ema_model with modules of its own."
            )
        online, averaged = slot.read(), ema[name].read()
        assert isinstance(online, Tensor)  # empty slots are not listed
        _check_kind(kind, name, online)
        if averaged is None:
            averaged = own_copy(online)
        else:
            _check_kind(kind, name, averaged)
            _check_layouts(name, slot.whole(), ema[name].whole())
            _check_shapes(name, online, averaged)
        pairs.append(Pair([name], [slot], [ema[name]], online, averaged))
    return pairs


def tie(pairs: list[Pair]) -> list[Pair]:
    """One pair for the names of tensors tied in both models, so that they are averaged once.

    An EMA tensor gets a copy of its own where only the EMA model ties it, or where it cannot be
    written: it shares the online tensor's memory, or was made in inference mode.
    """
    first: dict[int, Pair] = {}
    tied: list[Pair] = []
    for pair in pairs:
        twin = first.get(id(pair.ema))
        if twin is not None and twin.online is pair.online:
            twin.names += pair.names
            twin.online_slots += pair.online_slots
            twin.ema_slots += pair.ema_slots
            continue
        if twin is not None and pair.ema_slots[0].place in [slot.place for slot in twin.ema_slots]:
            _refuse_split(twin.name, pair.name)
        first.setdefault(id(pair.ema), pair)
        shared = storage(pair.online) == storage(pair.ema) != 0
        if twin is not None or shared or pair.ema.is_inference():
            pair.ema = own_copy(pair.ema)
        elif not has_fractions(pair.ema):  # an integer tensor became a floating one
            pair.ema = own_copy(pair.ema, pair.online.dtype)
        tied.append(pair)
    return tied


def separate(pairs: list[Pair], ema_dtype: torch.dtype | None, owned: set[int]) -> list[Pair]:
    """One pair for every slot, its EMA tensor being its own: not tied, not a view, contiguous.

    So that a copy into it changes nothing else. Floating tensors keep the EMA's dtype, or get
    `ema_dtype`; others have the online tensor's. Tensors whose id is in `owned` are so already.
    """
    places: dict[tuple[int, str], Pair] = {}
    for pair in pairs:
        twin = places.setdefault(pair.ema_slots[0].place, pair)
        if twin is not pair:  # a module with two names
            if twin.online is not pair.online:
                _refuse_split(twin.name, pair.name)
            continue
        online, ema = pair.online, pair.ema
        dtype = online.dtype
        if online.is_floating_point() and ema.is_floating_point():
            dtype = ema_dtype or ema.dtype
        if id(ema) in owned and (ema.dtype, ema.device) == (dtype, online.device):
            owned.discard(id(ema))  # a second slot with it gets a copy
            continue
        # Converted values could be anything, and the next copy overwrites them anyway.
        values = ema if ema.dtype == online.dtype or has_fractions(ema) else online
        values = online if values.is_complex() != dtype.is_complex else values
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


def elements(tensor: Tensor) -> Hashable:
    """What is equal for two tensors that are the same elements of memory, seen in the same way."""
    seen = tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return (tensor.device, tensor.data_ptr(), *seen)


def storage(tensor: Tensor) -> int:
    """The address of the memory that it may share with other tensors; 0: it has none."""
    return tensor.untyped_storage().data_ptr()


def _refuse_split(name: str, other: str) -> None:
    raise ValueError(
        f"'{name}' and '{other}' are different tensors in the online model but one slot of a "
        "shared module in the EMA model, which cannot hold both. Build a new ModelEMA (or "
        "EMAHandler) after changing the model's structure."
    )


def listed(names: list[str]) -> str:
    """The first few of them, for a message."""
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class Flaw(NamedTuple):
    """Why a tensor can be neither averaged nor copied, and what to do about it."""

    error: type[Exception]
    reason: str
    remedy: str


def flaw(tensor: Tensor) -> Flaw | None:
    """What is wrong with a tensor; None if its values are in its memory, as they are."""
    if hasattr(tensor, "__tensor_flatten__"):
        return Flaw(
            NotImplementedError,
            f"is a {type(tensor).__name__}, which keeps its data in other tensors in a way of its "
            "own",
            "Build the EMA before the model is converted, e.g. quantized.",
        )
    if nn.parameter.is_lazy(tensor):
        return Flaw(
            ValueError,
            "is uninitialized (a lazy module), so it has no shape",
            "Run one forward pass before building the EMA.",
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return Flaw(
            TypeError,
            f"has layout {tensor.layout} and dtype {tensor.dtype}, and is not strided, or is "
            "quantized or nested",
            "Keep it out of the model's parameters and buffers, or convert it with .to_dense() or "
            ".dequantize().",
        )
    if tensor.is_conj() or tensor.is_neg():
        return Flaw(
            ValueError,
            "is a lazy conjugate or negative view: its memory does not hold its values",
            "Assign tensor.resolve_conj().resolve_neg() instead.",
        )
    if tensor.numel() and tensor.data_ptr() == 0:
        return Flaw(
            ValueError,
            f"has no memory (device {tensor.device}, address 0), so it has no values",
            "Materialize it first: meta tensors with model.to_empty(device=...), storages freed by "
            "a sharding engine by gathering them.",
        )
    return None


def _check_kind(kind: str, name: str, tensor: Tensor) -> None:
    if (found := flaw(tensor)) is not None:
        raise found.error(
            f"{kind} '{name}' {found.reason}, and can be neither averaged nor copied. "
            f"{found.remedy}"
        )


def _check_layouts(name: str, online: Tensor | None, ema: Tensor | None) -> None:
    if ema is not None and shards.layout(online) != shards.layout(ema):
        raise ValueError(
            f"'{name}' is {shards.described(online)} in the online model but "
            f"{shards.described(ema)} in the EMA model, so that a rank has other elements of the "
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


def has_fractions(tensor: Tensor) -> bool:
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


def check_tensors(model: nn.Module) -> None:
    """Raise unless every tensor of the online model is of a kind that can be averaged or copied."""
    slots = Slots.of(model)
    for kind, found in (("parameter", slots.parameters), ("buffer", slots.buffers)):
        for name, slot in found.items():
            tensor = slot.read()
            assert isinstance(tensor, Tensor)
            _check_kind(kind, name, tensor)
