"""The compiled kernel is what the design promises: wide accesses, no shared memory, no spills."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from bench.ptx import ARCHITECTURES, CASES, EXCHANGES, KINDS, SEVERAL, Variant, line

ROOT = Path(__file__).parents[2]
VARIANTS = len(CASES) * len(KINDS) + len(EXCHANGES) + 2 * len(SEVERAL)
NVIDIA = [arch for arch in ARCHITECTURES if arch.startswith("sm_")]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository's root."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@cache
def compiled(folder: Path) -> tuple[int, str, list[Variant]]:
    """Exit status, printed lines and variants of the command."""
    out = folder / "ptx.json"
    run = python("-m", "bench", "ptx", "--arch", ",".join(NVIDIA), "--out", str(out))
    assert not run.stderr, run.stderr
    return run.returncode, run.stdout, [Variant(**row) for row in json.loads(out.read_text())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ptx")


def test_every_variant_keeps_the_contract(folder: Path) -> None:
    status, printed, variants = compiled(folder)
    assert len(variants) == len(NVIDIA) * VARIANTS
    assert {str(variant): variant.shortfalls() for variant in variants} == {
        str(variant): [] for variant in variants
    }
    assert status == 0
    for variant in variants:
        assert line(variant) in printed


def test_a_swap_moves_128_bits_at_a_time(folder: Path) -> None:
    """16 bytes per fp32 element: both sides are read once and written once."""
    _, _, variants = compiled(folder)
    for arch in NVIDIA:
        variant = next(v for v in variants if str(v) == f"{arch} fp32<->fp32 exchange")
        vectors = {access: n for access, n in variant.accesses.items() if ".v" in access}
        assert vectors == {"ld.v4.b32": 4, "st.v4.b32": 4}  # 8 elements per thread
        assert (variant.shared, variant.barriers, variant.spills) == (0, 0, 0)


def test_what_the_contract_is(folder: Path) -> None:
    """For one variant in plain numbers, so that the check is not its own only witness."""
    _, _, variants = compiled(folder)
    for name, expected in PLAIN.items():
        variant = next(v for v in variants if str(v) == f"sm_90 {name} float momentum")
        vectors = {access: n for access, n in variant.accesses.items() if ".v" in access}
        assert vectors == expected
        assert variant.registers <= 40
        assert (variant.shared, variant.barriers, variant.spills) == (0, 0, 0)
        assert variant.instructions <= (20 if "bf16<-bf16 stochastic" in name else 24)


# Per thread: 16 elements, 8 of an exact one.
PLAIN = {
    "fp32<-bf16 nearest": {"ld.v4.b32": 4, "ld.v2.b32": 4, "st.v4.b32": 4},
    "bf16<-bf16 exact": {"ld.v4.b32": 3, "st.v4.b32": 2},
    "fp16<-fp16 exact": {"ld.v4.b32": 2, "ld.v2.b32": 4, "st.v4.b32": 2, "st.v2.b32": 2},
    "bf16<-bf16 stochastic": {"ld.v4.b32": 4, "st.v4.b32": 2},
    "fp16<-fp16 stochastic": {"ld.v4.b32": 4, "st.v4.b32": 2},
}

GOOD = {"ld.v4.b32": 8, "st.v4.b32": 4, "ld.b32": 8, "ld.b64": 3, "st.b32": 4}


# Two fp32 EMAs, 8 elements of each.
SEVERAL_GOOD = {
    "averages": 2,
    "accesses": {"ld.v4.b32": 6, "st.v4.b32": 4, "ld.b32": 6, "ld.b64": 3, "st.b32": 4},
}

# 16 elements of bf16, 8 of them at a time on the masked path.
NOISY = {
    "ema": "bf16",
    "online": "bf16",
    "precision": "stochastic",
    "accesses": {"ld.v4.b32": 4, "st.v4.b32": 2, "ld.b16": 16, "ld.b64": 5, "st.b16": 8},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": 41}, "41 registers, more than 40"),
        ({"shared": 1024}, "1024 bytes of shared memory"),
        ({"barriers": 2}, "2 barriers"),
        ({"spills": 8}, "spills of 8"),
        ({**SEVERAL_GOOD, "registers": 65}, "65 registers, more than 64"),
        ({**SEVERAL_GOOD, "barriers": 1}, "1 barriers"),
        (
            {
                **SEVERAL_GOOD,
                "accesses": {"ld.v4.b32": 3, "st.v4.b32": 4, "ld.b32": 9, "st.b32": 4},
            },
            "4 elements loaded and 8 stored by vectors",
        ),
        ({"guarded": True, "registers": 57}, "57 registers, more than 56"),
        ({"guarded": True, "shared": 512}, "512 bytes of shared memory"),
        ({"guarded": True, "barriers": 7}, "7 barriers"),
        ({"guarded": True, "accesses": {**GOOD, "ld.b32": 11}}, "14 scalar ld instead of 11"),
        ({"accesses": {**GOOD, "ld.b32": 9}}, "12 scalar ld instead of 11"),
        ({"accesses": {**GOOD, "st.b32": 5}}, "5 scalar st instead of 4"),
        ({"accesses": {**GOOD, "ld.v4.b32": 4}}, "8 elements loaded and 16 stored by vectors"),
        ({"accesses": {"ld.b32": 40, "st.b32": 20}}, "vector accesses [] instead of"),
        ({"accesses": {**GOOD, "ld.v2.b32": 1}}, "['ld.v2.b32', 'ld.v4.b32', 'st.v4.b32']"),
        ({**NOISY, "instructions": 20.1}, "20.1 instructions per element, more than 20"),
        ({**NOISY, "ema": "fp16", "instructions": 24.5}, "24.5 instructions per element, more"),
        ({**NOISY, "instructions": None}, "None instructions per element"),
    ],
)
def test_a_shortfall_is_noticed(change: dict, message: str) -> None:
    good = Variant("sm_90", "fp32", "fp32", "nearest", False, False, GOOD, 32, 0, 0, 0, 5.6)
    assert good.shortfalls() == []
    found = replace(good, **change).shortfalls()
    assert len(found) == 1
    assert message in found[0]


def test_a_real_shortfall_fails_the_command() -> None:
    """With four times the block, each thread holds more than its registers take."""
    run = python(
        "-c",
        "from types import SimpleNamespace; from bench import ptx;"
        "ptx.BLOCK = dict.fromkeys(ptx.BLOCK, 8192); ptx.CASES = ptx.CASES[:2];"
        "ptx.main(SimpleNamespace(arch='sm_90', out=None))",
    )
    assert run.returncode == 1
    assert "sm_90 fp32<-fp32 nearest float momentum falls short: " in run.stdout
    assert "registers, more than 40" in run.stdout


SPECIALIZATIONS = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import create_function_from_signature
from ema_triton.ops.kernels import ema_update

backend = triton.compiler.make_backend(GPUTarget("cuda", 90, 32))
bind = create_function_from_signature(ema_update.signature, ema_update.params, backend)
table, flat = torch.zeros(3, dtype=torch.int64), torch.zeros(8)

def key(value, pointer):
    constants = {"ONLINE": tl.float32, "COPY": False, "OVERFLOW": None, "BLOCK": 2048}
    return str(bind(table, flat, None, None, None, value, pointer, **constants)[1])

floats = {key(momentum, None) for momentum in (0.0, 1.0, 0.5, 1e-4, 16.0)}
tensors = {key(0.0, torch.zeros(8)[index]) for index in range(8)}
print(len(floats), len(tensors), len(floats | tensors))
"""


