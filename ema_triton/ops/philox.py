"""Random numbers for stochastic rounding: Philox4x32 in torch, the same bits as in the kernel.

The number for an element depends on the seed, the number of the update and the element's index in
its bucket, and on nothing else: not on the backend, the chunks, or what was drawn before. So a
checkpoint needs the seed and the number of updates only.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The fewest that pass all of BigCrush; as in the kernel.
ROUNDS = 7

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


class Philox:
    """The random numbers of a bucket, drawn for up to `size` elements at a time.

    Each draw reads `state`, int64 [2] on the bucket's device: the seed and the number of the
    update. Memory is allocated once.
    """

    def __init__(self, state: Tensor, size: int) -> None:
        calls = size // 8 + 2  # the first and the last may serve a part of their 8 elements
        self._state = state
        self._index = torch.arange(calls, device=state.device)
        self._work = self._index.new_zeros(6, calls)
        self._words = self._index.new_zeros(calls, 4, dtype=torch.int32)
        self._noise = self._index.new_zeros(calls * 8, dtype=torch.int32)

    def draw(self, first: int, count: int) -> Tensor:
        """Uniform 16-bit integers for `count` elements of the bucket from index `first` on.

        They are int32 [count], and valid until the next draw.
        """
        calls = (first + count - 1) // 8 - first // 8 + 1
        words = self._words_from(first // 8, calls)
        noise = self._noise[: 8 * calls]
        noise.copy_(words.view(torch.int16).view(-1)).bitwise_and_(0xFFFF)
        return noise[first % 8 : first % 8 + count]

    def _words_from(self, call: int, calls: int) -> Tensor:
        c0, c1, c2, c3, p0, p1 = self._work[:, :calls]
        seed, update = self._state
        torch.add(self._index[:calls], call, out=c0)
        torch.bitwise_right_shift(c0, 32, out=c1)
        c0.bitwise_and_(_LOW)
        c2.copy_(update & _LOW)
        c3.copy_(update >> 32)
        k0, k1 = seed & _LOW, (seed >> 32) & _LOW
        for _ in range(ROUNDS):
            torch.mul(c0, _MULTIPLIERS[0], out=p0)
            torch.mul(c2, _MULTIPLIERS[1], out=p1)
            # The products are unsigned 64-bit numbers in signed ones: only their halves are used.
            torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0)
            torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1)
            c0.bitwise_and_(_LOW)
            c2.bitwise_and_(_LOW)
            c1, c3, p0, p1 = p1, p0, c3, c1
            k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
        words = self._words[:calls]
        for column, word in enumerate((c0, c1, c2, c3)):
            words[:, column].copy_(word)
        return words
