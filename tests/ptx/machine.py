"""A machine that executes PTX, NVIDIA's portable assembly language, on the CPU.

Triton compiles a kernel to PTX, of which NVIDIA's assembler, ptxas, makes a GPU's instructions. The
kernels of this library use a small part of the language: integer and floating arithmetic,
predicated loads and stores, a few branches. The machine executes that part, with numpy arrays in
the place of threads, on memory of this process: what is loaded and stored are tensors on the CPU.

**All threads in step.** A launch is a grid of blocks of threads. An instruction is executed for all
threads of many blocks before the next one is. A register is an array [blocks, threads], with a 1 in
place of either where all have the same value: `%ctaid.x` is [blocks, 1], `%tid.x` [1, threads], an
immediate [1, 1]. Within a block a branch must go one way, which is checked (Triton writes masks as
predicates, not as branches). Where blocks disagree they part, and one group is executed after the
other to its end.

**Registers are bits.** A register is declared with a width, and each instruction says how it reads
the bits: `add.s32` as integers, `add.f32` as floats, `add.f32x2` as two floats in one register. A
width that does not fit is an error. What was never written is random, and different in each thread,
so that a result which depends on it shows.

**Arithmetic is that of IEEE 754**, with subnormals, as on a GPU without `.ftz`. For single
operations that is numpy's; `fma` is rounded once. What is not in the table of opcodes is an error.
So is `mul.f32`, on purpose: ptxas may contract it with a following `add.f32`, and the result could
not be told from the PTX. Which NaN comes out of an operation is not modelled.

**Every access to memory is checked.** Its address must be a multiple of its size, and inside what
the block may read, or may write: of global memory its chunk of a tensor and what belongs to that,
of shared memory the size that Triton asks for.

Not modelled: time; races, since no thread is ahead of another one (`bar.sync` does nothing); what
ptxas does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tests.ptx.memory import Memory, Shared
from tests.ptx.opcodes import KINDS, OPCODES, WIDER, Array, Kind, ProgramError, both

# Blocks that are executed at a time: the registers of more would not stay in the CPU's cache.
GROUP = 64

# Where an instruction without a guard is executed.
ALWAYS = np.ones((1, 1), bool)

# What an access is told beside its type. What is said of caches changes no value.
HOW = {"v2", "v4", "L1::evict_first", "L2::cache_hint"}


class UnknownInstructionError(NotImplementedError):
    """The machine cannot execute this program."""


class Launch(NamedTuple):
    """What a program is given: how many blocks, its parameters' bits, and memory."""

    blocks: int
    parameters: Sequence[Array]
    shared: int
    memory: Memory


class Blocks:
    """Blocks that have taken the same way so far: where they are, their registers and memory."""

    def __init__(self, program: Program, launch: Launch, numbers: Array, shared: Shared) -> None:
        self.program, self.launch, self.numbers, self.shared = program, launch, numbers, shared
        self.position = 0
        self.registers = {
            "%ctaid.x": numbers[:, None],
            "%nctaid.x": np.full((1, 1), launch.blocks, "u4"),
            "%tid.x": np.arange(program.threads, dtype="u4")[None],
        }

    def read(self, register: str) -> Array:
        """The bits of a register."""
        if register not in self.registers:
            shape = len(self.numbers), self.program.threads
            self.registers[register] = noise(shape, self.program.width(register))
        return self.registers[register]

    def spread(self, register: str) -> Array:
        """The bits of a register, for each thread."""
        bits = self.read(register)
        return np.broadcast_to(bits, (len(bits), self.program.threads))

    def write(self, register: str, bits: Array, active: Array) -> None:
        """Replace the bits of a register in the threads that are active."""
        if active is not ALWAYS:
            bits = np.where(active, bits, self.read(register))
        self.registers[register] = bits

    def part(self, chosen: Array, position: int) -> Blocks:
        """Some of the blocks, at a position."""
        part = Blocks(self.program, self.launch, self.numbers[chosen], self.shared)
        part.position = position
        for name, bits in self.registers.items():
            part.registers[name] = bits[chosen] if len(bits) > 1 else bits
        return part


Source = Callable[[Blocks], Array]  # reads an operand
Target = Callable[[Blocks, Array, Array], None]  # writes numbers where active

# Executes an instruction. Returns nothing, or the blocks that go on elsewhere than behind it.
Step = Callable[[Blocks], "list[Blocks] | None"]


