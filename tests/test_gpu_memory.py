"""compute-sanitizer sees no kernel reach past a tensor's end, and sees one that does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.reaching import control, few

ROOT = Path(__file__).parent.parent
HUGE = 3 * 2 * 2**31  # bytes of the online model, its copy, and the bucket that takes its place


def reaching(device: str, which: str, *tool: str) -> subprocess.CompletedProcess[str]:
    # With a cache, tensors lie in large blocks, past whose ends nothing here would reach.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(
        [*tool, sys.executable, "-m", "tests.reaching", device, which],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sanitizer's test runs it")
def test_the_program_reaches_what_it_may_and_its_control_does_not() -> None:
    few("cpu")
    with pytest.raises(AssertionError, match=r"(load|store) of \d+ bytes by block 0 from"):
        control("cpu")


@pytest.mark.memcheck
@pytest.mark.parametrize("which", ["control", "small", "huge"])
def test_memcheck(which: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    if which == "huge" and (free := torch.cuda.mem_get_info()[0]) < HUGE:
        pytest.skip(f"needs {HUGE / 1e9:.0f} GB of GPU memory; {free / 1e9:.0f} GB are free")
    # Calls to the driver that fail are torch's and Triton's affair: they ask it for what it may
    # not have. Each would count as an error.
    options = ("--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")
    ran = reaching("cuda", which, sanitizer, *options)
    if "Device not supported" in ran.stdout + ran.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    if which == "control":
        assert ran.returncode != 0
        assert "Invalid __global__" in ran.stdout
    else:
        assert "ERROR SUMMARY: 0 errors" in ran.stdout, ran.stdout[-3000:] + ran.stderr[-3000:]
        assert ran.returncode == 0
        assert "fine" in ran.stdout
