"""The plan of an update: which online tensor goes into which EMA tensor, and where both lie.

The online tensors stay where they are and are addressed. The EMA side is ours, so it lies flat: one
buffer per bucket, the EMA model's tensors being views into it. A plan holds until a tensor of
either model moves; its `Watch` notices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, repeat, starmap
from operator import attrgetter, getitem, is_, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ema_triton.pairs import (
    REAL_DTYPE,
    Pair,
    Slot,
    Slots,
    check_averaged,
    has_fractions,
    pair_by_name,
    separate,
    tie,
)

# Elements in a chunk, the work of one Triton program.
CHUNK = 8192

# Bytes. Each tensor of a bucket starts on such a boundary, as the widest memory access demands.
ALIGNMENT = 16


class Key(NamedTuple):
    """What the tensors of one bucket have in common.

    Complex tensors count as pairs of reals, of these dtypes, but in buckets of their own:
    `torch.save` refuses tensors that view one storage as different types.
    """

    device: torch.device
    ema_dtype: torch.dtype
    online_dtype: torch.dtype
    is_complex: bool
    dense: bool


@dataclass(frozen=True, eq=False)
class Bucket:
    """One flat buffer with every EMA tensor of one key.

    `targets` and `sources` are the EMA and the online elements in the same order of memory:
    one-dimensional where dense, else in the online tensor's shape. A source shares its online
    tensor's storage and so keeps it alive: nothing else can appear at that address.
    """

    key: Key
    names: list[str]
    flat: Tensor
    offsets: list[int]
    targets: list[Tensor]
    sources: list[Tensor]

    @cached_property
    def chunk_table(self) -> Tensor:
        """int64 [chunks, 3] on the device: online address, offset in `flat`, length * 2 + aligned.

        Aligned means that the online address is a multiple of 16 bytes and the length of 8
        elements, so that accesses of full width touch nothing past the tensor's end.
        """
        cpu = torch.device("cpu")  # whatever the default device is
        lengths = torch.tensor([source.numel() for source in self.sources], device=cpu)
        addresses = torch.tensor([source.data_ptr() for source in self.sources], device=cpu)
        chunks = (lengths + CHUNK - 1) // CHUNK
        tensor = torch.repeat_interleave(chunks)
        start = (
            torch.arange(len(tensor), device=cpu) - (chunks.cumsum(0) - chunks)[tensor]
        ) * CHUNK
        length = (lengths[tensor] - start).clamp(max=CHUNK)
        address = addresses[tensor] + start * self.key.online_dtype.itemsize
        offset = torch.tensor(self.offsets, device=cpu)[tensor] + start
        aligned = (address % ALIGNMENT == 0) & (length % 8 == 0)
        return torch.stack([address, offset, length * 2 + aligned], dim=1).to(self.key.device)


@dataclass(frozen=True, eq=False)
class Watch:
    """Notices that an averaged tensor or a module was replaced, moved, cast, reshaped or added.

    It looks before every update, so it is made of passes that stay in C. Addresses tell, because
    the plan keeps every storage alive; sizes, strides and conjugation are for a view put in its
    tensor's place, which may have the tensor's address. What is not looked at, for 0.1 ms per 1000
    tensors: the strides of vectors, and strides of EMA tensors that stay at their address.
    """

    owners: list[dict[str, Any]]
    keys: list[str]
    addresses: list[int]
    sizes: list[int]
    strides: list[tuple[int, ...]]
    complex: list[Slot]
    containers: list[dict[str, Any]]
    children: list[Any]
    empty: list[dict[str, Any]]
    vacant: list[tuple[dict[str, Any], str]]
    counted: list[dict[str, Any]]
    counts: list[int]

    @classmethod
    def over(cls, model: nn.Module, ema_model: nn.Module, pairs: list[Pair]) -> Watch:
        """Remember the models and the pairs' tensors as they are now."""
        modules = [*model.modules()]
        containers = [module._modules for module in [*modules, *ema_model.modules()]]
        owners = [owner for m in modules for owner in (m._parameters, m._buffers)]
        counted = [owner for owner in owners if owner]
        # The online tensors first, those with strides to compare leading: a dense vector has one
        # stride only, and most tensors are vectors.
        matrices = [pair for pair in pairs if pair.online.dim() > 1]
        vectors = [pair for pair in pairs if pair.online.dim() <= 1]
        strided = [slot for pair in matrices for slot in pair.online_slots]
        online = strided + [slot for pair in vectors for slot in pair.online_slots]
        slots = online + [slot for pair in pairs for slot in pair.ema_slots]
        tensors: list[Any] = [slot.read() for slot in slots]
        return cls(
            owners=[slot.owner for slot in slots],
            keys=[slot.key for slot in slots],
            addresses=[*map(Tensor.data_ptr, tensors)],
            sizes=[*map(Tensor.numel, tensors[: len(online)])],
            strides=[*map(Tensor.stride, tensors[: len(strided)])],
            complex=[
                slot for slot, tensor in zip(slots, tensors, strict=True) if tensor.is_complex()
            ],
            containers=[owner for owner in containers if owner],
            children=_contents([owner for owner in containers if owner]),
            empty=[
                *(owner for owner in owners if not owner),
                *(module._modules for module in modules if not module._modules),
            ],
            vacant=[(owner, key) for owner in counted for key in owner if owner[key] is None],
            counted=counted,
            counts=[*map(len, counted)],
        )

    def is_stale(self) -> bool:
        """Whether anything differs from what was remembered."""
        try:
            tensors = [*map(getitem, self.owners, self.keys)]
            return (
                [*map(Tensor.data_ptr, tensors)] != self.addresses
                or [*map(Tensor.numel, tensors[: len(self.sizes)])] != self.sizes
                or [*map(Tensor.stride, tensors[: len(self.strides)])] != self.strides
                or any(map(_is_conj, starmap(getitem, self.complex)))
                or _contents(self.containers) != self.children
                or any(self.empty)
                or not all(map(is_, starmap(getitem, self.vacant), repeat(None)))
                or [*map(len, self.counted)] != self.counts
            )
        except (KeyError, TypeError, RuntimeError):  # vanished, None, or without an address
            return True


