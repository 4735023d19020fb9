"""The machine itself: arithmetic, registers, branches, and what it refuses."""

import ctypes
import re
from fractions import Fraction

import pytest
import torch

pytest.importorskip("numpy", "2.0")

import numpy as np

from tests.ptx.machine import Launch, Program, UnknownInstructionError
from tests.ptx.memory import Memory, Span
from tests.ptx.opcodes import KINDS, OPCODES, ProgramError, fma

HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 64
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mad.wide.s32 	%rd2, %r1, 4, %rd1;
"""


def run(body: str, size: int = 64, blocks: int = 1, writable: bool = True, shared: int = 0):
    """int32 memory after the program, whose %rd2 is the address of each thread's element."""
    memory = torch.full((size,), -1, dtype=torch.int32)
    parameters = [np.full((1, 1), memory.data_ptr(), "u8")]
    spans = Memory([Span.of("memory", memory, writable=writable)])
    Program(HEAD + body + "\nret;\n}").run(Launch(blocks, parameters, shared, spans))
    return memory


# fp32 patterns of all kinds, with many ties: few digits, and exponents close to each other.
def operands(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    found = []
    for _ in range(3):
        few = (random.integers(0, 2**10, count) << 13) | random.integers(0, 2, count)
        digits = np.where(random.random(count) < 0.5, few, random.integers(0, 2**23, count))
        near = 127 + random.integers(-13, 13, count)
        exponent = np.where(random.random(count) < 0.7, near, random.integers(0, 256, count))
        sign = random.integers(0, 2, count) << 31
        found.append((sign | exponent << 23 | digits).astype("u4").view("f4"))
    return found


def test_fma_is_rounded_once() -> None:
    fmaf = ctypes.CDLL(None).fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    a, b, c = operands(200_000)
    with np.errstate(all="ignore"):
        found, twice = fma(a, b, c), (a.astype("f8") * b + c).astype("f4")
    right = np.array([fmaf(*row) for row in zip(a, b, c, strict=True)], "f4")
    np.testing.assert_array_equal(found, right)
    assert (twice != right)[~np.isnan(right)].any()  # the sample tells it from rounding twice


def test_fma_of_doubles_is_rounded_once() -> None:
    random = np.random.default_rng(0)
    a, b, c = random.standard_normal((3, 2000))
    c = np.where(random.random(2000) < 0.5, -(a * b), c)
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a, b, c, strict=True)]
    right = [float(value) for value in exact]
    assert fma(a, b, c).tolist() == right
    assert (a * b + c).tolist() != right


def same_bits(found: np.ndarray, right: torch.Tensor) -> None:
    """Of all but NaN."""
    bits = right.view({2: torch.int16, 4: torch.int32}[right.itemsize]).numpy()
    same = found.view(bits.dtype) == bits
    assert (same | right.isnan().numpy()).all()
    assert torch.from_numpy(found.view(bits.dtype)).view(right.dtype).isnan().equal(right.isnan())


def test_bf16_and_fp16_are_converted_as_torch_does() -> None:
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], "u4")
    value = ((np.arange(1 << 16, dtype="u4")[:, None] << 16) | low).reshape(-1).view("f4")
    every = np.arange(1 << 16).astype("u2")
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        with np.errstate(all="ignore"):
            narrow = KINDS[name].bits(value)
        same_bits(narrow, torch.from_numpy(value).to(dtype))
        wide = KINDS[name].numbers(every).astype("f4")
        same_bits(wide, torch.from_numpy(every.view("i2")).view(dtype).float())


