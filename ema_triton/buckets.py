"""Buckets: the EMA tensors of one kind in one flat buffer, and the chunks that a launch takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

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
    precision: str  # "nearest" for wider dtypes than bf16 and fp16
    scale: float | None  # the momentum's factor; None: copied


@dataclass(frozen=True, eq=False)
class Bucket:
    """One flat buffer with every EMA tensor of one key.

    `targets` and `sources` are the EMA and the online elements in the same order of memory:
    one-dimensional where dense, else in the online tensor's shape. A source shares its online
    tensor's storage and so keeps it alive: nothing else can appear at that address. `residual`
    lies as `flat` does, where the precision is exact. `draws`, where it is stochastic, is int64
    [2]: the bucket's seed, and the number of updates made. `counters`, where non-finite values are
    skipped, is int64, one per chunk: those of a tensor's chunks add up to its skip count.
    """

    key: Key
    names: list[str]
    flat: Tensor
    residual: Tensor | None
    draws: Tensor | None
    counters: Tensor | None
    offsets: list[int]
    targets: list[Tensor]
    sources: list[Tensor]

    def share(self, momentum: float | Tensor) -> float | Tensor:
        """The momentum of this bucket's tensors; 1 copies, whatever their factor."""
        scale = self.key.scale
        if scale is None:
            return 1.0
        if scale == 1:
            return momentum
        if isinstance(momentum, Tensor):
            momentum = momentum.to(torch.promote_types(momentum.dtype, torch.float32))
            return torch.where(momentum == 1, momentum, (momentum * scale).clamp(max=1))
        return 1.0 if momentum == 1 else min(momentum * scale, 1.0)

    def count_update(self) -> None:
        """To be called before each update, which rounds by this number where that is by chance."""
        if self.draws is not None:
            self.draws[1:].add_(1)

    def chunks(self, size: int = CHUNK) -> Tensor:
        """How many chunks of `size` elements each tensor has, int64 on the CPU."""
        return torch.tensor(
            [-(-source.numel() // size) for source in self.sources], device=torch.device("cpu")
        )

    @cached_property
    def chunk_table(self) -> Tensor:
        """The table of a launch."""
        return self.table(CHUNK)

    def table(self, size: int) -> Tensor:
        """int64 [chunks, 3] on the device: online address, offset in `flat`, length * 2 + aligned.

        Aligned means that the online address is a multiple of 16 bytes and the length of 8
        elements, so that accesses of full width touch nothing past the tensor's end.
        """
        cpu = torch.device("cpu")  # whatever the default device is
        lengths = torch.tensor([source.numel() for source in self.sources], device=cpu)
        addresses = torch.tensor([source.data_ptr() for source in self.sources], device=cpu)
        chunks = self.chunks(size)
        tensor = torch.repeat_interleave(chunks)
        start = (torch.arange(len(tensor), device=cpu) - (chunks.cumsum(0) - chunks)[tensor]) * size
        length = (lengths[tensor] - start).clamp(max=size)
        address = addresses[tensor] + start * self.key.online_dtype.itemsize
        offset = torch.tensor(self.offsets, device=cpu)[tensor] + start
        aligned = (address % ALIGNMENT == 0) & (length % 8 == 0)
        return torch.stack([address, offset, length * 2 + aligned], dim=1).to(self.key.device)
