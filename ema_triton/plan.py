"""The plan of an update: which online tensor goes into which EMA tensor, and where both lie.

The online tensors stay where they are and are addressed. The EMA side is ours, so it lies flat: one
buffer per bucket, the EMA model's tensors being views into it. A plan holds until a tensor of
either model moves; its `Watch` notices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_triton import shards
from ema_triton.buckets import ALIGNMENT, CHUNK, Bucket, Key
from ema_triton.groups import Groups
from ema_triton.models import Shell
from ema_triton.pairs import (
    REAL_DTYPE,
    Pair,
    Slots,
    check_averaged,
    elements,
    has_fractions,
    pair_by_name,
    separate,
    tie,
)
from ema_triton.precision import RESIDUAL_DTYPE, as_real, join, shown, split
from ema_triton.watch import Copies, Watch


class Memory(NamedTuple):
    """What an EMA knows beside its weights.

    `values` are the fp32 values of exact tensors by name. They count where they round to the
    weights, which may have been written since. `nonfinite` are the skip counts by name.
    """

    values: Mapping[str, Tensor]
    seed: int
    updates: int
    nonfinite: Mapping[str, int]


class Exact(NamedTuple):
    """An exact EMA tensor, and what it has beside it.

    Weight and residual lie in a bucket, with the EMA tensor's shape and strides. A weight may be
    written without its residual: `join` makes of the two a value that rounds to what was written.
    """

    pair: Pair
    weight: Tensor
    residual: Tensor

    def is_in_place(self) -> bool:
        """Whether the EMA model still has this weight, and no other tensor."""
        now = self.pair.ema_slots[0].read()
        return isinstance(now, Tensor) and elements(as_real(now)) == elements(self.weight)


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything an update does: average the buckets, make the copies.

    `kept` pairs are buffers that only `sync` copies. `nonfinite` are the skip counts before this
    plan, of every averaged tensor by its first name.
    """

    buckets: list[Bucket]
    copies: Copies
    kept: list[Pair]
    averaged: list[Pair]
    ema_tensors: list[Tensor]
    exact: list[Exact]
    seed: int
    drawn: Tensor | int
    nonfinite: Mapping[str, int]
    watch: Watch

    def is_stale(self) -> bool:
        """Whether a tensor moved."""
        return self.watch.is_stale()

    def wrote(self) -> None:
        """Tell autograd of a write to the EMA tensors, as from any in-place operation."""
        torch.autograd.graph.increment_version(self.ema_tensors)

    @property
    def updates(self) -> int:
        """How many updates were rounded stochastically; waits for the device."""
        return int(self.drawn)

    def memory(self) -> Memory:
        """What another plan for the same weights needs to go on from there."""
        values = {pair.name: join(weight, residual) for pair, weight, residual in self.exact}
        return Memory(values, self.seed, self.updates, self.nonfinite_counts())

    def nonfinite_counts(self) -> dict[str, int]:
        """How many values of each averaged tensor were skipped in all; waits for the device."""
        counts = {**self.nonfinite}
        for bucket in self.buckets:
            if bucket.counters is not None:
                of_tensors = torch.split(bucket.counters.cpu(), bucket.chunks().tolist())
                for name, of_chunks in zip(bucket.names, of_tensors, strict=True):
                    counts[name] += int(of_chunks.sum())
        return counts

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
    precision: str = "nearest",
    groups: Groups = Groups(),  # noqa: B008
    guarded: bool = False,
    previous: Plan | None = None,
    memory: Memory | None = None,
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
        precision: How bf16 and fp16 EMA tensors are averaged: "exact", "stochastic" or "nearest".
        groups: Which tensors are averaged with which share of the momentum; others are copied.
        guarded: Whether non-finite values are skipped, and counted.
        previous: The plan that went stale, which knows more than the weights.
        memory: The same from elsewhere.

    Raises:
        ValueError: The models' names or shapes disagree, or a tensor has no memory of its own.
        TypeError: A tensor is of a kind that cannot be averaged.
        NotImplementedError: A tensor keeps its data in a way of its own.
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

    exact: list[Exact] = []
    by_key: dict[tuple[Key, str | None], list[Pair]] = {}
    # Small tensors first and side by side: the reference path gathers them.
    for pair in sorted(averaged, key=lambda pair: pair.online.numel()):
        key = _key(pair, ema_dtype, precision, groups.scale(pair.names))
        sharded = shards.is_sharded(pair.ema_slots[0].whole())
        if anchored := sharded and not isinstance(ema_model, Shell):
            _check_anchored(pair, key)
        if pair.online.numel():
            by_key.setdefault((key, pair.name if anchored else None), []).append(pair)
        elif sharded and key.precision == "exact":  # other ranks have a part of it, and beside it
            weight = as_real(pair.ema).to(key.ema_dtype)
            exact.append(Exact(pair, weight, weight.to(RESIDUAL_DTYPE[key.ema_dtype])))
    past = _Past.of(previous, memory)
    kept = buffers if handle_buffers == "ema_train" else []
    # EMA tensors, and what their data becomes. Those in buckets keep all their digits until they
    # are laid flat: an exact one has more than its own dtype can hold.
    moves: list[tuple[Tensor, Tensor]] = []
    for pair in [pair for pair in averaged if not pair.online.numel()] + copied + kept:
        dtype = ema_dtype if pair.ema.is_floating_point() else None
        if pair.ema.device != pair.online.device or dtype not in (None, pair.ema.dtype):
            moved = pair.ema.data.to(pair.online.device, dtype or pair.ema.dtype)
            moves.append((pair.ema, moved))
    buckets = [
        _lay_flat(key, pairs, number, guarded, anchored is not None, past, moves, exact)
        for number, ((key, anchored), pairs) in enumerate(by_key.items())
    ]
    # From here on tensors change, and nothing fails.
    for tensor, data in moves:
        tensor.data = data
    for pair in averaged + copied + kept:
        for slot in pair.ema_slots:
            slot.write(pair.ema)
    draws = [bucket.draws[1] for bucket in buckets if bucket.draws is not None]
    return Plan(
        buckets=buckets,
        copies=Copies.of(copied),
        kept=kept,
        averaged=averaged,
        ema_tensors=[pair.ema for pair in averaged],
        exact=exact,
        seed=past.seed,
        drawn=draws[0] if draws else past.drawn,
        nonfinite={
            pair.name: past.nonfinite.get(pair.name, 0)
            for pair in averaged
            if groups.scale(pair.names) is not None
        },
        watch=Watch.over(model, ema_model, averaged),
    )


