"""The FSDP2 example as a user runs it: resumed on another number of ranks, started in both ways."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ignite")
safetensors = pytest.importorskip("safetensors.torch")

EXAMPLE = Path(__file__).parent.parent / "examples" / "fsdp2.py"

pytestmark = pytest.mark.distributed


def run(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    # Not the exit status: see the end of elastic_training.py.
    assert "The EMA's weights are in" in done.stdout, done.stderr
    return done.stdout


def test_it_trains_and_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    options = ("--every=10", f"--folder={tmp_path}")
    first = run(EXAMPLE, "--ranks=2", "--epochs=2", *options)
    losses = re.findall(r"iteration (\d+): validation loss (\S+) of the online model, (\S+)", first)
    assert [iteration for iteration, *_ in losses] == ["10", "20"]
    (_, *before), (_, *after) = losses
    assert float(after[0]) < float(before[0])
    assert float(after[1]) < float(before[1])
    assert len(set(before + after)) == 4
    assert {path.name for path in tmp_path.iterdir()} == {
        *("iteration-10", "iteration-20", "ema.safetensors")
    }
    weights = safetensors.load_file(tmp_path / "ema.safetensors")
    assert weights["bytes.weight"].shape == (256, 64)

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3")
    second = run(*torchrun, EXAMPLE, "--resume", "--quiet", "--epochs=3", *options)
    assert f"Resumed from {tmp_path / 'iteration-20'} on 3 ranks." in second
    assert re.findall(r"iteration (\d+)", second) == ["30"]
    again = run(EXAMPLE, "--ranks=1", "--resume", "--quiet", "--epochs=3", *options)
    assert f"Resumed from {tmp_path / 'iteration-30'} on 1 ranks." in again
    resumed = safetensors.load_file(tmp_path / "ema.safetensors")
    assert not resumed["bytes.weight"].equal(weights["bytes.weight"])