_values: Callable[[dict[str, Any]], Iterable[Any]] = methodcaller("values")
_is_conj: Callable[[Any], bool] = Tensor.is_conj


def _contents(owners: list[dict[str, Any]]) -> list[Any]:
    return [*chain.from_iterable(map(_values, owners))]


@dataclass(frozen=True, eq=False)
class Copies:
    """The tensors that are copied at every update, each into an EMA tensor of its own.

    Modules assign buffers anew as a matter of course (`self.count = self.count + 1`), so the online
    ones are read from their slots every time.
    """

    owners: list[dict[str, Any]]
    keys: list[str]
    sizes: list[torch.Size]
    kinds: list[tuple[Any, ...]]
    ema_owners: list[dict[str, Any]]
    ema_keys: list[str]
    ema: list[Tensor]

    @classmethod
    def of(cls, pairs: list[Pair]) -> Copies:
        """The copies of these pairs, with one slot each."""
        return cls(
            owners=[pair.online_slots[0].owner for pair in pairs],
            keys=[pair.online_slots[0].key for pair in pairs],
            sizes=[pair.online.size() for pair in pairs],
            kinds=[_kind(pair.online) for pair in pairs],
            ema_owners=[pair.ema_slots[0].owner for pair in pairs],
            ema_keys=[pair.ema_slots[0].key for pair in pairs],
            ema=[pair.ema for pair in pairs],
        )

    def read(self) -> list[Tensor] | None:
        """The online tensors as they are now; None if anything does not fit the plan any more."""
        try:
            online = [*map(getitem, self.owners, self.keys)]
            if (
                [*map(Tensor.size, online)] == self.sizes
                and [*map(_kind, online)] == self.kinds
                and all(map(is_, map(getitem, self.ema_owners, self.ema_keys), self.ema))
            ):
                return online
        except (AttributeError, KeyError, TypeError):  # vanished, or None
            pass
        return None


