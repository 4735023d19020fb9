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

from ema_triton.kernels import ema_update
from ema_triton.launch import BLOCK, WARPS

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

DTYPES = {
    "fp64": (tl.float64, torch.float64),
    "fp32": (tl.float32, torch.float32),
    "bf16": (tl.bfloat16, torch.bfloat16),
    "fp16": (tl.float16, torch.float16),
}
NARROW = ("fp32", "bf16", "fp16")
PAIRS = [("fp64", "fp64"), *((ema, online) for ema in NARROW for online in NARROW)]

# The driver reserves this much shared memory per block from sm_90 on; it is not ours.
RESERVED_SHARED = 1024

MOST_REGISTERS = 40


@dataclass(frozen=True)
class Variant:
    """What one variant of the kernel, at the shipped block size, was compiled to.

    Attributes:
        arch: "sm_90", "gfx942" and the like.
        ema: The EMA's dtype.
        online: The online tensors' dtype.
        tensor_momentum: Whether the momentum is a tensor that the kernel reads.
        accesses: How many global loads and stores there are of each width, such as "ld.v4.b32".
        registers: Per thread, vector registers on AMD.
        shared: Bytes of shared memory that the kernel itself asks for.
        barriers: Places where the threads of a block wait for each other.
        spills: Bytes (AMD: registers) per thread for which no register was left.
    """

    arch: str
    ema: str
    online: str
    tensor_momentum: bool
    accesses: dict[str, int]
    registers: int
    shared: int
    barriers: int
    spills: int

    def __str__(self) -> str:
        """For tables and messages."""
        kind = "tensor" if self.tensor_momentum else "float"
        return f"{self.arch} {self.ema}<-{self.online} {kind} momentum"

    def shortfalls(self) -> list[str]:
        """Where the variant falls short of the design."""
        found = []
        if self.shared:
            found.append(f"{self.shared} bytes of shared memory")
        if self.barriers:
            found.append(f"{self.barriers} barriers")
        if self.spills:
            found.append(f"spills of {self.spills}")
        if self.arch.startswith("sm_"):
            if self.registers > MOST_REGISTERS:
                found.append(f"{self.registers} registers, more than {MOST_REGISTERS}")
            found += self._narrow_accesses()
        return found

    def _narrow_accesses(self) -> list[str]:
        """Where the aligned path is not as wide as it could be.

        Its accesses are 128 bits wide, or 64 where a narrow type is read beside a wider EMA. What
        else there is, per thread, belongs to the table's row (three loads), the momentum, and the
        masked path, which takes a quarter of the block and so a quarter of the elements that the
        aligned path has per thread, though not less than the two fp64 of a vector. More scalar
        accesses than that are an aligned path fallen apart.
        """
        ema_bytes, online_bytes = (DTYPES[name][1].itemsize for name in (self.ema, self.online))
        wide = {8: "v2.b64"}.get(ema_bytes, "v4.b32")
        online_load = "ld.v2.b32" if online_bytes < ema_bytes else f"ld.{wide}"
        expected = {f"ld.{wide}", f"st.{wide}", online_load}
        vectors = {access for access in self.accesses if ".v" in access}
        if vectors != expected:
            return [f"vector accesses {sorted(vectors)} instead of {sorted(expected)}"]
        found = []
        stored = self._vector_bytes("st") // ema_bytes
        loaded = self._vector_bytes("ld") // (ema_bytes + online_bytes)
        if loaded != stored:
            found.append(f"{loaded} elements loaded and {stored} stored by vectors")
        masked = max(stored // 4, 2)
        for op, most in (("ld", 2 * masked + 3 + self.tensor_momentum), ("st", masked)):
            scalars = sum(n for access, n in self.accesses.items() if access.startswith(f"{op}.b"))
            if scalars != most:
                found.append(f"{scalars} scalar {op} instead of {most}")
        return found

    def _vector_bytes(self, op: str) -> int:
        return sum(
            count * int(width.group(1)) * int(width.group(2)) // 8
            for access, count in self.accesses.items()
            if (width := re.fullmatch(rf"{op}\.v(\d)\.b(\d+)", access))
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file to write")


def main(args: argparse.Namespace) -> None:
    """Compile every variant, print a line for each, fail where one falls short."""
    variants = [
        compiled(arch, ema, online, tensor_momentum=tensor_momentum)
        for arch in args.arch.split(",")
        for ema, online in PAIRS
        for tensor_momentum in (False, True)
    ]
    print(f"triton {triton.__version__}, {WARPS} warps, blocks of {BLOCK} elements by EMA bytes")
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
    return (
        f"{variant!s:42s} {variant.registers:3d} registers {variant.shared:5d} B shared "
        f"{variant.barriers} barriers {variant.spills} spilled   {accesses}"
    )


def compiled(arch: str, ema: str, online: str, *, tensor_momentum: bool) -> Variant:
    """Compile one variant as the launcher would specialise it, and look at its code."""
    kernel = _compile(arch, ema, online, tensor_momentum)
    look = _nvidia if arch.startswith("sm_") else _amd
    return Variant(
        arch, ema, online, tensor_momentum, shared=kernel.metadata.shared, **look(kernel)
    )


def _compile(arch: str, ema: str, online: str, tensor_momentum: bool) -> CompiledKernel:
    names = ["table_ptr", "ema_ptr", "momentum", "momentum_ptr", "ONLINE", "BLOCK"]
    types = ["*i64", f"*{ema}", "fp64", "*fp32", "constexpr", "constexpr"]
    constants = {(4,): DTYPES[online][0], (5,): BLOCK[DTYPES[ema][1].itemsize]}
    pointers = [0, 1, 3]
    if not tensor_momentum:
        types[3] = "constexpr"
        constants[(3,)] = None
        pointers.remove(3)
    source = ASTSource(
        fn=ema_update,
        signature=dict(zip(names, types, strict=True)),
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in pointers},
    )
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    return triton.compile(source, target=target, options={"num_warps": WARPS})


def _nvidia(kernel: CompiledKernel) -> dict:
    ptx = kernel.asm["ptx"]
    accesses = re.findall(r"\b(ld|st)\.global\S*?((?:\.v\d)?\.b\d+)\s", ptx)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    if used["SHARED"] not in (0, RESERVED_SHARED):
        raise AssertionError(f"{used['SHARED']} bytes of shared memory that Triton did not report")
    return {
        "accesses": dict(Counter(f"{op}{width}" for op, width in accesses)),
        "registers": used["REG"],
        "barriers": ptx.count("bar.sync"),
        "spills": used["STACK"] + used["LOCAL"],
    }


def _amd(kernel: CompiledKernel) -> dict:
    code = kernel.asm["amdgcn"]
    accesses = re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", code)
    used = {key: int(n) for key, n in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", code)}
    return {
        "accesses": dict(Counter(f"{op}.{width}" for op, width in accesses)),
        "registers": used["vgpr_count"],
        "barriers": code.count("s_barrier"),
        "spills": used["vgpr_spill_count"],
    }