def _key(pair: Pair, ema_dtype: torch.dtype | None, precision: str, scale: float | None) -> Key:
    is_complex = pair.ema.is_complex()
    if ema_dtype is None or is_complex:
        ema_dtype = REAL_DTYPE[pair.ema.dtype]
    online_dtype = REAL_DTYPE[pair.online.dtype]
    dense = torch.ops.aten.is_non_overlapping_and_dense(pair.online)
    if ema_dtype not in RESIDUAL_DTYPE or scale is None:
        precision = "nearest"
    return Key(pair.online.device, ema_dtype, online_dtype, is_complex, dense, precision, scale)


def _check_anchored(pair: Pair, key: Key) -> None:
    """A sharded EMA model gathers its parts from where they are, which is known to itself alone."""
    ema = as_real(pair.ema)
    if (
        (ema.device, ema.dtype) != (key.device, key.ema_dtype)
        or not key.dense
        or ema.stride() != as_real(pair.online).stride()
    ):
        raise ValueError(
            f"'{pair.name}' is {ema.dtype} on {ema.device} with strides {ema.stride()} in the "
            f"sharded EMA model, where {key.ema_dtype} on {key.device} with the online tensor's "
            f"strides {as_real(pair.online).stride()} is needed, and a sharded tensor stays as it "
            "is. Build the ema_model so before sharding it, or leave it out."
        )


