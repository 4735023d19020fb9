"""torchrun restarts a sharded training of which a rank was killed, and its EMA ends the same."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.sharded import assert_same

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
STEPS = 23


def torchrun(folder: Path, *options: object) -> str:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"),
            *(ROOT / "tests" / "elastic_training.py", *map(str, (folder, STEPS, *options))),
        ],
        # In a store that the restarted ranks share with those before, gloo finds the addresses of
        # the dead: every other restart failed.
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_killed_rank_costs_nothing(tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    torchrun(undisturbed, -1, 0)
    expected = torch.load(undisturbed / "ema.pt", weights_only=True)
    assert (undisturbed / "resumed").read_text() == "from nothing"
    assert expected["update_index"] == STEPS
    for number in range(3):
        victim, death = number % 2, random.randrange(1, STEPS)
        folder = tmp_path / f"rank {victim} at {death}, {number}"
        folder.mkdir()
        said = torchrun(folder, victim, death)
        assert (folder / "died").exists()
        assert "SIGKILL" in said or "Signal 9" in said or "exitcode: -9" in said
        whole = death - death % 5
        assert (folder / "resumed").read_text() == (f"step-{whole}" if whole else "from nothing")
        assert_same(torch.load(folder / "ema.pt", weights_only=True), expected)