PAIR = "mov.b64 %rd3, {0f3F800000, 0f40000000};"  # 1 and 2
HALVES = "mov.b32 %r4, 0x40003C00;"  # 1 and 2 in fp16


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("shr.s32 %r3, -8, 40;", -1),
        ("shr.u32 %r3, -8, 28;", 15),
        ("shr.u32 %r3, -8, 32;", 0),
        ("shl.b32 %r3, 3, 31;", -(2**31)),
        ("shl.b32 %r3, 3, 32;", 0),
        ("bfe.u32 %r3, 0x12345678, 8, 12;", 0x456),
        ("bfe.u32 %r3, 0x12345678, 0, 32;", 0x12345678),
        ("prmt.b32 %r3, 0x33221100, 0x77665544, 0x7632U;", 0x77663322),
        ("prmt.b32 %r3, 0x00008000, 0, 0x4449U;", 0x000000FF),
        ("mul.hi.u32 %r3, -1, -1;", -2),
        ("min.u32 %r3, -1, 5;", 5),
        ("popc.b32 %r3, 0xF0F0;", 8),
        ("mov.b16 %rs1, -2; cvt.s32.s16 %r3, %rs1;", -2),
        ("mov.b16 %rs1, -2; cvt.u32.u16 %r3, %rs1;", 65534),
        ("mov.b32 %r4, 0x1FFFE; cvt.s32.s16 %r3, %r4;", -2),
        ("mul.wide.s32 %rd3, -3, 5; cvt.u32.u64 %r3, %rd3;", -15),
        ("mov.b64 %rd3, {5, 6}; mov.b64 {_, %r3}, %rd3;", 6),
        ("mov.b16 %rs1, 1; mov.b16 %rs2, 2; mov.b32 %r3, {%rs1, %rs2};", 0x20001),
        ("sub.f32 %r3, 0f3F800000, 0f40000000;", -0x40800000),  # -1.0
        ("add.f32 %r3, 0f00000001, 0f00000001;", 2),  # subnormals
        ("cvt.rn.f16x2.f32 %r3, 0f3F800000, 0f40000000;", 0x3C004000),
        ("mov.b16 %rs1, 0x3C00; sub.rn.f32.f16 %r3, %rs1, 0f40000000;", -0x40800000),
        (f"{PAIR} add.f32x2 %rd3, %rd3, %rd3; mov.b64 {{%r3, _}}, %rd3;", 0x40000000),
        (f"{PAIR} add.f32x2 %rd3, %rd3, %rd3; mov.b64 {{_, %r3}}, %rd3;", 0x40800000),
        ("setp.ne.f32 %p1, 0f7FC00000, 0f7FC00000; selp.b32 %r3, 1, 0, %p1;", 0),
        ("setp.neu.f32 %p1, 0f7FC00000, 0f7FC00000; selp.b32 %r3, 1, 0, %p1;", 1),
        ("setp.geu.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r3, 1, 0, %p1;", 1),
        ("setp.num.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r3, 1, 0, %p1;", 0),
        (f"{HALVES} setp.eq.f16x2 %p1|%p2, %r4, 0x3C003C00; selp.b32 %r3, 1, 0, %p1;", 1),
        (f"{HALVES} setp.eq.f16x2 %p1|%p2, %r4, 0x3C003C00; selp.b32 %r3, 1, 0, %p2;", 0),
        ("mov.b32 %r3, 7; setp.eq.b32 %p1, 1, 2; @%p1 mov.b32 %r3, 8;", 7),
        ("mov.b32 %r3, 7; setp.eq.b32 %p1, 1, 2; @!%p1 mov.b32 %r3, 8;", 8),
        ("redux.sync.add.s32 %r3, 2, -1;", 64),
    ],
)  # fmt: skip
def test_one_instruction(body: str, expected: int) -> None:
    memory = run(body.replace("; ", ";\n") + "\nst.global.b32 [%rd2], {%r3};")
    assert memory.tolist() == [expected] * 64


def test_threads_exchange_values_in_their_warps() -> None:
    found = run("shfl.sync.bfly.b32 %r3, %r1, 2, 31, -1;\nst.global.b32 [%rd2], {%r3};")
    assert found.tolist() == [thread ^ 2 for thread in range(64)]
    found = run("redux.sync.add.s32 %r3, %r1, -1;\nst.global.b32 [%rd2], {%r3};")
    assert found.tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


def test_blocks_may_go_different_ways() -> None:
    """Block 1 counts to 5, block 2 to 10; their registers and shared memory are their own."""
    found = run(
        """
        mul.lo.s32 %r6, %r2, 4;
        mul.lo.s32 %r7, %r2, 5;
        mov.b32 %r3, 0;
        setp.eq.b32 %p1, %r2, 0;
        @%p1 bra $END;
$LOOP:
        st.shared.b32 [0], %r3;
        bar.sync 0;
        ld.shared.b32 %r3, [0];
        add.s32 %r3, %r3, 1;
        setp.lt.s32 %p2, %r3, %r7;
        @%p2 bra $LOOP;
$END:
        cvt.s64.s32 %rd3, %r6;
        add.s64 %rd3, %rd1, %rd3;
        st.global.b32 [%rd3], {%r3};
        """,
        size=3,
        blocks=3,
        shared=16,
    )
    assert found.tolist() == [0, 5, 10]