_kind = attrgetter("dtype", "device", "layout")


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything an update does: average the buckets, make the copies.

    `kept` pairs are buffers that only `sync` copies.
    """

    buckets: list[Bucket]
    copies: Copies
    kept: list[Pair]
    ema_tensors: list[Tensor]
    watch: Watch

    @cached_property
    def on_cuda(self) -> bool:
        """Whether a CUDA graph might capture an update."""
        return any(bucket.key.device.type == "cuda" for bucket in self.buckets)


def make_plan(
    model: nn.Module,
    ema_model: nn.Module,
    handle_buffers: str,
    *,
    ema_dtype: torch.dtype | None = None,
    previous: Plan | None = None,
) -> Plan:
    """Pair the models' tensors by name, group them into buckets, and lay the EMA side flat.

    Nothing is changed before every check has passed. A bucket of `previous` whose EMA tensors are
    still where they were keeps its buffer.

    Args:
        model: The online model.
        ema_model: Its EMA model, with the same names and shapes; dtypes and devices may differ.
            Its tensors become views of the buckets, on the online tensors' devices.
        handle_buffers: "copy", "update" or "ema_train".
        ema_dtype: Cast the EMA's real floating tensors to it; None leaves their dtypes.
        previous: The plan that went stale.

    Raises:
        ValueError: The models' names or shapes disagree, or a tensor has no memory of its own.
        TypeError: A tensor is of a kind that cannot be averaged.
        NotImplementedError: A tensor is sharded.
    """
    online, ema = Slots.of(model), Slots.of(ema_model)
    # A cache may appear in one model's forward and not yet in the other's: whose it is, keeps it.
    # In "ema_train" mode all buffers are the EMA model's own affair.
    for name in online.buffers.keys() ^ ema.buffers.keys():
        if handle_buffers == "ema_train" or name in online.caches | ema.caches:
            online.buffers.pop(name, None)
            ema.buffers.pop(name, None)
        elif name in ema.empty_buffers:  # filled in the online model's forward
            ema.buffers[name] = ema.empty_buffers[name]
    parameters = pair_by_name("parameter", online.parameters, ema.parameters)
    buffers = pair_by_name("buffer", online.buffers, ema.buffers)

    candidates = parameters + (buffers if handle_buffers == "update" else [])
    averaged = tie([pair for pair in candidates if has_fractions(pair.online)])
    copied = [pair for pair in candidates if not has_fractions(pair.online)]
    if handle_buffers == "copy":
        copied += buffers
    owned = {id(tensor) for tensor in previous.copies.ema} if previous else set()
    copied = separate(copied, ema_dtype, owned)
    for pair in averaged:
        check_averaged(pair)

    groups: dict[Key, list[Pair]] = {}
    # Small tensors first and side by side: the reference path gathers them.
    for pair in sorted(averaged, key=lambda pair: pair.online.numel()):
        if pair.online.numel():
            groups.setdefault(_key(pair, ema_dtype), []).append(pair)
    # From here on tensors change.
    kept = buffers if handle_buffers == "ema_train" else []
    for pair in averaged + copied + kept:
        for owner, key in pair.ema_slots:
            owner[key] = pair.ema
        dtype = ema_dtype if pair.ema.is_floating_point() else None
        if pair.ema.device != pair.online.device or dtype not in (None, pair.ema.dtype):
            pair.ema.data = pair.ema.data.to(pair.online.device, dtype or pair.ema.dtype)
    flats = [bucket.flat for bucket in previous.buckets] if previous else []
    buckets = [_lay_flat(key, pairs, flats) for key, pairs in groups.items()]
    return Plan(
        buckets=buckets,
        copies=Copies.of(copied),
        kept=kept,
        ema_tensors=[pair.ema for pair in averaged],
        watch=Watch.over(model, ema_model, averaged),
    )


def _key(pair: Pair, ema_dtype: torch.dtype | None) -> Key:
    is_complex = pair.ema.is_complex()
    if ema_dtype is None or is_complex:
        ema_dtype = REAL_DTYPE[pair.ema.dtype]
    online_dtype = REAL_DTYPE[pair.online.dtype]
    dense = torch.ops.aten.is_non_overlapping_and_dense(pair.online)
    return Key(pair.online.device, ema_dtype, online_dtype, is_complex, dense)


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _lay_flat(key: Key, pairs: list[Pair], flats: list[Tensor]) -> Bucket:
    """Make the EMA tensors of one bucket views of one buffer, with the online tensors' strides."""
    align = ALIGNMENT // key.ema_dtype.itemsize
    sources = [_real(pair.online) for pair in pairs]
    offsets, total = [], 0
    for source in sources:
        offsets.append(total)
        total += -(-source.numel() // align) * align

    flat = _still_flat(key, pairs, offsets, total, flats)
    if flat is None:
        flat = torch.zeros(total, dtype=key.ema_dtype, device=key.device)
    views = []
    for pair, source, offset in zip(pairs, sources, offsets, strict=True):
        strides = source.stride() if key.dense else _contiguous_strides(source.shape)
        view = flat.as_strided(source.shape, strides, offset)
        values = _real(pair.ema)
        if (values.data_ptr(), values.stride()) != (view.data_ptr(), view.stride()):
            # A clone, because the values may lie in this very memory in another order.
            view.copy_(values.clone())
            pair.ema.data = torch.view_as_complex(view) if key.is_complex else view
        views.append(view)
    if key.dense:
        sources = [source.as_strided((source.numel(),), (1,)) for source in sources]
        views = [flat[o : o + s.numel()] for o, s in zip(offsets, sources, strict=True)]
    return Bucket(key, [pair.name for pair in pairs], flat, offsets, views, sources)


def _still_flat(
    key: Key, pairs: list[Pair], offsets: list[int], total: int, flats: list[Tensor]
) -> Tensor | None:
    """The buffer that already holds these EMA tensors at these offsets, if there is one."""
    itemsize = key.ema_dtype.itemsize
    base = pairs[0].ema.data_ptr()
    for flat in flats:
        if (
            flat.data_ptr() == base
            and flat.numel() == total
            and flat.dtype == key.ema_dtype
            and all(
                pair.ema.data_ptr() == base + offset * itemsize
                for pair, offset in zip(pairs, offsets, strict=True)
            )
        ):
            return flat
    return None


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
