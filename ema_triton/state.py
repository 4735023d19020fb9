"""The state of an EMA: what survives when tensors move, and all that is saved.

The averaged values lie in flat buffers, one per bucket. Every EMA tensor has a storage of its own
over its part of the buffer, so that safetensors, accelerate and others that compare storages do not
take the tensors for shared ones, and pickle writes each tensor and no buffer.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ema_triton.copying import check_references, copy_model
from ema_triton.distributed import dtensor
from ema_triton.modules import Slots, add_vacant, are_sharded, empty_slots, slots_of
from ema_triton.ops.precision import RESIDUAL_DTYPE, as_real, join_residual, pieces, split_residual
from ema_triton.pairing import (
    FLOATS,
    REAL_DTYPE,
    Pair,
    Pairs,
    memory_key,
    own_copy,
    pair_models,
    storage_ptr,
)
from ema_triton.schedules import Schedule, momentum_from
from ema_triton.selection import Selection

# Elements in a chunk, the work of one Triton program.
# On an H200, 4096 are 1 to 5 % faster than 8192 for every dtype and every model from ResNet-50 to
# 7 B parameters, and 16384 are 1 to 6 % slower.
CHUNK = 4096

# Elements that are converted at a time, through 4 MiB for each fp32 tensor. An update of 25 M bf16
# into fp32 on a CPU takes 5.5 ms; with a quarter of it 8.1 ms, with four times 5.9 ms.
SCRATCH = 1 << 20

# Bytes. Each tensor of a bucket starts on such a boundary, as the widest memory access demands.
ALIGNMENT = 16


class Kind(NamedTuple):
    """What the EMA tensors of one bucket have in common; complex ones are pairs of reals."""

    device: torch.device
    dtype: torch.dtype
    is_complex: bool
    precision: str  # "nearest" for wider dtypes than bf16 and fp16, and for what is copied


@dataclass(frozen=True, eq=False)
class Bucket:
    """One flat buffer with every EMA tensor of one kind.

    Attributes:
        kind: Of the tensors.
        names: Of each, the first name.
        flat: The buffer.
        offsets: Where each tensor starts in it.
        views: Its elements there, as reals, in the EMA tensor's shape.
        residual: What an exact EMA keeps beside `flat`, laid out likewise.
        residual_views: Each tensor's elements there.
        random_state: int64 [2], where rounding is stochastic: seed, and number of updates made.
        skip_counts: int64, where non-finite values are skipped: one per chunk.
    """

    kind: Kind
    names: list[str]
    flat: Tensor
    offsets: list[int]
    views: list[Tensor]
    residual: Tensor | None
    residual_views: list[Tensor]
    random_state: Tensor | None
    skip_counts: Tensor | None

    def is_whole(self) -> bool:
        """Whether the views are still in the buffer.

        Sharing memory with other processes moves a storage, and all tensors over it.
        """
        begin, size = self.flat.data_ptr(), self.flat.itemsize
        return all(
            view.data_ptr() == begin + offset * size
            for view, offset in zip(self.views, self.offsets, strict=True)
            if view.numel()
        )

    @cached_property
    def chunks(self) -> list[int]:
        """How many chunks each tensor has."""
        return [chunks_of(view.numel()) for view in self.views]

    @cached_property
    def first_chunks(self) -> list[int]:
        """Each tensor's first chunk, by its number in the bucket."""
        return [*accumulate(self.chunks, initial=0)][:-1]


