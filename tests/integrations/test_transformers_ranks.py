"""`attach` under torchrun: two gloo processes, DistributedDataParallel and FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from ema_triton import ModelEMA
from tests.integrations.with_transformers import STEPS, bert, examples, same_state

pytestmark = [pytest.mark.integration, pytest.mark.distributed]


def torchrun(folder: Path, kind: str) -> list[dict]:
    """What each rank found."""
    script = Path(__file__).with_name("transformers_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), str(folder), kind],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def check_predictions(found, state) -> None:
    """They are those of the EMA with this state, and not of the model at the beginning."""
    ema = ModelEMA(bert())
    ids = torch.stack([one["input_ids"] for one in examples()])
    with torch.no_grad():
        first = ema.ema_model(input_ids=ids).logits
        ema.load_state_dict(state)
        torch.testing.assert_close(found["predicted"], ema.ema_model(input_ids=ids).logits)
    assert not torch.allclose(found["predicted"], first, atol=1e-3)


def saved(folder: Path) -> dict:
    return torch.load(folder / "ema.pt", weights_only=True)


def test_under_ddp_rank_0_writes_and_all_load(tmp_path) -> None:
    ranks = torchrun(tmp_path, "ddp")
    for found in ranks:
        assert found["wrapper"] == "DistributedDataParallel"
        assert found["whole"]["update_index"] == STEPS
        assert same_state(found["whole"], ranks[0]["whole"])
        assert same_state(found["after"], found["whole"])
        check_predictions(found, found["whole"])
        assert same_state(found["at begin"], saved(tmp_path / "run/checkpoint-4"))
        assert same_state(found["resumed"], found["whole"])
        assert found["best"]["update_index"] == 4
        assert same_state(found["best"], saved(tmp_path / "best/checkpoint-4"))
    files = [path.name for path in (tmp_path / "whole/checkpoint-6").iterdir()]
    assert [name for name in files if "ema" in name] == ["ema.pt"]


def test_of_a_sharded_model_the_checkpoint_has_whole_tensors(tmp_path) -> None:
    first, second = torchrun(tmp_path, "sharded")
    assert first["wrapper"].startswith("FSDP")
    assert second["whole"] == {}
    assert first["whole"]["update_index"] == STEPS
    assert same_state(saved(tmp_path / "whole/checkpoint-6"), first["whole"])
    assert same_state(first["after"], first["whole"])
    for found in (first, second):
        check_predictions(found, first["whole"])
    assert same_state(first["at begin"], saved(tmp_path / "run/checkpoint-4"))
    assert first["resumed"]["update_index"] == STEPS
