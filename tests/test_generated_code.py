"""The compiled kernel is what the design promises: wide accesses, no shared memory, no spills."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
AOT = Path(__file__).with_name("aot.py")
BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


@cache
def output(*archs: str) -> dict[str, Any]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(AOT.parent.parent), env.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(AOT), *archs], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def compiled(*archs: str) -> list[dict[str, Any]]:
    variants: list[dict[str, Any]] = output(*archs)["variants"]
    assert len(variants) == len(archs) * 20
    return variants


def name(variant: dict[str, Any]) -> str:
    kind = "tensor" if variant["tensor_momentum"] else "float"
    return f"{variant['arch']} {variant['ema']}<-{variant['online']} {kind} momentum"


def expected_vectors(ema: str, online: str) -> set[str]:
    """The accesses of the aligned path: 128 bits, or 64 where a narrow type is read beside fp32."""
    wide = {"fp64": "v2.b64"}.get(ema, "v4.b32")
    online_load = "ld.v2.b32" if BYTES[online] < BYTES[ema] else f"ld.{wide}"
    return {f"ld.{wide}", f"st.{wide}", online_load}


def test_aligned_path_has_full_width_accesses_only() -> None:
    for variant in compiled(*ARCHITECTURES):
        found = {access: n for access, n in variant["accesses"].items() if ".v" in access}
        assert set(found) == expected_vectors(variant["ema"], variant["online"]), name(variant)


def test_scalar_accesses_are_the_exact_path_alone() -> None:
    """Per thread: the table's row (3 x 64 bits), the momentum, and the masked path's elements.

    The masked path takes a quarter of the block, so each thread a quarter of the elements that it
    has in the aligned path, though not less than the two fp64 of a vector. More scalar accesses
    than that would be an aligned path fallen apart.
    """
    for variant in compiled(*ARCHITECTURES):
        accesses = variant["accesses"]
        elements = {
            side: sum(
                count * int(width.group(1)) * int(width.group(2)) // 8
                for access, count in accesses.items()
                if (width := re.fullmatch(rf"{side}\.v(\d)\.b(\d+)", access))
            )
            for side in ("ld", "st")
        }
        loaded = elements["ld"] // (BYTES[variant["ema"]] + BYTES[variant["online"]])
        stored = elements["st"] // BYTES[variant["ema"]]
        assert loaded == stored > 0, name(variant)
        scalar_loads = sum(n for a, n in accesses.items() if re.fullmatch(r"ld\.b\d+", a))
        scalar_stores = sum(n for a, n in accesses.items() if re.fullmatch(r"st\.b\d+", a))
        masked = max(stored // 4, 2)
        assert scalar_stores == masked, name(variant)
        assert scalar_loads == 2 * masked + 3 + variant["tensor_momentum"], name(variant)


def test_no_shared_memory_no_barrier_no_spill_and_few_registers() -> None:
    for variant in compiled(*ARCHITECTURES):
        assert variant["shared"] == 0, name(variant)
        assert variant["barriers"] == 0, name(variant)
        resources = variant["resources"]
        assert resources["STACK"] == resources["LOCAL"] == 0, name(variant)
        # The driver reserves 1 KiB of shared memory per block from sm_90 on; it is not ours.
        assert resources["SHARED"] in (0, 1024), name(variant)
        assert resources["REG"] <= 40, f"{name(variant)}: {resources['REG']} registers"


def test_a_new_momentum_needs_no_new_kernel() -> None:
    """Not for another float, and not for a tensor at another alignment."""
    assert output(*ARCHITECTURES)["keys"] == [1, 1]


def test_compiles_for_amd() -> None:
    if triton.__version__.startswith("3.4.") and shutil.which("ld.lld") is None:
        pytest.skip("triton 3.4 links AMD code with a ROCm ld.lld of the machine")
    assert all(variant["shared"] == 0 for variant in compiled("gfx942"))
