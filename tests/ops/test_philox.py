"""Philox in torch: its published vectors, and that a number belongs to an element alone."""

import pytest
import torch

from ema_triton.ops.philox import Philox


def signed(number: int) -> int:
    """The int64 with these 64 bits."""
    return number - (1 << 64) if number >> 63 else number


# philox4x32, 7 rounds, of Random123's kat_vectors: counter, key, result, words from the lowest.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter: tuple, key: tuple, expected: tuple) -> None:
    low, high, update_low, update_high = counter
    state = torch.tensor([signed(key[0] | key[1] << 32), signed(update_low | update_high << 32)])
    words = Philox(state, 8)._words_from(signed(low | high << 32), 1)
    assert [word & 0xFFFFFFFF for word in words[0].tolist()] == [*expected]


def test_each_word_gives_its_low_half_first() -> None:
    found = Philox(torch.tensor([0, 0]), 8).draw(0, 8).tolist()
    assert found == [0xB709, 0x5F6F, 0x3F64, 0x0D89, 0x1F81, 0x4F12, 0x0A48, 0x4F73]


def test_a_number_belongs_to_an_element_whatever_is_drawn_with_it() -> None:
    noise = Philox(torch.tensor([5, 7]), 1000)
    whole = noise.draw(0, 1000).clone()
    for first, count in ((0, 1), (3, 2), (7, 10), (8, 8), (993, 7), (1, 999)):
        assert torch.equal(noise.draw(first, count), whole[first : first + count])


def test_seed_update_and_place_all_matter() -> None:
    drawn = [
        tuple(Philox(torch.tensor(state), 64).draw(first, 64).tolist())
        for state in ([0, 1], [1, 1], [0, 2], [2**40, 1], [0, 2**40])
        for first in (0, 64, 2**36)
    ]
    assert len({*drawn}) == len(drawn)


def test_uniform() -> None:
    count = 1 << 20
    drawn = Philox(torch.tensor([1, 1]), count).draw(0, count)
    # Pearson's statistic over 256 classes has mean 255 and standard deviation sqrt(510); of the
    # high and of the low byte.
    for byte in (drawn >> 8, drawn & 0xFF):
        seen = torch.bincount(byte, minlength=256).double()
        statistic = ((seen - count / 256) ** 2 / (count / 256)).sum()
        assert abs(statistic - 255) < 6 * 510**0.5
