"""Which tensors belong together: the parameters and buffers of two models, paired by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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


class Slot(NamedTuple):
    """Where a tensor lives: its module's `_parameters` or `_buffers`, and the key in it."""

    owner: dict[str, Tensor | None]
    key: str

    def read(self) -> Tensor | None:
        """The tensor that is there now, also after it was replaced."""
        return self.owner.get(self.key)


@dataclass(eq=False)
class Pair:
    """An EMA tensor and the online tensor of the same name.

    Tied tensors have a slot for every name; the first ones are those of `name`.
    """

    name: str
    online_slots: list[Slot]
    ema_slots: list[Slot]
    online: Tensor
    ema: Tensor


class Slots(NamedTuple):
    """Where a model's tensors live, by clean name; a tied tensor under each of its names."""

    parameters: dict[str, Slot]
    buffers: dict[str, Slot]
    caches: set[str]  # names of the buffers that are not persistent

    @classmethod
    def of(cls, model: nn.Module) -> Slots:
        """Find them all; a slot that holds None does not count."""
        slots = cls({}, {}, set())
        for prefix, module in model.named_modules(remove_duplicate=False):
            for found, owner in (
                (slots.parameters, module._parameters),
                (slots.buffers, module._buffers),
            ):
                for key, tensor in owner.items():
                    if tensor is not None:
                        name = clean_name(f"{prefix}.{key}" if prefix else key)
                        found[name] = Slot(owner, key)
                        if key in module._non_persistent_buffers_set:
                            slots.caches.add(name)
        return slots


def clean_name(name: str) -> str:
    """The name without the `_orig_mod` that torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def pair_by_name(
    kind: str, online_slots: dict[str, Slot], ema_slots: dict[str, Slot]
) -> list[Pair]:
    """Pair by name; tensors tied in both models make one pair."""
    for here, there, whose in (
        (online_slots, ema_slots, "the online model has {}s that the EMA model lacks: {}"),
        (ema_slots, online_slots, "the EMA model has {}s that the online model lacks: {}"),
    ):
        if names := [name for name in here if name not in there]:
            raise ValueError(
                whose.format(kind, _listed(names))
                + ". They would not be averaged. Build a new ModelEMA (or EMAHandler) after "
                "changing the model's structure, or give an ema_model with the same names."
            )
    first: dict[int, Pair] = {}
    pairs: list[Pair] = []
    for name, online_slot in online_slots.items():
        ema_slot = ema_slots[name]
        online, ema = online_slot.read(), ema_slot.read()
        assert isinstance(online, Tensor)  # slots() lists no empty ones
        assert isinstance(ema, Tensor)
        _check_kind(kind, name, online)
        _check_kind(kind, name, ema)
        _check_shapes(name, online, ema)
        tied = first.get(id(ema))
        if tied is not None:
            if tied.online is online:
                tied.online_slots.append(online_slot)
                tied.ema_slots.append(ema_slot)
                continue
            # Tied in the EMA model, but no longer in the online model: untie it.
            if any(slot.owner is ema_slot.owner for slot in tied.ema_slots):
                raise ValueError(
                    f"{kind}s '{tied.name}' and '{name}' are different tensors in the online "
                    "model but belong to one shared module in the EMA model, which cannot hold "
                    "both averages. Build a new ModelEMA (or EMAHandler) after changing the "
                    "model's structure."
                )
            ema = _detached_like(ema)
        elif _share_memory(online, ema):
            ema = _detached_like(ema)
        pair = Pair(name, [online_slot], [ema_slot], online, ema)
        first.setdefault(id(ema), pair)
        pairs.append(pair)
    return pairs


def _share_memory(one: Tensor, other: Tensor) -> bool:
    address = one.untyped_storage().data_ptr()
    return address != 0 and address == other.untyped_storage().data_ptr()


def _detached_like(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_kind(kind: str, name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "__tensor_flatten__"):
        raise NotImplementedError(
            f"{kind} '{name}' is a {type(tensor).__name__}, which keeps its data in other tensors. "
            "Averaging sharded or wrapped tensors is not supported yet. Build the EMA before "
            "fully_shard() or quantization, or keep this model under DDP."
        )
    if nn.parameter.is_lazy(tensor):
        raise ValueError(
            f"{kind} '{name}' is uninitialized (a lazy module), so it has no shape to average. "
            "Run one forward pass before building the EMA."
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(
            f"{kind} '{name}' has layout {tensor.layout} and dtype {tensor.dtype}. Only strided, "
            "unquantized tensors can be averaged or copied. Keep it out of the model's "
            f"{kind}s, or convert it with .to_dense() or .dequantize()."
        )
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(
            f"{kind} '{name}' is a lazy conjugate or negative view: its memory does not hold its "
            "values. Assign tensor.resolve_conj().resolve_neg() instead."
        )
    if tensor.numel() and tensor.data_ptr() == 0:
        raise ValueError(
            f"{kind} '{name}' has no memory (device {tensor.device}, address 0), so there is "
            "nothing to read or to write. Materialize it first: meta tensors with "
            "model.to_empty(device=...), storages freed by a sharding engine by gathering them."
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


def read_copies(pairs: list[Pair]) -> tuple[list[Tensor], list[Tensor]]:
    """The EMA and the online tensors of pairs to be copied, as their slots hold them now.

    Modules assign buffers anew as a matter of course (`self.count = self.count + 1`), so these
    are read every time instead of being watched.

    Raises:
        ValueError: A tensor vanished or changed its shape.
    """
    ema: list[Any] = [pair.ema_slots[0].read() for pair in pairs]
    online: list[Any] = [pair.online_slots[0].read() for pair in pairs]
    try:
        agree = [*map(Tensor.numel, ema)] == [*map(Tensor.numel, online)]
    except TypeError:  # None: a tensor vanished
        agree = False
    if not agree:
        for pair in pairs:
            _check_shapes(pair.name, pair.online_slots[0].read(), pair.ema_slots[0].read())
    return ema, online
