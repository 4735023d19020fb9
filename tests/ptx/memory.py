"""The memory that a program executed by `machine.py` may touch: this process's own, checked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from torch import Tensor

from tests.ptx.opcodes import Array, ProgramError


class Span(NamedTuple):
    """Addresses that a block may read, or also write."""

    name: str
    begin: int
    end: int
    writable: bool

    @classmethod
    def of(
        cls, name: str, tensor: Tensor, part: slice = slice(None), *, writable: bool = False
    ) -> Span:
        """A part of a tensor, which is one-dimensional and has no gaps, or all of any other."""
        size, (first, last, _) = tensor.element_size(), part.indices(tensor.numel())
        begin = tensor.data_ptr()
        return cls(name, begin + first * size, begin + last * size, writable)

    def allows(self, begin: int, end: int, writes: bool) -> bool:
        """Whether these addresses may be accessed."""
        return self.begin <= begin and end <= self.end and (self.writable or not writes)


class Memory:
    """Loads and stores at addresses, arrays [blocks, threads] of them, where `active`.

    What the threads of a block access together is in one span, of those for `everyone` or of the
    block's `own`. All memory from the first span to the last is one array, whose elements between
    the spans are never touched.
    """

    def __init__(self, everyone: Sequence[Span], own: Sequence[Sequence[Span]] = ()) -> None:
        self._everyone, self._own = everyone, own
        spans = [*everyone, *chain.from_iterable(own)]
        first = min((span.begin for span in spans), default=0) // 16 * 16
        everything = np.asarray(_Window(first, max((span.end for span in spans), default=0)))
        self._base = np.uint64(first)
        self._words = {size: everything.view(f"u{size}") for size in (2, 4, 8)}

    def load(
        self, blocks: Array, addresses: Array, active: Array, size: int, count: int
    ) -> list[Array]:
        """`count` neighbouring words of `size` bytes from each address; any where not active."""
        addresses, active = np.broadcast_arrays(addresses, active)
        self._check(blocks, addresses, active, size * count, writes=False)
        index = self._index(np.where(active, addresses, self._base), size)
        return [self._words[size][index + place] for place in range(count)]

    def store(self, blocks: Array, addresses: Array, active: Array, words: list[Array]) -> None:
        """Neighbouring words to each address."""
        size = words[0].itemsize
        addresses, active, *words = np.broadcast_arrays(addresses, active, *words)
        self._check(blocks, addresses, active, size * len(words), writes=True)
        index = self._index(addresses[active], size)
        for place, word in enumerate(words):
            self._words[size][index + place] = word[active]

    def _index(self, addresses: Array, size: int) -> Array:
        return (addresses - self._base).view("i8") // size

    def _check(
        self, blocks: Array, addresses: Array, active: Array, size: int, *, writes: bool
    ) -> None:
        what = f"{'store' if writes else 'load'} of {size} bytes"
        misaligned = active & (addresses % np.uint64(size) != 0)
        if misaligned.any():
            address = int(addresses[misaligned][0])
            raise ProgramError(
                f"{what} at {address:#x}, which is {address % size} past a multiple of it"
            )
        # What is between a block's lowest and highest address is in the span that has those.
        highest = np.where(active, addresses, np.uint64(0)).max(1)
        lowest = np.where(active, addresses, highest[:, None]).min(1)
        rows = np.broadcast_arrays(blocks, active.any(1), lowest, highest)
        for block, touched, begin, last in zip(*(row.tolist() for row in rows), strict=True):
            spans = [*(self._own[block] if self._own else ()), *self._everyone]
            if touched and not any(span.allows(begin, last + size, writes) for span in spans):
                where = _told(spans, begin, last + size)
                raise ProgramError(f"{what} by block {block} from {begin:#x} to {last:#x}: {where}")


def _told(spans: Sequence[Span], begin: int, end: int) -> str:
    """Where these addresses are."""
    for name, first, last, _ in spans:
        if first <= begin and end <= last:
            return f"'{name}' is only read"
        if first < end and begin < last:
            before, after = max(0, first - begin), max(0, end - last)
            return f"{before} bytes before and {after} bytes after '{name}'"
    return "the block has no tensor there"


class Shared:
    """The shared memory of some blocks, for each of which it begins at 0; noise at first."""

    def __init__(self, blocks: int, size: int) -> None:
        self._bytes = np.random.default_rng().integers(256, size=(blocks, size), dtype="u1")
        self._begins = self._bytes.ctypes.data + size * np.arange(blocks, dtype="u8")
        begins = self._begins.tolist()
        self.memory = Memory(
            [], [[Span("shared memory", begin, begin + size, True)] for begin in begins]
        )

    def addresses(self, blocks: Array, offsets: Array) -> Array:
        """Where these are in `memory`."""
        return self._begins[blocks, None] + offsets


class _Window:
    """Memory of this process as bytes, for np.asarray."""

    def __init__(self, begin: int, end: int) -> None:
        size = -(-(end - begin) // 8) * 8
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (size,),
            "data": (begin, False),
        }