class _Past(NamedTuple):
    """What a new plan takes over."""

    buckets: list[Bucket]
    exact: dict[tuple[int, str], tuple[Tensor, Tensor]]  # weight and residual, by slot
    values: Mapping[str, Tensor]
    seed: int
    drawn: Tensor | int  # how many updates were rounded stochastically
    nonfinite: Mapping[str, int]

    @classmethod
    def of(cls, previous: Plan | None, memory: Memory | None) -> _Past:
        if memory is not None or previous is None:
            return cls(previous.buckets if previous else [], {}, *(memory or Memory({}, 0, 0, {})))
        exact = {
            slot.place: (weight, residual)
            for pair, weight, residual in previous.exact
            for slot in pair.ema_slots
        }
        counted = previous.nonfinite_counts()
        return cls(previous.buckets, exact, {}, previous.seed, previous.drawn, counted)

    def value(self, pair: Pair) -> Tensor:
        """The fp32 value of an exact EMA tensor: its weight, or what is known to show as that."""
        weight = as_real(pair.ema)
        value = weight.to(torch.float32, copy=True)
        known = self.values.get(pair.name)
        for slot in pair.ema_slots:
            if slot.place in self.exact:
                known = join(*self.exact[slot.place])
        if known is None or known.shape != value.shape or weight.dtype not in RESIDUAL_DTYPE:
            return value
        known = known.to(value.device)
        return torch.where(shown(known, weight.dtype) == weight, known, value)


def _lay_flat(
    key: Key,
    pairs: list[Pair],
    number: int,
    guarded: bool,
    anchored: bool,
    past: _Past,
    moves: list[tuple[Tensor, Tensor]],
    exact: list[Exact],
) -> Bucket:
    """Lay the EMA tensors of one bucket flat in one buffer, with the online tensors' strides.

    What their data becomes is appended to `moves`; the exact ones are, with weight and residual,
    to `exact`. One that is `anchored`, alone in its bucket, is the buffer itself.
    """
    align = ALIGNMENT // key.ema_dtype.itemsize
    sources = [as_real(pair.online) for pair in pairs]
    offsets, total = [], 0
    for source in sources:
        offsets.append(total)
        total += source.numel() if anchored else -(-source.numel() // align) * align

    def views_of(flat: Tensor) -> list[Tensor]:
        return [
            flat.as_strided(
                source.shape,
                source.stride() if key.dense else _contiguous_strides(source.shape),
                offset,
            )
            for source, offset in zip(sources, offsets, strict=True)
        ]

    kept = None
    for bucket in past.buckets:  # one whose buffer holds these EMA tensors just so
        if (
            (bucket.key.ema_dtype, bucket.key.device) == (key.ema_dtype, key.device)
            and bucket.flat.numel() == total
            and bucket.flat.data_ptr() == pairs[0].ema.data_ptr()
            and [elements(as_real(pair.ema)) for pair in pairs]
            == [*map(elements, views_of(bucket.flat))]
        ):
            kept = bucket
    if kept is not None:
        flat = kept.flat
    elif anchored:
        flat = as_real(pairs[0].ema.data).as_strided((sources[0].numel(),), (1,))
    else:
        flat = torch.zeros(total, dtype=key.ema_dtype, device=key.device)
    weights = views_of(flat)
    residual, draws = None, None
    if key.precision == "exact":
        carried = kept.residual if kept else None
        residual = carried
        if residual is None:
            residual = torch.zeros_like(flat, dtype=RESIDUAL_DTYPE[key.ema_dtype])
        for pair, weight, rest in zip(pairs, weights, views_of(residual), strict=True):
            if carried is None or pair.name in past.values:
                split(past.value(pair).to(key.device), weight, rest)
            exact.append(Exact(pair, weight, rest))
    elif kept is None:
        for pair, weight in zip(pairs, weights, strict=True):
            weight.copy_(as_real(pair.ema))
    if key.precision == "stochastic":
        draws = torch.tensor([(past.seed + number) % 2**63, 0], device=key.device)
        draws[1] = past.drawn
    if kept is None and not anchored:
        for pair, weight in zip(pairs, weights, strict=True):
            data = torch.view_as_complex(weight) if key.is_complex else weight
            moves.append((pair.ema, data))
    targets = weights
    if key.dense:
        sources = [source.as_strided((source.numel(),), (1,)) for source in sources]
        targets = [flat[o : o + s.numel()] for o, s in zip(offsets, sources, strict=True)]
    names = [pair.name for pair in pairs]
    counters = None
    if guarded and key.scale is not None:
        chunks = sum(-(-source.numel() // CHUNK) for source in sources)
        counters = torch.zeros(chunks, dtype=torch.int64, device=key.device)
    return Bucket(key, names, flat, residual, draws, counters, offsets, targets, sources)


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
