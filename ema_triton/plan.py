"""The plan of an update: the EMAs' states and the addresses of the online tensors, as launches.

Usually it is one EMA; a bank has several of one online model, with a state each.

The online tensors stay where they are and are addressed. A plan holds until a tensor of either
model moves; its `Staleness` notices. It is thrown away then, and nothing is lost with it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from ema_triton.modules import renew_caches, with_caches
from ema_triton.ops.precision import as_real
from ema_triton.pairing import REAL_DTYPE, Pair, Pairs
from ema_triton.staleness import Copies, Staleness
from ema_triton.state import ALIGNMENT, CHUNK, Bucket, EMAState, Kind, chunks_of


class Backend(Protocol):
    """What a backend's module has to offer."""

    def update(self, launch: Launch, momentum: float | Tensor, /) -> None:
        """ema = lerp(ema, online, momentum) for every tensor of the launch."""

    def update_several(
        self, launches: Sequence[Launch], momenta: Sequence[float | Tensor], /
    ) -> None:
        """The same for launches of several EMAs that lie alike."""

    def exchange(self, launch: Launch, /) -> None:
        """Swap the values of the EMA tensors and of the online tensors."""


@dataclass(eq=False)
class Launch:
    """Those tensors of a bucket that one kernel launch averages.

    Attributes:
        bucket: Has the EMA side.
        members: Which of its tensors, ascending.
        online_dtype: Of the online tensors' reals.
        dense: Whether their memory has neither gaps nor overlaps.
        scale: The momentum's factor; None: they are copied.
        sources: The online tensors' elements, as reals; one-dimensional, in the order of their
            memory, where dense. Each shares its tensor's storage and so keeps it alive: nothing
            else can appear at that address.
        targets: The EMA tensors' elements, likewise.
        state_number: Of the EMA that it updates, among the plan's states.
        backend: Which runs it; `backend.choose` says.
    """

    bucket: Bucket
    members: list[int]
    online_dtype: torch.dtype
    dense: bool
    scale: float | None
    sources: list[Tensor]
    targets: list[Tensor]
    state_number: int = 0
    backend: Backend = field(init=False)

    @classmethod
    def of(
        cls, bucket: Bucket, members: list[int], pairs: Sequence[Pair], state_number: int = 0
    ) -> Launch:
        """For pairs that are alike in all that a launch has in common."""
        sources = [as_real(pair.online) for pair in pairs]
        targets = [bucket.views[index] for index in members]
        dense = pairs[0].dense
        if dense:
            sources, targets = (
                [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
                for tensors in (sources, targets)
            )
        dtype = REAL_DTYPE[pairs[0].online.dtype]
        return cls(bucket, members, dtype, dense, pairs[0].scale, sources, targets, state_number)

    @property
    def kind(self) -> Kind:
        """The EMA tensors' kind."""
        return self.bucket.kind

    @cached_property
    def names(self) -> list[str]:
        """The first name of each tensor."""
        return [self.bucket.names[index] for index in self.members]

    @cached_property
    def offsets(self) -> list[int]:
        """Where each EMA tensor starts in the bucket."""
        return [self.bucket.offsets[index] for index in self.members]

    @property
    def skip_counts(self) -> Tensor | None:
        """The bucket's, of all its chunks; None where nothing is skipped."""
        return None if self.scale is None else self.bucket.skip_counts

    def effective_momentum(self, momentum: float | Tensor) -> float | Tensor:
        """The momentum of these tensors; 1 copies, whatever their factor."""
        scale = self.scale
        if scale is None:
            return 1.0
        if scale == 1:
            return momentum
        if isinstance(momentum, Tensor):
            momentum = momentum.to(torch.promote_types(momentum.dtype, torch.float32))
            return torch.where(momentum == 1, momentum, (momentum * scale).clamp(max=1))
        return 1.0 if momentum == 1 else min(momentum * scale, 1.0)

    @cached_property
    def chunk_table(self) -> Tensor:
        """The table of the kernel's launch."""
        return self.table(CHUNK)

    def table(self, size: int) -> Tensor:
        """int64 [chunks, 4] on the device.

        Of each chunk: online address; offset in the bucket; length * 2 + aligned; number of its
        skip count. Aligned means that the online address is a multiple of 16 bytes and the length
        of 8 elements, so that accesses of full width touch nothing past the tensor's end.
        """
        cpu = torch.device("cpu")  # whatever the default device is

        def on_cpu(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=cpu)

        lengths = on_cpu([source.numel() for source in self.sources])
        chunks = on_cpu([chunks_of(source.numel(), size) for source in self.sources])
        tensor = torch.repeat_interleave(chunks)
        index = torch.arange(len(tensor), device=cpu) - (chunks.cumsum(0) - chunks)[tensor]
        length = (lengths[tensor] - index * size).clamp(max=size)
        address = on_cpu([source.data_ptr() for source in self.sources])[tensor]
        address += index * size * self.online_dtype.itemsize
        offset = on_cpu(self.offsets)[tensor] + index * size
        number = on_cpu([self.bucket.first_chunks[member] for member in self.members])[tensor]
        aligned = (address % ALIGNMENT == 0) & (length % 8 == 0)
        columns = [address, offset, length * 2 + aligned, number + index]
        return torch.stack(columns, dim=1).to(self.kind.device)


@dataclass(eq=False)
class Plan:
    """Everything an update does: make the copies, average with every launch.

    `sync_only` are the EMA model's own, which only `sync` copies. `layouts` are the buckets of the
    `states` when it was made. `backend` is the name of what runs the launches, and `reason` says
    why; `backend.choose` sets both.
    """

    launches: list[Launch]
    copies: Copies
    sync_only: list[Pair]
    averaged: list[Pair]
    random_states: list[Tensor]
    staleness: Staleness
    states: Sequence[EMAState] = ()
    layouts: list[list[Bucket]] = field(default_factory=list)
    online_caches: list[nn.Module] = field(default_factory=list)  # modules that have some
    ema_caches: list[nn.Module] = field(default_factory=list)
    backend: str = "foreach"
    reason: str = ""

    @classmethod
    def unknown(cls) -> Plan:
        """A stale one, for an EMA that has none yet."""
        return cls([], Copies([]), [], [], [], Staleness())

    def online_copies(self) -> list[Tensor] | None:
        """The online tensors that are copied, as they are now; None if the plan is stale."""
        # Another plan may have laid out the same state.
        if [state.buckets for state in self.states] != self.layouts:
            return None
        return None if self.staleness.is_stale() else self.copies.read()

    def update(self, *momenta: float | Tensor) -> None:
        """ema = lerp(ema, online, momentum) for every averaged tensor, by each EMA's momentum."""
        # Each update that rounds by chance draws by its number.
        for random_state in self.random_states:
            random_state[1:].add_(1)
        for launches in self.launch_groups:
            first = launches[0]
            if len(launches) == 1:
                first.backend.update(first, momenta[first.state_number])
            else:
                given = [momenta[launch.state_number] for launch in launches]
                first.backend.update_several(launches, given)
        self.wrote()

    def bump_versions(self) -> None:
        """Tell autograd of a write to the EMA tensors, as from any in-place operation."""
        torch.autograd.graph.increment_version(self.ema_tensors)

    def wrote(self) -> None:
        """Tell autograd, and modules that cache what they computed, of a write to the EMA."""
        self.bump_versions()
        if self.ema_caches:
            renew_caches(self.ema_caches)

    @cached_property
    def launch_groups(self) -> list[list[Launch]]:
        """The launches, those together that differ in nothing but whose EMA they are."""
        found: dict[Hashable, list[Launch]] = {}
        for launch in self.launches:
            what = launch.kind, launch.online_dtype, launch.dense, launch.scale, launch.backend
            where = tuple(launch.bucket.names), tuple(launch.members)
            found.setdefault((what, where), []).append(launch)
        return [*found.values()]

    @cached_property
    def ema_tensors(self) -> list[Tensor]:
        """All that is averaged."""
        return [pair.ema for pair in self.averaged]

    @cached_property
    def on_cuda(self) -> bool:
        """Whether a CUDA graph might capture an update."""
        return any(launch.kind.device.type == "cuda" for launch in self.launches)


def make_plan(states: Sequence[EMAState], pairs: Sequence[Pairs], model: nn.Module) -> Plan:
    """Group the pairs into launches.

    Args:
        states: Laid out for these pairs.
        pairs: Of the online model and each of the states, of now.
        model: The online model, to be watched.
    """
    averaged = [pair for of_state in pairs for pair in of_state.averaged]
    buckets = [bucket for state in states for bucket in state.buckets]
    modules = [state.module for state in states if state.module is not None]
    shared = [slots for of_state in pairs for slots in of_state.shared.values()]
    return Plan(
        launches=[
            launch
            for number, (state, of_state) in enumerate(zip(states, pairs, strict=True))
            for launch in launches_of(state, of_state.averaged, number)
        ],
        copies=Copies([pair for of_state in pairs for pair in of_state.copied]),
        sync_only=[pair for of_state in pairs for pair in of_state.sync_only],
        averaged=averaged,
        random_states=[b.random_state for b in buckets if b.random_state is not None],
        staleness=Staleness.over(model, modules, averaged, shared),
        states=states,
        layouts=[state.buckets for state in states],
        online_caches=with_caches(model),
        ema_caches=[one for module in modules for one in with_caches(module)],
    )


def launches_of(state: EMAState, averaged: Sequence[Pair], state_number: int = 0) -> list[Launch]:
    """As few as there can be: each has one bucket, online dtype, density and momentum factor."""
    by_name = {pair.name: pair for pair in averaged}
    found = []
    for bucket in state.buckets:
        alike: dict[tuple[torch.dtype, bool, float | None], list[int]] = {}
        for index, name in enumerate(bucket.names):
            pair = by_name[name]
            if pair.online.numel():
                key = REAL_DTYPE[pair.online.dtype], pair.dense, pair.scale
                alike.setdefault(key, []).append(index)
        for members in alike.values():
            pairs = [by_name[bucket.names[index]] for index in members]
            found.append(Launch.of(bucket, members, pairs, state_number))
    return found
