"""What exact EMA tensors have beside them, and whether somebody else wrote them since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter, sub
from typing import Any

import torch
from torch import Tensor

from ema_triton import shards
from ema_triton.pairs import Pair
from ema_triton.precision import as_real


@dataclass(eq=False)
class Companions:
    """The exact EMA tensors, and what each has beside it; stale where somebody else wrote it.

    A write shows in the tensor's version. (One through `.data` does not: then the EMA goes on from
    a value that rounds to what was written.)
    """

    pairs: list[Pair]
    weights: list[Tensor]  # in the buckets, with the EMA tensors' shapes and strides
    companions: list[Tensor]  # likewise
    tensors: list[Tensor]  # the EMA tensors, whose versions are compared
    wholes: dict[int, Tensor]  # and the sharded tensors around some, which count apart
    versions: list[int]
    steps: list[int]  # by which a write of ours raises the version: 2 where two tensors share one
    writes: int = 0  # ours since then

    @classmethod
    def of(cls, beside: list[tuple[Pair, Tensor, Tensor]], ema_tensors: list[Tensor]) -> Companions:
        """Pairs, weights and companions, as they are now; `ema_tensors` are written together."""
        tensors = [pair.ema for pair, _, _ in beside]
        wholes = {
            index: whole
            for index, (pair, _, _) in enumerate(beside)
            if (whole := pair.ema_slots[0].whole()) is not None and whole is not pair.ema
        }
        before = [*map(_version, tensors)]
        torch.autograd.graph.increment_version(ema_tensors)
        versions = [*map(_version, tensors)]
        steps = [*map(sub, versions, before)]
        for index, whole in wholes.items():
            versions[index] += whole._version
        return cls(
            pairs=[pair for pair, _, _ in beside],
            weights=[weight for _, weight, _ in beside],
            companions=[companion for _, _, companion in beside],
            tensors=tensors,
            wholes=wholes,
            versions=versions,
            steps=steps,
        )

    def names(self, state: Mapping[str, Any]) -> dict[str, Pair]:
        """Which of a module's state, by clean name, are exact, whatever it calls them."""
        by_address = {
            weight.data_ptr(): pair
            for pair, weight in zip(self.pairs, self.weights, strict=True)
            if weight.numel()
        }
        by_name = {name: pair for pair in self.pairs for name in pair.names}
        found = {}
        for name, value in state.items():
            # A hook may have copied the tensor, or changed the name.
            value = shards.local(value)
            if isinstance(value, Tensor) and value.layout == torch.strided:
                pair = by_address.get(value.data_ptr()) or by_name.get(name)
                if pair is not None and value.shape == pair.ema.shape:
                    found[name] = pair
        return found

    def are_stale(self) -> bool:
        """Whether somebody else wrote one; versions only grow, so their sum tells."""
        expected = sum(self.versions) + self.writes * sum(self.steps)
        return bool(
            sum(map(_version, self.tensors)) + sum(map(_version, self.wholes.values())) != expected
        )

    def unwritten(self) -> Iterator[tuple[Pair, Tensor, Tensor]]:
        """Pair, weight and companion of those that nobody else wrote."""
        for index, (version, step) in enumerate(zip(self.versions, self.steps, strict=True)):
            if self._version_of(index) == version + self.writes * step:
                yield self.pairs[index], self.weights[index], self.companions[index]

    def current(self) -> Iterator[tuple[Pair, Tensor, Tensor]]:
        """Those that are still in their place, too."""
        for pair, weight, companion in self.unwritten():
            now = pair.ema_slots[0].read()
            if isinstance(now, Tensor) and lies_at(as_real(now), weight):
                yield pair, weight, companion

    def _version_of(self, index: int) -> int:
        whole = self.wholes.get(index)
        return self.tensors[index]._version + (0 if whole is None else whole._version)


_version = attrgetter("_version")


def lies_at(tensor: Tensor, other: Tensor) -> bool:
    """Whether both are the same elements of memory, if of one shape and dtype."""
    return (tensor.data_ptr(), tensor.stride()) == (other.data_ptr(), other.stride())