def test_more_blocks_than_are_executed_at_a_time() -> None:
    found = run("mad.wide.s32 %rd2, %r2, 4, %rd1;\nst.global.b32 [%rd2], {%r2};", 200, blocks=200)
    assert found.tolist() == list(range(200))


def test_what_was_never_written_is_random() -> None:
    body = "mov.b64 %rd3, {5, %r3};\nmov.b64 {_, %r4}, %rd3;\nst.global.b32 [%rd2], {%r4};"
    assert len({*run(body).tolist()}) > 60
    low = "mov.b64 %rd3, {5, %r3};\nmov.b64 {%r4, _}, %rd3;\nst.global.b32 [%rd2], {%r4};"
    assert run(low).tolist() == [5] * 64


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mul.f32 %r3, %r1, %r1;", "mul.f32 is not in the table"),
        ("fma.rn.bf16 %rs3, %rs1, %rs1, %rs1;", "fma.rn.bf16 is not in the table"),
        ("rsqrt.approx.f32 %r3, %r1;", "rsqrt.approx.f32 is not in the table"),
        ("add.s32 %r3, %rd1, %r1;", "%rd1 has 64 bits, and the type 32"),
        ("add.f64 %rd3, 0f3F800000, %rd1;", "0f3F800000 where 64 bits are needed"),
        ("bra $NOWHERE;", "NOWHERE"),
        ("cvt.rzi.s32.f32 %r3, %r1;", "cvt.rzi.s32.f32 is not in the table"),
        ("ld.const.b32 %r3, [%rd1];", "ld.const.b32"),
    ],
)
def test_what_it_does_not_know(body: str, message: str) -> None:
    with pytest.raises(UnknownInstructionError, match=re.escape(message)) as caught:
        run(body)
    assert body.rstrip(";") in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("add.s64 %rd3, %rd2, 4;\nst.global.b32 [%rd3], {%r1};", "4 bytes after 'memory'"),
        ("st.global.b32 [%rd2 + 4], {%r1};", "0 bytes before and 4 bytes after 'memory'"),
        ("add.s64 %rd3, %rd2, -4;\nld.global.b32 {%r3}, [%rd3];", "4 bytes before and 0 bytes"),
        ("ld.global.b32 {%r3}, [%rd2 + 4096];", "the block has no tensor there"),
        ("ld.global.v2.b32 {%r3, %r4}, [%rd2];", "is 4 past a multiple of it"),
        ("setp.eq.b32 %p1, %r1, 0;\n@%p1 bra $L;\n$L:", "threads of one block go different ways"),
        ("st.shared.b32 [16], %r1;", "the block has no tensor there"),
        (
            "st.shared.v2.b32 [8], {%r1, %r1};\nst.shared.v4.b32 [8], {%r1, %r1, %r1, %r1};",
            "is 8 past a multiple of it",
        ),
        ("mov.b32 %r3, 12;\nst.shared.b64 [%r3 + 4], %rd1;", "the block has no tensor there"),
        ("redux.sync.add.s32 %r3, %r1, 15;", "only a part of a warp"),
    ],
)
def test_what_it_does_not_allow(body: str, message: str) -> None:
    with pytest.raises(ProgramError, match=re.escape(message)) as caught:
        run(body, shared=16)
    assert re.search(r", in: \S", str(caught.value))


def test_what_is_only_read() -> None:
    assert run("ld.global.b32 {%r3}, [%rd2];", writable=False).eq(-1).all()
    with pytest.raises(ProgramError, match="'memory' is only read"):
        run("st.global.b32 [%rd2], {%r1};", writable=False)


def test_masked_threads_access_nothing() -> None:
    body = "setp.lt.u32 %p1, %r1, 3;\nadd.s64 %rd3, %rd2, 244;\n@%p1 st.global.b32 [%rd3], {%r1};"
    assert run(body).tolist() == [-1] * 61 + [0, 1, 2]


def test_tensors_may_overlap() -> None:
    memory = torch.zeros(64, dtype=torch.int32)
    spans = [Span.of("all", memory, writable=True), Span.of("some", memory[5:7])]
    parameters = [np.full((1, 1), memory.data_ptr(), "u8")]
    Program(HEAD + "st.global.b32 [%rd2], {%r1};\nret;\n}").run(
        Launch(1, parameters, 0, Memory(spans))
    )
    assert memory.tolist() == list(range(64))


def test_the_table_s_operands_are_known() -> None:
    letters = {letter for opcode in OPCODES.values() for letter in opcode.operands}
    assert letters == set("dswlnup")
