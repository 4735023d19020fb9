"""What PTX instructions compute: a table of opcodes, and the types of their operands."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray

WARP = 32


class ProgramError(AssertionError):
    """The program did what a GPU would answer with an error, or with garbage."""


class Kind(NamedTuple):
    """A type of PTX: the width of its register, and the numbers that the register's bits mean."""

    width: int
    numbers: Callable[[Array], Array]  # of bits
    bits: Callable[[Array], Array]  # of numbers, which are converted where they are of another type


def _plain(dtype: str) -> Kind:
    unsigned = f"u{dtype[1:]}"
    return Kind(
        8 * int(dtype[1:]),
        lambda bits: bits.view(dtype),
        lambda numbers: numbers.astype(dtype, copy=False).view(unsigned),
    )


def _pair(half: Kind) -> Kind:
    """Two numbers in a register, along a last dimension of their own; the low half comes first."""
    narrow, wide = f"u{half.width // 8}", f"u{half.width // 4}"
    return Kind(
        2 * half.width,
        lambda bits: half.numbers(np.ascontiguousarray(bits)[..., None].view(narrow)),
        lambda numbers: np.ascontiguousarray(half.bits(numbers)).view(wide)[..., 0],
    )


def _from_bf16(bits: Array) -> Array:
    return (bits.astype("u4") << 16).view("f4")


def _to_bf16(numbers: Array) -> Array:
    """Rounded to nearest-even."""
    bits = numbers.astype("f4", copy=False).view("u4")
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(numbers), 0x7FFF, rounded).astype("u2")


KINDS = {
    "pred": Kind(1, lambda bits: bits, lambda numbers: numbers),
    "bf16": Kind(16, _from_bf16, _to_bf16),
    **{f"b{8 * size}": _plain(f"u{size}") for size in (2, 4, 8)},
    **{f"u{8 * size}": _plain(f"u{size}") for size in (2, 4, 8)},
    **{f"s{8 * size}": _plain(f"i{size}") for size in (2, 4, 8)},
    **{f"f{8 * size}": _plain(f"f{size}") for size in (2, 4, 8)},
}
KINDS |= {f"{half}x2": _pair(KINDS[half]) for half in ("f16", "bf16", "f32", "b16", "b32")}


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once."""
    if c.dtype == np.float64:
        return np.asarray(_fma64(a, b, c)).astype("f8")
    # In fp64 the product of two fp32 is exact, and the error of the sum is known (Knuth's TwoSum).
    # Rounded to odd, which keeps on which side of a tie it was, it can be rounded once more.
    product, addend = a.astype("f8") * b, c.astype("f8")
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view("i8")
    even = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    odd = bits + np.where(even, np.where((error > 0) == (total > 0), 1, -1), 0)
    return odd.view("f8").astype("f4")


_libm = ctypes.CDLL(None)
_libm.fma.argtypes, _libm.fma.restype = [ctypes.c_double] * 3, ctypes.c_double
_fma64 = np.frompyfunc(_libm.fma, 3, 1)


def _wide(a: Array) -> Array:
    return a.astype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")


def _shift_left(a: Array, by: Array) -> Array:
    """By the width or more, nothing is left."""
    last = 8 * a.dtype.itemsize - 1
    return np.where(by > last, a & 0, a << np.minimum(by, last).astype(a.dtype))


def _shift_right(a: Array, by: Array) -> Array:
    """Filled with the sign, where there is one."""
    last = 8 * a.dtype.itemsize - 1
    shifted = a >> np.minimum(by, last).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by > last, a & 0, shifted)


def _extract(a: Array, at: Array, count: Array) -> Array:
    return _shift_right(a, at) & ~_shift_left(~(a & 0), count)


def _permute(a: Array, b: Array, selectors: Array) -> Array:
    """Four of the eight bytes of b:a, each selected by 4 bits: its index, or with 8 its sign."""
    both = a.astype("u8") | b.astype("u8") << 32
    result = a & 0
    for place in range(4):
        selector = selectors >> (4 * place)
        byte = (both >> (selector & 7).astype("u8") * 8).astype("u4") & 0xFF
        result = result | np.where(selector & 8, (byte >> 7) * 0xFF, byte) << (8 * place)
    return result


def _butterfly(a: Array, mask: Array, _clamp: Array, members: Array) -> Array:
    """Each thread has the value of the one whose number differs in the bits of the mask."""
    _check_whole(members)
    return a[:, np.arange(a.shape[1]) ^ int(mask.item())]


def _reduce(a: Array, members: Array) -> Array:
    """Each thread has its warp's sum."""
    _check_whole(members)
    sums = a.reshape(len(a), -1, WARP).sum(-1, dtype=a.dtype)
    return np.repeat(sums, WARP, 1)


