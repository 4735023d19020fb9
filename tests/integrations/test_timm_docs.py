"""What docs/timm.md says runs; and timm's presence breaks no other framework."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ema_triton.integrations.timm import ModelEmaV3
from tests.integrations import with_timm

with_timm.require()

ROOT = Path(__file__).parents[2]


def test_the_script_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs/timm.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("timm.task.task.ModelEmaV3", None)  # put back at the end
        names: dict[str, object] = {}
        for block in blocks:
            exec(block, names)
    assert "resumed: True" in capsys.readouterr().out
    assert isinstance(names["resumed"], ModelEmaV3)
    loaded, ema = names["model"].state_dict(), names["ema"].module.state_dict()
    assert all(torch.equal(loaded[name].cpu(), ema[name].cpu()) for name in ema)
    online = names["task"].get_trainable_module().state_dict()
    assert not all(torch.equal(loaded[name].cpu(), online[name].cpu()) for name in online)


@pytest.mark.integration
def test_the_other_frameworks_import_beside_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("""
from tests.integrations import with_timm

with_timm.require()
import timm, lightning, transformers, diffusers, accelerate
from importlib.util import find_spec
from transformers import Trainer

print(bool(with_timm._libraries), find_spec("torchvision"))
timm.create_model("test_vit")
""")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    apart, found = done.stdout.split(maxsplit=1)
    assert apart == "False" or found.strip() == "None"
