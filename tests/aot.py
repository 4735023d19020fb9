"""Compile the kernel ahead of time and print what its generated code does, as JSON; needs no GPU.

A program of its own because TRITON_INTERPRET, which the other tests need, replaces the compiler.

    python tests/aot.py sm_90 gfx942
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import create_function_from_signature

from ema_triton.kernels import ema_update
from ema_triton.launch import BLOCK, WARPS

DTYPES = {
    "fp64": (tl.float64, torch.float64),
    "fp32": (tl.float32, torch.float32),
    "bf16": (tl.bfloat16, torch.bfloat16),
    "fp16": (tl.float16, torch.float16),
}
NARROW = ("fp32", "bf16", "fp16")
PAIRS = [("fp64", "fp64"), *((ema, online) for ema in NARROW for online in NARROW)]


def compile_kernel(ema: str, online: str, arch: str, *, tensor_momentum: bool, block: int):
    """The kernel as the launcher would specialise it: every pointer 16-byte aligned."""
    names = ["table_ptr", "ema_ptr", "momentum", "momentum_ptr", "ONLINE", "BLOCK"]
    types = ["*i64", f"*{ema}", "fp64", "*fp32", "constexpr", "constexpr"]
    constants = {(4,): DTYPES[online][0], (5,): block}
    aligned = [0, 1]
    if tensor_momentum:
        aligned.append(3)
    else:
        types[3] = "constexpr"
        constants[(3,)] = None
    source = ASTSource(
        fn=ema_update,
        signature=dict(zip(names, types, strict=True)),
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    return triton.compile(source, target=target, options={"num_warps": WARPS})


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and shared memory as the disassembler reports them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}


def describe(arch: str, ema: str, online: str, *, tensor_momentum: bool) -> dict[str, object]:
    """What one variant of the kernel, at the shipped block size, was compiled to."""
    block = BLOCK[DTYPES[ema][1].itemsize]
    kernel = compile_kernel(ema, online, arch, tensor_momentum=tensor_momentum, block=block)
    found: dict[str, object] = {
        "arch": arch,
        "ema": ema,
        "online": online,
        "tensor_momentum": tensor_momentum,
        "shared": kernel.metadata.shared,
    }
    if arch.startswith("sm_"):
        ptx = kernel.asm["ptx"]
        found["barriers"] = ptx.count("bar.sync")
        accesses = re.findall(r"\b(ld|st)\.global\S*?((?:\.v\d)?\.b\d+)\s", ptx)
        found["accesses"] = Counter(f"{op}{width}" for op, width in accesses)
        found["resources"] = resources(kernel.asm["cubin"])
    return found


def specialization(momentum: float | torch.Tensor) -> str:
    """What Triton's launcher would look a compiled kernel up by, for this momentum."""
    backend = triton.compiler.make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(ema_update.signature, ema_update.params, backend)
    table, flat = torch.zeros(3, dtype=torch.int64), torch.zeros(8)
    value, pointer = (momentum, None) if isinstance(momentum, float) else (0.0, momentum)
    return str(bind(table, flat, value, pointer, ONLINE=tl.float32, BLOCK=2048)[1])


if __name__ == "__main__":
    variants = [
        describe(arch, ema, online, tensor_momentum=tensor_momentum)
        for arch in sys.argv[1:]
        for ema, online in PAIRS
        for tensor_momentum in (False, True)
    ]
    of_floats = {specialization(momentum) for momentum in (0.0, 1.0, 0.5, 1e-4, 16.0)}
    of_tensors = {specialization(torch.zeros(8)[index]) for index in range(8)}
    print(json.dumps({"variants": variants, "keys": [len(of_floats), len(of_tensors)]}))
