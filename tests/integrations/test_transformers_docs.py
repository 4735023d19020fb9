"""The scripts in docs/transformers.md run as they stand there."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import tests.integrations.with_transformers as shared

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TEXT = (Path(__file__).parents[2] / "docs/transformers.md").read_text()


@pytest.mark.integration
def test_the_scripts_of_the_page(tmp_path, monkeypatch) -> None:
    from peft import PeftModel
    from transformers import BertForSequenceClassification

    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    script, crashed, copied, alone, lora = blocks
    names: dict = {}
    exec(script, names)
    best = Path(names["trainer"].state.best_model_checkpoint)
    losses = [one["eval_loss"] for one in names["trainer"].state.log_history if "eval_loss" in one]
    assert losses[-1] == pytest.approx(min(losses))
    assert min(losses) < losses[0] - 0.01
    averaged = BertForSequenceClassification.from_pretrained("averaged")
    saved = torch.load(best / "ema.pt", weights_only=True)["weights"]
    assert all(torch.equal(averaged.state_dict()[name], value) for name, value in saved.items())
    whole = torch.load("run/checkpoint-80/ema.pt", weights_only=True)
    for later in Path("run").glob("checkpoint-[68]0"):
        for file in later.iterdir():
            file.unlink()
        later.rmdir()
    exec(crashed, names)
    assert shared.same_state(names["attached"].ema.state_dict(), whole)
    for block in (copied, alone, lora):
        exec(block, names)
    final = BertForSequenceClassification.from_pretrained("final")
    ema_model = torch.load("run/checkpoint-80/ema.pt", weights_only=True)["weights"]
    assert all(torch.equal(final.state_dict()[name], value) for name, value in ema_model.items())
    assert names["attached"].ema.state_dict()["weights"].keys() == {*names["trained"]}
    loaded = PeftModel.from_pretrained(BertForSequenceClassification(names["CONFIG"]), "adapter")
    weights = names["attached"].ema.state_dict()["weights"]
    assert all(torch.equal(dict(loaded.named_parameters())[n], v) for n, v in weights.items())


def test_the_page_is_short_and_its_words_are_real() -> None:
    assert len(TEXT.splitlines()) <= 250
    for name in ("ema.pt", "save_pretrained", "load_best_model_at_end", "copy_to", "as_module"):
        assert name in TEXT