def test_a_new_momentum_needs_no_new_kernel() -> None:
    """Triton's launcher finds one compiled kernel for any float, one for any tensor's alignment."""
    run = python("-c", SPECIALIZATIONS)
    assert run.stdout.split() == ["1", "1", "2"], run.stderr


def test_compiles_for_amd() -> None:
    if triton.__version__.startswith("3.4.") and shutil.which("ld.lld") is None:
        pytest.skip("triton 3.4 links AMD code with a ROCm ld.lld of the machine")
    run = python("-m", "bench", "ptx", "--arch", "gfx942")
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("gfx942")]
    assert len(lines) == VARIANTS
    # Four exact elements per thread are 64 bits of a 16-bit dtype.
    assert all("load.dwordx4" in line or ("bf16<-" in line and "exact" in line) for line in lines)
    assert all("load.dwordx2" in line for line in lines if "exact" in line)


OTHERS = """
from bench import ptx
from ema_triton.ops.kernels import ema_update
from ema_triton.ops.triton_backend import BLOCK

for arch in ptx.ARCHITECTURES:
    look = ptx._nvidia if arch.startswith("sm_") else lambda kernel, elements: ptx._amd(kernel)
    for ema, online, precision in ptx.CASES:
        if precision == "nearest":
            kinds = {"table_ptr": "*i64", "ema_ptr": f"*{ema}", "residual_ptr": None}
            kinds |= {"random_state_ptr": None, "skip_counts_ptr": None, "momentum": "fp64"}
            kinds["momentum_ptr"] = None
            values = {"ONLINE": ptx.DTYPES[online][0], "COPY": True, "OVERFLOW": None}
            values["BLOCK"] = BLOCK[ptx.DTYPES[ema][1].itemsize]
            found = look(ptx._compile(arch, ema_update, kinds, values), 1)
            print("copy", ema, online, precision, found["spills"] == found["barriers"] == 0)
"""


def test_copies_compile_for_every_machine() -> None:
    if triton.__version__.startswith("3.4.") and shutil.which("ld.lld") is None:
        pytest.skip("triton 3.4 links AMD code with a ROCm ld.lld of the machine")
    run = python("-c", OTHERS)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    nearest = sum(precision == "nearest" for _, _, precision in CASES)
    assert len(lines) == len(ARCHITECTURES) * nearest
    assert all(line.endswith("True") for line in lines), [x for x in lines if "False" in x]