def _check_whole(members: Array) -> None:
    if (members != 0xFFFFFFFF).any():
        raise ProgramError("only a part of a warp takes part in an exchange of values")


COMPARISONS = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),  # false for NaN, as all of these
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)),  # true for NaN, as all of these
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}


def both(low: Array, high: Array) -> Array:
    """The two numbers of a packed register."""
    return np.stack(np.broadcast_arrays(low, high), -1)


# What a letter "w" stands for.
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


class Opcode(NamedTuple):
    """What an instruction computes.

    `operands` has a letter for the destination and one for each source. "d" is the first type in
    the instruction's name, "s" its last (in `sub.rn.f32.f16` another one, else the same), "w" the
    first doubled in width, "u" u32, "p" a predicate; and of sources "l" is as "s" with a value for
    each thread, "n" as "s" with what is in the lower bits of a register that may be wider.
    """

    operands: str
    compute: Callable[..., Array]


OPCODES = {
    "add": Opcode("dsd", np.add),
    "add.rn": Opcode("dsd", np.add),
    "sub": Opcode("dsd", np.subtract),
    "sub.rn": Opcode("dsd", np.subtract),
    "mul.rn": Opcode("dss", np.multiply),
    **{f"fma.rn.{name}": Opcode("dssd", fma) for name in ("f32", "f32x2", "f64")},
    "mul.lo": Opcode("dss", np.multiply),
    "mul.hi": Opcode("dss", lambda a, b: _wide(a) * _wide(b) >> 8 * a.dtype.itemsize),
    "mul.wide": Opcode("wss", lambda a, b: _wide(a) * _wide(b)),
    "mad.lo": Opcode("dssd", lambda a, b, c: a * b + c),
    "mad.wide": Opcode("wssw", lambda a, b, c: _wide(a) * _wide(b) + c),
    "abs": Opcode("ds", np.abs),
    "neg": Opcode("ds", np.negative),
    "min.s32": Opcode("dss", np.minimum),
    "min.u32": Opcode("dss", np.minimum),
    "max.s32": Opcode("dss", np.maximum),
    "max.u32": Opcode("dss", np.maximum),
    "and": Opcode("dss", np.bitwise_and),
    "or": Opcode("dss", np.bitwise_or),
    "xor": Opcode("dss", np.bitwise_xor),
    "not": Opcode("ds", np.invert),
    "shl": Opcode("dsu", _shift_left),
    "shr": Opcode("dsu", _shift_right),
    "bfe.u32": Opcode("dsuu", _extract),
    "prmt": Opcode("dssu", _permute),
    "popc": Opcode("us", np.bitwise_count),
    "selp": Opcode("dssp", lambda a, b, first: np.where(first, a, b)),
    "mov": Opcode("ds", lambda a: a),
    # The kind of the destination converts.
    "cvt": Opcode("dn", lambda a: a),
    "cvt.rn": Opcode("dn", lambda a: a),
    "cvt.rn.f16x2.f32": Opcode("dss", lambda high, low: both(low, high)),
    "cvt.rn.bf16x2.f32": Opcode("dss", lambda high, low: both(low, high)),
    "shfl.sync.bfly": Opcode("dluuu", _butterfly),
    "redux.sync.add": Opcode("dlu", _reduce),
    **{f"setp.{name}": Opcode("pss", compare) for name, compare in COMPARISONS.items()},
}