class Program:
    """A kernel, decoded from its PTX."""

    def __init__(self, ptx: str) -> None:
        header, _, body = re.sub(r"//.*", "", ptx).partition(".reqntid")
        body = body.partition(".section")[0]
        self.threads = int(re.match(r"\s*(\d+)", body)[1])
        self._parameters = re.findall(r"\.param .* (\w+),?$", header, re.M)
        self._shared = re.findall(r"\.shared .* (\w+)\[\];", header)
        declared = re.findall(r"\.reg \.(\w+)\s+(%\w+)<\d+>;", body)
        self._widths = dict.fromkeys(("%tid.x", "%ctaid.x", "%nctaid.x"), 32)
        self._widths |= {prefix: KINDS[kind].width for kind, prefix in declared}
        self._labels: dict[str, int] = {}
        self._texts: list[str] = []
        for label, text in re.findall(r"^\s*(?:(\$\w+):|([@a-z][^;]*);)", body, re.M):
            if label:
                self._labels[label] = len(self._texts)
            else:
                self._texts.append(text)
        self._steps = [self._decoded(text) for text in self._texts]

    def run(self, launch: Launch) -> None:
        """Execute all blocks."""
        for first in range(0, launch.blocks, GROUP):
            numbers = np.arange(first, min(first + GROUP, launch.blocks), dtype="u4")
            shared = Shared(len(numbers), launch.shared)
            waiting = [Blocks(self, launch, numbers, shared)]
            while waiting:
                waiting += self._run(waiting.pop())

    def _run(self, blocks: Blocks) -> list[Blocks]:
        """Execute until the blocks part, or end."""
        ways = None
        with np.errstate(all="ignore"):
            while ways is None:
                position = blocks.position
                blocks.position += 1
                try:
                    ways = self._steps[position](blocks)
                except ProgramError as error:
                    raise ProgramError(f"{error}, in: {self._texts[position]}") from None
        return ways

    def width(self, register: str) -> int:
        """How many bits it was declared with."""
        return self._widths.get(register) or self._widths[register.rstrip("0123456789")]

    def _decoded(self, text: str) -> Step:
        try:
            return self._decode(text)
        except Exception as error:
            raise UnknownInstructionError(f"{error}, in: {text}") from error

    def _decode(self, text: str) -> Step:
        """The function that executes an instruction."""
        guard, name, rest = re.fullmatch(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*)", text, re.S).groups()
        name = name.replace("::cta", "")
        operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)
        active = self._guard(guard)
        match name.split("."):
            case ["ld", "param", kind]:
                return self._parameter(*operands, KINDS[kind])
            case ["ld" | "st" as what, "global" | "shared" as space, *how, kind] if {*how} <= HOW:
                return self._access(what, space, operands, kind, active)
            case ["mov", kind] if "{" in rest:
                return self._repack(*operands, kind, active)
            case ["bra", *_]:
                return self._branch(operands[0], active)
            case ["bar", "sync"] | ["createpolicy", *_] if guard is None:
                return lambda blocks: None
            case ["ret"] if guard is None:
                return lambda blocks: []
        return self._compute(name, operands, active)

    def _compute(self, name: str, operands: list[str], active: Source) -> Step:
        """An instruction of the table."""
        parts = name.split(".")
        types = [part for part in parts if part in KINDS]
        base = ".".join(part for part in parts if part not in KINDS)
        opcode = OPCODES.get(name) or OPCODES.get(base)
        if opcode is None or not types:
            raise UnknownInstructionError(
                f"{name} is not in the table of tests/ptx/opcodes.py: add it, if its result is the "
                "same whatever ptxas makes of it."
            )
        names = {"u": "u32", "p": "pred", "w": WIDER.get(types[0]), "d": types[0]}
        names |= dict.fromkeys("sln", types[-1])
        kinds = [KINDS[names[letter]] for letter in opcode.operands]
        write = self._target(operands[0], kinds[0])
        sources = [
            self._source(operand, kind, letter)
            for operand, kind, letter in zip(
                operands[1:], kinds[1:], opcode.operands[1:], strict=True
            )
        ]

        def step(blocks: Blocks) -> None:
            write(blocks, opcode.compute(*[source(blocks) for source in sources]), active(blocks))

        return step

    def _parameter(self, register: str, place: str, kind: Kind) -> Step:
        write, number = self._target(register, kind), self._parameters.index(place.strip("[]"))
        return lambda blocks: write(blocks, kind.numbers(blocks.launch.parameters[number]), ALWAYS)

    def _access(
        self, what: str, space: str, operands: list[str], type_: str, active: Source
    ) -> Step:
        """A load or a store of one word, or of several neighbours."""
        kind, wider = KINDS[type_], KINDS.get(WIDER.get(type_, ""))
        place, words = operands[:2] if what == "st" else operands[1::-1]
        symbol, offset = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(\d+)\s*)?\]", place).groups()
        begin = self._source(symbol, KINDS["u64" if space == "global" else "u32"])
        skip, size, names = int(offset or 0), kind.width // 8, re.findall(r"[%\w]+", words)

        def places(blocks: Blocks) -> tuple[Memory, Array, Array]:
            addresses = begin(blocks) + skip
            if space == "global":
                return blocks.launch.memory, blocks.numbers, addresses
            rows = blocks.numbers % GROUP
            return blocks.shared.memory, rows, blocks.shared.addresses(rows, addresses)

        if what == "st":
            sources = [self._source(name, kind) for name in names]

            def store(blocks: Blocks) -> None:
                memory, numbers, addresses = places(blocks)
                bits = [kind.bits(source(blocks)) for source in sources]
                memory.store(numbers, addresses, active(blocks), bits)

            return store
        # A register wider than a signed or unsigned integer gets it with its sign, or zeros.
        targets = [
            self._target(name, wider if wider and self.width(name) == wider.width else kind)
            for name in names
        ]

        def load(blocks: Blocks) -> None:
            memory, numbers, addresses = places(blocks)
            where = active(blocks)
            words = memory.load(numbers, addresses, where, size, len(names))
            for write, word in zip(targets, words, strict=True):
                write(blocks, kind.numbers(word), where)

        return load

    def _repack(self, to: str, of: str, name: str, active: Source) -> Step:
        """Two registers become the halves of one, or the other way round."""
        half = f"b{KINDS[name].width // 2}"
        pair = KINDS[f"{half}x2"]
        if "{" in of:
            write = self._target(to, pair)
            low, high = (self._source(part, KINDS[half]) for part in re.findall(r"[%\w]+", of))
            return lambda blocks: write(blocks, both(low(blocks), high(blocks)), active(blocks))

        read = self._source(of, pair)
        targets = [self._target(part, KINDS[half]) for part in re.findall(r"[%\w]+", to)]

        def unpack(blocks: Blocks) -> None:
            halves = read(blocks)
            for number, write in enumerate(targets):
                write(blocks, halves[..., number], active(blocks))

        return unpack

    def _branch(self, label: str, active: Source) -> Step:
        """All threads of a block jump, or none of them does."""
        target = self._labels[label]

        def step(blocks: Blocks) -> list[Blocks] | None:
            jumps = active(blocks)
            jump = jumps[:, 0]
            if (jumps != jump[:, None]).any():
                raise ProgramError("threads of one block go different ways")
            if not jump.any():
                return None
            if jump.all():
                blocks.position = target
                return None
            return [blocks.part(jump, target), blocks.part(~jump, blocks.position)]

        return step

    def _guard(self, guard: str | None) -> Source:
        """Where an instruction is executed."""
        if guard is None:
            return lambda blocks: ALWAYS
        read = self._source(guard.strip("!"), KINDS["pred"])
        return (lambda blocks: ~read(blocks)) if guard.startswith("!") else read

    def _source(self, operand: str, kind: Kind, letter: str = "s") -> Source:
        """A register, an immediate, or the address of shared memory, which begins at 0."""
        if operand.startswith("%"):
            if letter == "n" and self.width(operand) > kind.width:
                bits = f"u{kind.width // 8}"
                return lambda blocks: kind.numbers(blocks.read(operand).astype(bits))
            self._check_width(operand, kind)
            if letter == "l":
                return lambda blocks: kind.numbers(blocks.spread(operand))
            return lambda blocks: kind.numbers(blocks.read(operand))
        immediate = self._immediate(operand, kind.width)
        number = kind.numbers(np.repeat(immediate, self.threads, 1) if letter == "l" else immediate)
        return lambda blocks: number

    def _immediate(self, text: str, width: int) -> Array:
        if text in self._shared:
            bits = 0
        elif text.startswith(("0f", "0d")):
            bits = int(text[2:], 16)
            if width != {"0f": 32, "0d": 64}[text[:2]]:
                raise UnknownInstructionError(f"{text} where {width} bits are needed")
        else:
            bits = int(text.rstrip("U"), 0) % 2**width
        return np.full((1, 1), bits, f"u{width // 8}")

    def _target(self, operand: str, kind: Kind) -> Target:
        """A register, two predicates for two numbers, or none."""
        if operand == "_":
            return lambda blocks, numbers, active: None
        if "|" in operand:
            one, other = (self._target(part, kind) for part in operand.split("|"))

            def write(blocks: Blocks, numbers: Array, active: Array) -> None:
                one(blocks, numbers[..., 0], active)
                other(blocks, numbers[..., 1], active)

            return write
        self._check_width(operand, kind)
        return lambda blocks, numbers, active: blocks.write(operand, kind.bits(numbers), active)

    def _check_width(self, register: str, kind: Kind) -> None:
        if self.width(register) != kind.width:
            raise UnknownInstructionError(
                f"{register} has {self.width(register)} bits, and the type {kind.width}"
            )


def noise(shape: tuple[int, int], width: int) -> Array:
    """Random bits, for registers of a width."""
    random = np.random.default_rng()
    if width == 1:
        return random.random(shape) < 0.5
    return random.integers(2**width, size=shape, dtype=f"u{width // 8}")
