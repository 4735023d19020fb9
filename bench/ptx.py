"""`python -m bench ptx`: what the kernels are compiled to for other machines; needs no GPU.

The exit status is 1 when a variant falls short of what the design promises for it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from ema_triton.ops.kernels import ema_update, ema_update_several, exchange
from ema_triton.ops.precision import RESIDUAL_DTYPE, overflow_threshold
from ema_triton.ops.triton_backend import (
    BLOCK,
    EXACT_BLOCK,
    EXCHANGE_BLOCK,
    MOST_TOGETHER,
    SEVERAL_BLOCK,
    STOCHASTIC_SEVERAL_BLOCK,
    WARPS,
)

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

DTYPES = {
    "fp64": (tl.float64, torch.float64),
    "fp32": (tl.float32, torch.float32),
    "bf16": (tl.bfloat16, torch.bfloat16),
    "fp16": (tl.float16, torch.float16),
}
NARROW = ("fp32", "bf16", "fp16")
# EMA, online, precision.
CASES = [
    ("fp64", "fp64", "nearest"),
    *((ema, online, "nearest") for ema in NARROW for online in NARROW),
    *(
        (ema, online, precision)
        for precision in ("exact", "stochastic")
        for ema in ("bf16", "fp16")
        for online in NARROW
    ),
]
# The swap, which has neither momentum nor guard, stands beside them as a precision of its own.
EXCHANGES = [(dtype, dtype, "exchange") for dtype in DTYPES]
# Whether the momentum is a tensor, and whether the EMA is guarded.
KINDS = [(False, False), (True, False), (False, True)]
# Several EMAs in one launch, two and three of them: EMA, online, precision, whether guarded.
SEVERAL = [
    ("fp64", "fp64", "nearest", False),
    ("fp32", "fp32", "nearest", False),
    ("fp32", "fp32", "nearest", True),
    ("bf16", "bf16", "exact", False),
    ("bf16", "bf16", "exact", True),
    ("bf16", "bf16", "stochastic", False),
]
RESIDUALS = {"bf16": "i16", "fp16": "fp32"}

# The driver reserves this much shared memory per block from sm_90 on; it is not ours.
RESERVED_SHARED = 1024

MOST_REGISTERS = 40

# With 64, 1024 threads of a multiprocessor run at a time, of 2048. For three fp32 EMAs each of them
# has 128 bytes of loads in flight: 128 KiB, several times what hides the latency of memory.
SEVERAL_REGISTERS = 64

# A guarded kernel adds up what its threads have counted, once, after the last of its elements.
GUARD_REGISTERS = 56
GUARD_SHARED = 256
GUARD_BARRIERS = 6
SEVERAL_MOST_REGISTERS = 88  # also with noise
SEVERAL_GUARD_BARRIERS = 8  # for each EMA

# Of stochastic rounding on sm_90, per element. An H200 issues 41 in the time that 6 bytes take.
# fp16 needs more than bf16, whose spacing is where fp32's low half begins, also for subnormals.
MOST_INSTRUCTIONS = {"bf16": 20, "fp16": 24}


@dataclass(frozen=True)
class Variant:
    """What one variant of the kernel, at the shipped block size, was compiled to.

    Attributes:
        arch: "sm_90", "gfx942" and the like.
        ema: The EMA's dtype.
        online: The online tensors' dtype.
        precision: How the EMA is rounded; "exchange" for the kernel that swaps.
        tensor_momentum: Whether the momentum is a tensor that the kernel reads.
        guarded: Whether it spares the EMA non-finite values.
        accesses: How many global loads and stores there are of each width, such as "ld.v4.b32".
        registers: Per thread, vector registers on AMD.
        shared: Bytes of shared memory that the kernel itself asks for.
        barriers: Places where the threads of a block wait for each other.
        spills: Bytes (AMD: registers) per thread for which no register was left.
        instructions: Machine instructions per element of the aligned path; None on AMD.
        averages: How many EMAs are averaged at once.
    """

    arch: str
    ema: str
    online: str
    precision: str
    tensor_momentum: bool
    guarded: bool
    accesses: dict[str, int]
    registers: int
    shared: int
    barriers: int
    spills: int
    instructions: float | None
    averages: int = 1

    def __str__(self) -> str:
        """For tables and messages."""
        if self.precision == "exchange":
            return f"{self.arch} {self.ema}<->{self.online} exchange"
        kind = "tensor" if self.tensor_momentum else "float"
        guard = ", guarded" if self.guarded else ""
        several = f", {self.averages} at once" if self.averages > 1 else ""
        case = f"{self.arch} {self.ema}<-{self.online} {self.precision}"
        return f"{case} {kind} momentum{guard}{several}"

    def shortfalls(self) -> list[str]:
        """Where the variant falls short of the design."""
        found = []
        # With AMD's 64 threads per warp the masked path has 4 elements per thread, and the noise,
        # which comes for 8, goes through shared memory.
        if self.arch.startswith("sm_") or not (self.guarded or self.precision == "stochastic"):
            if self.shared > self.guarded * GUARD_SHARED:
                found.append(f"{self.shared} bytes of shared memory")
            each = GUARD_BARRIERS if self.averages == 1 else self.averages * SEVERAL_GUARD_BARRIERS
            if self.barriers > self.guarded * each:
                found.append(f"{self.barriers} barriers")
        if self.spills:
            found.append(f"spills of {self.spills}")
        if self.arch.startswith("sm_"):
            most = GUARD_REGISTERS if self.guarded else MOST_REGISTERS
            if self.averages > 1:
                arithmetic = self.guarded or self.precision == "stochastic"
                most = SEVERAL_MOST_REGISTERS if arithmetic else SEVERAL_REGISTERS
            if self.registers > most:
                found.append(f"{self.registers} registers, more than {most}")
            found += self._narrow_accesses()
        single = self.averages == 1 and not self.guarded
        if self.arch == "sm_90" and self.precision == "stochastic" and single:
            most = MOST_INSTRUCTIONS[self.ema]
            if self.instructions is None or self.instructions > most:
                found.append(f"{self.instructions} instructions per element, more than {most}")
        return found

    def _narrow_accesses(self) -> list[str]:
        """Where the aligned path is not as wide as it could be.

        Its accesses are 128 bits wide, or 64 where a narrow type stands beside a wider EMA or
        residual. What else there is, per thread, belongs to the table's row (three loads), the
        momentum, seed and number of the update, the skip count and its number, and the masked path,
        which takes a quarter of the block (with noise half) and so as much of the elements that the
        aligned path has per thread, though not less than the two fp64 of a vector. More scalar
        accesses than that are an aligned path fallen apart.
        """
        stores = [DTYPES[self.ema][1].itemsize]
        if self.precision == "exact":
            stores.append(RESIDUAL_DTYPE[DTYPES[self.ema][1]].itemsize)
        stores *= self.averages
        loads = [*stores, DTYPES[self.online][1].itemsize]
        if self.precision == "exchange":
            stores = loads
        expected = {f"st.{_vector(size, max(stores))}" for size in stores}
        expected |= {f"ld.{_vector(size, max(stores))}" for size in loads}
        vectors = {access for access in self.accesses if ".v" in access}
        if vectors != expected:
            return [f"vector accesses {sorted(vectors)} instead of {sorted(expected)}"]
        found = []
        stored = self._vector_bytes("st") // sum(stores)
        loaded = self._vector_bytes("ld") // sum(loads)
        if loaded != stored:
            found.append(f"{loaded} elements loaded and {stored} stored by vectors")
        noise = self.precision == "stochastic"
        masked = max(stored // (2 if noise else 4), 2)
        others = 3 + self.tensor_momentum + 2 * noise * self.averages
        for op, most in (("ld", len(loads) * masked + others), ("st", len(stores) * masked)):
            scalars = sum(n for access, n in self.accesses.items() if access.startswith(f"{op}.b"))
            least = 0 if self.guarded or self.precision == "exchange" else most
            # Of one average, the compiler makes the counting after both paths one.
            counting = (2 if op == "ld" else 1) * self.guarded
            counting *= 1 if self.averages == 1 else 2 * self.averages
            if not least <= scalars <= most + counting:
                found.append(f"{scalars} scalar {op} instead of {most}")
        return found

    def _vector_bytes(self, op: str) -> int:
        return sum(
            count * int(width.group(1)) * int(width.group(2)) // 8
            for access, count in self.accesses.items()
            if (width := re.fullmatch(rf"{op}\.v(\d)\.b(\d+)", access))
        )


def _vector(size: int, widest: int) -> str:
    """The access to elements of `size` bytes, of which as many are taken as fit of the widest."""
    if size == 8:
        return "v2.b64"
    return "v4.b32" if size >= widest else "v2.b32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file to write")


def main(args: argparse.Namespace) -> None:
    """Compile every variant, print a line for each, fail where one falls short."""
    variants = [
        compiled(arch, *case, tensor_momentum=tensor_momentum, guarded=guarded)
        for arch in args.arch.split(",")
        for case in CASES
        for tensor_momentum, guarded in KINDS
    ]
    variants += [
        compiled(arch, *case, tensor_momentum=False, guarded=False)
        for arch in args.arch.split(",")
        for case in EXCHANGES
    ]
    variants += [
        compiled(arch, *case, tensor_momentum=False, guarded=guarded, averages=averages)
        for arch in args.arch.split(",")
        for *case, guarded in SEVERAL
        for averages in range(2, MOST_TOGETHER + 1)
    ]
    blocks = f"{BLOCK} elements by EMA bytes, {EXACT_BLOCK} if exact"
    print(f"triton {triton.__version__}, {WARPS} warps, blocks of {blocks}")
    for variant in variants:
        print(line(variant))
    if args.out is not None:
        args.out.write_text(json.dumps([asdict(variant) for variant in variants]))
    short = {str(variant): found for variant in variants if (found := variant.shortfalls())}
    for name, found in short.items():
        print(f"{name} falls short: {'; '.join(found)}")
    raise SystemExit(1 if short else 0)


def line(variant: Variant) -> str:
    """One variant in one line of a table."""
    accesses = " ".join(f"{count}x{access}" for access, count in sorted(variant.accesses.items()))
    count = "" if variant.instructions is None else f"{variant.instructions:5.1f} per element "
    return (
        f"{variant!s:53s} {variant.registers:3d} registers {variant.shared:5d} B shared "
        f"{variant.barriers} barriers {variant.spills} spilled {count}  {accesses}"
    )


def compiled(
    arch: str,
    ema: str,
    online: str,
    precision: str,
    *,
    tensor_momentum: bool,
    guarded: bool,
    averages: int = 1,
) -> Variant:
    """Compile one variant as the launcher would specialise it, and look at its code."""
    size = DTYPES[ema][1].itemsize
    block = EXACT_BLOCK if precision == "exact" else BLOCK[size]
    arguments = {
        "table_ptr": "*i64",
        "ema_ptr": f"*{ema}",
        "residual_ptr": f"*{RESIDUALS[ema]}" if precision == "exact" else None,
        "random_state_ptr": "*i64" if precision == "stochastic" else None,
        "skip_counts_ptr": "*i64" if guarded else None,
        "momentum": "fp64",
        "momentum_ptr": "*fp32" if tensor_momentum else None,
    }
    constants = {
        "ONLINE": DTYPES[online][0],
        "COPY": False,
        "OVERFLOW": overflow_threshold(DTYPES[ema][1], precision) if guarded else None,
        "BLOCK": block,
    }
    if precision == "exchange":
        arguments = {"table_ptr": "*i64", "ema_ptr": f"*{ema}"}
        block = EXCHANGE_BLOCK[size]
        kernel = _compile(arch, exchange, arguments, {"BLOCK": block})
    elif averages > 1:
        block = STOCHASTIC_SEVERAL_BLOCK if precision == "stochastic" else SEVERAL_BLOCK[size]
        names = ("ema_ptr", "residual_ptr", "random_state_ptr", "skip_counts_ptr")
        tuples = {f"{name}s": (kind := arguments[name]) and (kind,) * averages for name in names}
        momenta = {f"momentum_{index}": "fp64" for index in range(MOST_TOGETHER)}
        arguments = {"table_ptr": "*i64"} | tuples | momenta
        constants |= {"BLOCK": block}
        del constants["COPY"]
        kernel = _compile(arch, ema_update_several, arguments, constants)
    else:
        kernel = _compile(arch, ema_update, arguments, constants)
    nvidia = arch.startswith("sm_")
    look = _nvidia(kernel, block // (32 * WARPS)) if nvidia else _amd(kernel)
    return Variant(
        arch,
        ema,
        online,
        precision,
        tensor_momentum,
        guarded,
        shared=kernel.metadata.shared,
        averages=averages,
        **look,
    )


def _compile(
    arch: str, kernel: triton.JITFunction, arguments: dict, constants: dict
) -> CompiledKernel:
    """Compile it with arguments of these kinds, pointers aligned; None is a constant too."""
    names = [*arguments, *constants]
    constants |= {name: None for name, kind in arguments.items() if kind is None}
    # A pointer by the path to it: its argument, and where that is a tuple its place in it.
    paths = {
        (names.index(name), *place): one
        for name, kind in arguments.items()
        for place, one in (
            [((index,), one) for index, one in enumerate(kind)]
            if isinstance(kind, tuple)
            else [((), kind)]
        )
    }
    source = ASTSource(
        fn=kernel,
        signature={name: arguments.get(name) or "constexpr" for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            path: [["tt.divisibility", 16]]
            for path, kind in paths.items()
            if kind is not None and kind.startswith("*")
        },
    )
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    return triton.compile(source, target=target, options={"num_warps": WARPS})


def _nvidia(kernel: CompiledKernel, elements: int) -> dict:
    ptx = kernel.asm["ptx"]
    accesses = re.findall(r"\b(ld|st)\.global\S*?((?:\.v\d)?\.b\d+)\s", ptx)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report, code = (
            subprocess.run(
                [tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    used = {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    if used["SHARED"] not in (0, RESERVED_SHARED):
        raise AssertionError(f"{used['SHARED']} bytes of shared memory that Triton did not report")
    return {
        "accesses": dict(Counter(f"{op}{width}" for op, width in accesses)),
        "registers": used["REG"],
        "barriers": ptx.count("bar.sync"),
        "spills": used["STACK"] + used["LOCAL"],
        "instructions": _aligned_loop(code) / elements,
    }


def _aligned_loop(code: str) -> int:
    """How many instructions the loop with the vector stores has."""
    instructions = {
        int(address, 16): text
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)
    }
    loops = []
    for end, text in instructions.items():
        jump = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if jump is not None and (begin := int(jump.group(1), 16)) < end:
            loops.append([text for at, text in instructions.items() if begin <= at <= end])
    (aligned,) = (loop for loop in loops if any(re.search(r"STG.*\.128", text) for text in loop))
    return len(aligned)


def _amd(kernel: CompiledKernel) -> dict:
    code = kernel.asm["amdgcn"]
    accesses = re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", code)
    used = {key: int(n) for key, n in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", code)}
    return {
        "accesses": dict(Counter(f"{op}.{width}" for op, width in accesses)),
        "registers": used["vgpr_count"],
        "barriers": code.count("s_barrier"),
        "spills": used["vgpr_spill_count"],
        "instructions": None,
    }