def chunks_of(count: int, size: int = CHUNK) -> int:
    """How many chunks so many elements make."""
    return -(-count // size)


class EMAState:
    """The averages by name, and what belongs to them.

    Args:
        module: The EMA model; None: there is none yet, `build` makes it, or does without.
        handle_buffers: "copy", "update" or "ema_train".
        selection: Which tensors are averaged with which factor of the momentum.
        left_out: Names of tensors that are not held.
        precision: How bf16 and fp16 tensors are averaged: "exact", "stochastic" or "nearest".
        seed: Of stochastic rounding.
        guarded: Whether non-finite values are skipped, and counted.

    Attributes:
        module: The EMA model, if there is one.
        buckets: The flat buffers.
        residuals: What an exact EMA keeps beside its weights, by each of their names.
        seed: Of stochastic rounding.
        update_index: The number of updates made.
        schedule: From the update index to the momentum, if there is one.
    """

    def __init__(
        self,
        module: nn.Module | None,
        *,
        handle_buffers: str = "copy",
        selection: Selection = Selection(),  # noqa: B008
        left_out: Container[str] = (),
        precision: str,
        seed: int,
        guarded: bool,
    ) -> None:
        self.module = module
        self._own_slots: Slots = {}  # without a module
        self._handle_buffers, self._selection, self._left_out = handle_buffers, selection, left_out
        self.precision, self.guarded, self.seed = precision, guarded, seed
        self.update_index = 0
        self.schedule: Schedule | None = None
        self.buckets: list[Bucket] = []
        self.residuals: dict[str, Tensor] = {}
        self._copied: list[Tensor] = []  # the EMA tensors of what is copied
        self._paired: dict[str, torch.Size] = {}  # by name, with the online tensor's shape
        self._shared: set[str] = set()  # names of what the module has from the online model
        self._order: list[str] = []  # of the averaged tensors in their buckets
        self._stochastic_updates = 0  # before the buckets were laid out
        self._skipped: dict[str, int] = {}  # likewise, by name

    def slots(self) -> Slots:
        """Where the EMA's tensors live, now."""
        return self._own_slots if self.module is None else slots_of(self.module)

    def build(
        self, model: nn.Module, online: Slots, ema_dtype: torch.dtype | None, *, as_module: bool
    ) -> None:
        """Copy the tensors of the online model, and if asked for the module around them.

        Around parts of tensors there is none.
        """
        as_module = as_module and not are_sharded(online)
        if as_module:
            check_references(model)
        # Tensors made in inference mode could never be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            averages_all = self._handle_buffers == "update"
            self._own_slots = empty_slots(online, self._left_out, non_persistent=averages_all)
            self.lay_out(model, online, ema_dtype, new=True)
            if as_module:
                own = self._own_slots.items()
                tensors = {online[name].whole(): slot.whole() for name, slot in own}
                self.module, self._own_slots = copy_model(model, tensors), {}

    def tensors(self) -> dict[str, Tensor]:
        """The EMA's parameters and persistent buffers by clean name, without autograd.

        A sharded one is a `DTensor` around this rank's part; a tied one stands under each of its
        names; one that the online model shares is not the EMA's.
        """
        return {
            name: dtensor.wrap_like(dtensor.local_part(whole.detach()), whole.detach())
            for name, slot in self.slots().items()
            if slot.persistent and name not in self._shared and (whole := slot.whole()) is not None
        }

    def next_momentum(self) -> float:
        """The schedule's momentum for the next update."""
        assert self.schedule is not None
        return momentum_from(self.schedule, self.update_index + 1)

    def residual_of(self, name: str, tensor: Tensor) -> Tensor | None:
        """The residual of this EMA tensor, for `join_residual`; None if it has none."""
        residual, real = self.residuals.get(name), as_real(tensor)
        if (
            residual is None
            or residual.dtype != RESIDUAL_DTYPE.get(real.dtype)
            or residual.shape != real.shape
        ):
            return None  # the tensor was cast, or replaced by one of another dtype
        return residual

    @property
    def stochastic_updates(self) -> int:
        """How many updates were rounded stochastically; waits for the device."""
        for bucket in self.buckets:
            if bucket.random_state is not None:
                return int(bucket.random_state[1])
        return self._stochastic_updates

    def set_random_state(self, seed: int, updates: int) -> None:
        """Have stochastic rounding go on from there."""
        self.seed, self._stochastic_updates = seed, updates
        for bucket in self.buckets:
            if bucket.random_state is not None:
                bucket.random_state.copy_(self._random_state(bucket.names[0]))

    def _random_state(self, first: str) -> Tensor:
        """Of the bucket that begins with this tensor; no other one begins with it."""
        seed = (self.seed + self._order.index(first)) % 2**63
        return torch.tensor([seed, self._stochastic_updates], device=torch.device("cpu"))

    def skip_counts(self) -> dict[str, int]:
        """How many values of each averaged tensor were skipped in all; waits for the device."""
        counts = {**self._skipped}
        for bucket in self.buckets:
            if bucket.skip_counts is not None:
                of_tensors = torch.split(bucket.skip_counts.cpu(), bucket.chunks)
                for name, of_chunks in zip(bucket.names, of_tensors, strict=True):
                    if name in counts:
                        counts[name] += int(of_chunks.sum())
        return counts

    def lay_out(
        self,
        model: nn.Module,
        online: Slots,
        ema_dtype: torch.dtype | None = None,
        *,
        new: bool = False,
    ) -> Pairs:
        """Pair the EMA with the online model, and move its tensors to the online tensors' devices.

        The averaged ones are moved into buckets; a bucket stays if its tensors are all where they
        were. Nothing changes before the last check.

        Args:
            model: The online model.
            online: Its slots.
            ema_dtype: Cast the real floating EMA tensors to it; None leaves their dtypes.
            new: Whether the EMA has no tensors yet.

        Raises:
            ValueError: Names or shapes disagree, a tensor has no memory of its own, or a given
                sharded EMA model does not lie as the online one does.
            TypeError: A tensor is of a kind that cannot be averaged.
            NotImplementedError: A tensor keeps its data in other tensors.
        """
        own = self.slots()
        online, own = add_vacant(online, model, own), add_vacant(own, self.module, online)
        pairs = pair_models(
            online,
            own,
            self._handle_buffers,
            selection=self._selection,
            left_out=self._left_out,
            ema_dtype=ema_dtype,
            owned={id(tensor) for tensor in self._copied},
            paired=self._paired,
            new=new,
        )
        if not self._order:
            # Tensors of one momentum are neighbours, small ones first: the foreach backend gathers
            # them. Dtypes do not matter, so that a cast changes no random number.
            pairs.averaged.sort(key=lambda pair: (str(pair.scale), pair.online.numel()))
        names = (pair.name for pair in pairs.averaged)
        order = dict.fromkeys([*self._order, *names])
        self._order = [*order]
        number = {name: index for index, name in enumerate(order)}
        grouped: dict[tuple[Kind, str | None], list[Pair]] = {}
        for pair in sorted(pairs.averaged, key=lambda pair: number[pair.name]):
            kind = self._kind(pair, ema_dtype)
            alone = pair.name if self._keeps_memory(pair, kind) else None
            grouped.setdefault((kind, alone), []).append(pair)
        skipped, self._stochastic_updates = self.skip_counts(), self.stochastic_updates
        # Exact tensors have more digits than their dtype, and so are cast by their bucket alone;
        # copied ones are right already.
        new_data = []
        for pair in pairs.sync_only:
            dtype = ema_dtype if pair.ema.dtype in FLOATS else None
            new_data.append((pair.ema, pair.ema.data.to(pair.online.device, dtype)))
        buckets = [
            self._matching_bucket(kind, members)
            or self._new_bucket(kind, members, keeps_memory=alone is not None)
            for (kind, alone), members in grouped.items()
        ]
        # From here on tensors change, and nothing fails.
        residuals: dict[str, Tensor] = {}
        for bucket, members in zip(buckets, grouped.values(), strict=True):
            if bucket.skip_counts is not None:
                bucket.skip_counts.zero_()
            for index, (pair, view) in enumerate(zip(members, bucket.views, strict=True)):
                data = torch.view_as_complex(view) if bucket.kind.is_complex else view
                new_data.append((pair.ema, data))
                if bucket.residual is not None:
                    residuals |= dict.fromkeys(pair.names, bucket.residual_views[index])
        for tensor, data in new_data:
            if memory_key(tensor) != memory_key(data):
                tensor.data = data
        for pair in pairs.averaged + pairs.copied + pairs.sync_only:
            for slot in pair.ema_slots:
                slot.write(pair.ema, like=pair.online_slots[0].whole())
        for name in pairs.vanished:
            own[name].owner[own[name].key] = None
            if online[name].key not in online[name].owner:
                del own[name].owner[own[name].key]
        in_buckets = {storage_ptr(view) for bucket in self.buckets for view in bucket.views}
        for slot in pairs.unpaired:
            own_buffer = slot.read()
            if own_buffer is not None and storage_ptr(own_buffer) in in_buckets:
                slot.write(own_copy(own_buffer))  # or it would keep the whole bucket alive
        if self.module is None:
            self._own_slots = own
        self.buckets, self.residuals = buckets, residuals
        self._paired = {
            name: pair.online.shape
            for pair in pairs.averaged + pairs.copied + pairs.sync_only
            for name in pair.names
        }
        self._copied = [pair.ema for pair in pairs.copied]
        self._shared = {*pairs.shared}
        self._skipped = {
            pair.name: skipped.get(pair.name, 0)
            for pair in pairs.averaged
            if pair.scale is not None
        }
        return pairs

    def _kind(self, pair: Pair, ema_dtype: torch.dtype | None) -> Kind:
        is_complex = pair.ema.is_complex()
        if ema_dtype is None or is_complex:
            ema_dtype = REAL_DTYPE[pair.ema.dtype]
        rounds = ema_dtype in RESIDUAL_DTYPE and pair.scale is not None
        precision = self.precision if rounds else "nearest"
        return Kind(pair.online.device, ema_dtype, is_complex, precision)

    def _keeps_memory(self, pair: Pair, kind: Kind) -> bool:
        """Whether the EMA tensor keeps its memory, which others read: a bucket of its own.

        Of a sharded EMA model, FSDP2 gathers from where the parts are; and tensors in shared memory
        are read by other processes.
        """
        ema, online = as_real(pair.ema), as_real(pair.online)
        fits = (
            (ema.device, ema.dtype) == (kind.device, kind.dtype)
            and pair.dense
            and ema.stride() == online.stride()
        )
        if self.module is not None and dtensor.is_sharded(pair.ema_slots[0].whole()):
            if not fits:
                raise ValueError(
                    f"'{pair.name}' is {ema.dtype} on {ema.device} with strides {ema.stride()} in "
                    f"the sharded EMA model, where {kind.dtype} on {kind.device} with the online "
                    f"tensor's strides {online.stride()} is needed, and a sharded tensor stays as "
                    "it is. Build the ema_model so before sharding it, or leave it out."
                )
            return True
        return fits and ema.device.type == "cpu" and ema.is_shared()  # type: ignore[no-untyped-call]

    def _matching_bucket(self, kind: Kind, pairs: Sequence[Pair]) -> Bucket | None:
        """The bucket that has all these EMA tensors already, with the strides to have."""
        names = [pair.name for pair in pairs]
        keys = [(memory_key(as_real(pair.ema)), _strides(pair)) for pair in pairs]
        for bucket in self.buckets:
            if (
                (bucket.kind, bucket.names) == (kind, names)
                and keys == [(memory_key(view), view.stride()) for view in bucket.views]
                and bucket.is_whole()
            ):
                return bucket
        return None

    def _new_bucket(self, kind: Kind, pairs: Sequence[Pair], *, keeps_memory: bool) -> Bucket:
        """A bucket with the EMA tensors' values, which are still where they were."""
        align = 1 if keeps_memory else ALIGNMENT // kind.dtype.itemsize
        shapes = [as_real(pair.online).shape for pair in pairs]
        strides = [_strides(pair) for pair in pairs]
        padded = [-(-shape.numel() // align) * align for shape in shapes]
        *offsets, total = accumulate(padded, initial=0)

        def views_of(flat: Tensor) -> list[Tensor]:
            each = zip(shapes, strides, offsets, strict=True)
            return [_view(flat, shape, stride, offset) for shape, stride, offset in each]

        if keeps_memory:
            views = [as_real(pairs[0].ema)]
            flat = views[0].as_strided((total,), (1,))
        else:
            flat = torch.zeros(total, dtype=kind.dtype, device=kind.device)
            views = views_of(flat)
        residual, residual_views = None, list[Tensor]()
        if kind.precision == "exact":
            residual = torch.zeros_like(flat, dtype=RESIDUAL_DTYPE[kind.dtype])
            residual_views = views_of(residual)
        for index, pair in enumerate(pairs):
            weight = as_real(pair.online if pair.new else pair.ema)
            if residual is None:
                if not keeps_memory:
                    views[index].copy_(weight)
                continue
            old = None if pair.new else self.residual_of(pair.name, pair.ema)
            parts = [weight, views[index], residual_views[index]]
            parts += [] if old is None else [old.to(weight.device)]
            for part, view, residual_view, *old_part in pieces(*parts, size=SCRATCH):
                value = join_residual(part, old_part[0]) if old_part else part.float()
                split_residual(value.to(kind.device, copy=True), view, residual_view)
        skip_counts = random_state = None
        if self.guarded:
            chunks = sum(chunks_of(shape.numel()) for shape in shapes)
            skip_counts = torch.zeros(chunks, dtype=torch.int64, device=kind.device)
        names = [pair.name for pair in pairs]
        if kind.precision == "stochastic":
            random_state = self._random_state(names[0]).to(kind.device)
        return Bucket(
            kind, names, flat, offsets, views, residual, residual_views, random_state, skip_counts
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the buckets, whose tensors are the module's (or the slots') and the residuals."""
        return {
            **self.__dict__,
            "buckets": [],
            "_copied": [],
            "_stochastic_updates": self.stochastic_updates,
            "_skipped": self.skip_counts(),
        }


def _strides(pair: Pair) -> tuple[int, ...]:
    """Those of the EMA tensor's reals: the online tensor's, where that has no gaps."""
    real = as_real(pair.online)
    return real.stride() if pair.dense else torch.empty(real.shape, device="meta").stride()


def _view(flat: Tensor, shape: torch.Size, stride: Sequence[int], offset: int) -> Tensor:
    """A part of the buffer, with a storage of its own that keeps the buffer alive."""
    begin = offset * flat.itemsize
    storage = flat.untyped_storage()[begin : begin + shape.numel() * flat.itemsize]
    return torch.empty(0, dtype=flat.dtype, device=flat.device).set_(storage, 0, shape, stride)
