"""What docs/lightning.md and the docstring show runs, and says what is so."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning.pytorch")

from ema_triton.integrations import lightning
from tests.integrations.lightning_runs import MARKS

ROOT = Path(__file__).parent.parent.parent

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not:UserWarning"),
]


def test_the_script_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/lightning.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    # Its trainer() is without a bar here, and runs on the CPU.
    script = blocks[0].replace("logger=False)", "logger=False, **quiet)")
    names["quiet"] = {"enable_progress_bar": False, "accelerator": "cpu"}
    exec(script, names)
    saved = torch.load(names["last"])
    best = names["first"].checkpoint_callback
    ema = names["resumed"].callbacks[0].ema
    assert ema.update_index == names["resumed"].global_step == 6 * 63
    assert names["first"].callback_metrics["test_loss"] == pytest.approx(best.best_model_score)
    assert best.best_model_score < 0.6
    assert "current_model_state" in saved
    weights = saved["callbacks"]["EMACallback{'name': 'ema'}"]["weights"]
    for name, value in names["model"].state_dict().items():
        assert torch.equal(value, weights[name]), name
    exec(blocks[1].replace("logger=False)", "logger=False, **quiet)"), names)
    assert names["short"].ema.update_index == names["of_net"].ema.update_index == 63
    assert "test_loss" in capsys.readouterr().out


def test_the_docstring() -> None:
    result = doctest.testmod(lightning)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_page_names_every_argument() -> None:
    page = (ROOT / "docs/lightning.md").read_text()
    for name in ("submodule", "optimizer", "at_end", "name"):
        assert f"{name}=" in page, name
    assert len(page.splitlines()) <= 250
