"""What `attach` writes into a Trainer's checkpoints, and how it goes on from them."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from ema_triton import Constant, ModelEMA
from ema_triton.integrations.transformers import attach
from tests.integrations.with_transformers import (
    SCHEDULE,
    STEPS,
    At,
    Crashed,
    bert,
    crash,
    equal,
    examples,
    make,
    same_state,
    tensors,
)
from tests.oracle import lerp
from tests.tolerances import assert_update, update_bound

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(folder: Path, resume=None, *, options=None, **given):
    """The trainer of a run, and its EMA."""
    trainer = make(folder, **given)
    attached = attach(trainer, SCHEDULE, **(options or {}))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, attached.ema


def ema_of(checkpoint: Path, model=None, **options) -> ModelEMA:
    """As anyone reads it, without a trainer."""
    ema = ModelEMA(bert() if model is None else model, **options)
    ema.load_state_dict(torch.load(checkpoint / "ema.pt", weights_only=True))
    return ema


def test_every_checkpoint_has_the_ema_of_its_step(tmp_path) -> None:
    trainer = make(tmp_path)
    attached = attach(trainer, SCHEDULE)
    noted = {}
    for step in (2, 4, 6):
        trainer.add_callback(
            At(step, lambda step=step: noted.update({step: attached.ema.state_dict(clone=True)}))
        )
    trainer.train()
    for step, state in noted.items():
        ema = ema_of(tmp_path / f"checkpoint-{step}")
        assert ema.update_index == step
        assert ema.schedule == SCHEDULE
        assert same_state(ema.state_dict(), state)
    assert not equal(noted[2]["weights"], noted[4]["weights"])


SLOW = pytest.mark.integration


@pytest.mark.parametrize(
    ("accumulation", "options", "by_name"),
    [
        (1, {}, True),
        (2, {"ema_dtype": torch.bfloat16}, False),  # its residuals are needed
        pytest.param(3, {"as_module": False, "exclude": "bert.embeddings"}, True, marks=SLOW),
        pytest.param(
            1, {"ema_dtype": torch.float16, "precision": "stochastic", "seed": 5}, False, marks=SLOW
        ),
        pytest.param(2, {"handle_buffers": "update", "nonfinite": "skip"}, True, marks=SLOW),
    ],
)
def test_a_crashed_training_resumes_bit_for_bit(tmp_path, accumulation, options, by_name) -> None:
    given = {"gradient_accumulation_steps": accumulation, "options": options}
    whole, expected = trained(tmp_path / "whole", **given)
    crashing = make(tmp_path / "run", gradient_accumulation_steps=accumulation)
    crashing.add_callback(At(5, crash))
    attach(crashing, SCHEDULE, **options)
    with pytest.raises(Crashed):
        crashing.train()
    resume = str(tmp_path / "run/checkpoint-4") if by_name else True
    again, ema = trained(tmp_path / "run", resume, **given)
    assert ema.update_index == STEPS
    assert equal(tensors(again.model), tensors(whole.model))
    assert same_state(ema.state_dict(), expected.state_dict())
    if "ema_dtype" in options and "precision" not in options:
        assert ema.state_dict()["residuals"]


@pytest.mark.integration
def test_what_is_resumed_is_the_checkpoints_and_not_the_first_ones(tmp_path) -> None:
    """A control of the test above: without its file, the EMA at the end is another one."""
    _, expected = trained(tmp_path)
    (tmp_path / "checkpoint-4/ema.pt").unlink()
    with pytest.warns(UserWarning, match="has no EMA"):
        _, ema = trained(tmp_path, str(tmp_path / "checkpoint-4"))
    assert not same_state(ema.state_dict(), expected.state_dict())


@pytest.mark.integration
def test_one_trainer_resumes_from_any_of_its_checkpoints(tmp_path) -> None:
    trainer = make(tmp_path)
    attached = attach(trainer, SCHEDULE)
    trainer.train()
    expected = attached.ema.state_dict(clone=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_state(attached.ema.state_dict(), expected)


def test_where_a_subclass_decides_from_where_to_resume_the_ema_goes_too(tmp_path) -> None:
    class Automatic(Trainer):
        def train(self, resume_from_checkpoint=None, **kwargs):
            return super().train(str(tmp_path / "checkpoint-4"), **kwargs)

    _, expected = trained(tmp_path)
    _, ema = trained(tmp_path, kind=Automatic)
    assert same_state(ema.state_dict(), expected.state_dict())


@pytest.mark.integration
def test_a_resumed_training_with_a_new_model_from_model_init(tmp_path) -> None:
    given = {"of_trainer": {"model_init": bert}}
    _, expected = trained(tmp_path, **given)
    _, ema = trained(tmp_path, str(tmp_path / "checkpoint-4"), **given)
    assert same_state(ema.state_dict(), expected.state_dict())


@pytest.mark.integration
def test_the_checkpoints_schedule_counts_and_another_one_is_warned_of(tmp_path) -> None:
    trained(tmp_path)
    trainer = make(tmp_path)
    attached = attach(trainer, Constant(0.3))
    with pytest.warns(UserWarning, match="The checkpoint's schedule LinearWarmup.* replaces Const"):
        trainer.train(resume_from_checkpoint=True)
    assert attached.ema.schedule == SCHEDULE


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:The checkpoint's schedule:UserWarning")
def test_a_callback_may_change_the_schedule_of_a_resumed_training(tmp_path) -> None:
    class Change(TrainerCallback):
        def on_train_begin(self, *_, **__):
            attached.ema.schedule = Constant(1.0)

    trained(tmp_path)
    trainer = make(tmp_path)
    attached = attach(trainer, Constant(1.0))
    trainer.add_callback(Change())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert equal(tensors(attached.ema.ema_model), tensors(trainer.model))


@pytest.mark.integration
def test_a_function_as_schedule_is_not_saved_and_is_used_again(tmp_path) -> None:
    emas = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = make(tmp_path)
        attached = attach(trainer, lambda update_index: 1 / (1 + update_index))
        trainer.train(resume_from_checkpoint=resume)
        emas.append(attached.ema.state_dict())
    assert same_state(*emas)


def test_a_checkpoint_without_an_ema_is_warned_of_and_the_ema_begins_there(tmp_path) -> None:
    make(tmp_path).train()
    begin = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    noted = []

    def note() -> None:
        noted.extend([attached.ema.state_dict(clone=True), tensors(trainer.model)])

    trainer = make(tmp_path)
    attached = attach(trainer, SCHEDULE)
    trainer.add_callback(At(5, note))
    text = (
        r"checkpoint-4' has no EMA \(ema\.pt\): attach\(\) did not.*begins with its online weights"
    )
    with pytest.warns(UserWarning, match=text):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    state, online = noted
    assert state["update_index"] == 1
    for name, value in begin.named_parameters():
        truth = lerp(value.detach(), online[name], SCHEDULE(1))
        bound = update_bound(value.detach(), online[name], value.dtype)
        assert_update(state["weights"][name], truth, bound)


@pytest.mark.integration
def test_the_same_trainer_begins_anew_from_a_checkpoint_without_an_ema(tmp_path) -> None:
    trainer = make(tmp_path)
    attached = attach(trainer, Constant(1.0))
    trainer.train()
    (tmp_path / "checkpoint-4/ema.pt").unlink()
    attached.ema.ema_model.classifier.bias.data.fill_(100.0)
    attached.ema.schedule = Constant(0.0)
    with pytest.warns(UserWarning, match="has no EMA"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert equal(tensors(attached.ema.ema_model), tensors(saved))
    assert attached.ema.update_index == 2


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["cut off", "of another model", "of no kind"])
def test_a_damaged_ema_is_an_error_that_names_the_file(tmp_path, kind) -> None:
    trained(tmp_path)
    file = tmp_path / "checkpoint-4/ema.pt"
    if kind == "cut off":
        file.write_bytes(file.read_bytes()[:2000])
    elif kind == "of another model":
        torch.save(ModelEMA(torch.nn.Linear(2, 2)).state_dict(), file)
    else:
        torch.save([1, 2, 3], file)
    trainer = make(tmp_path)
    attached = attach(trainer, SCHEDULE)
    with pytest.raises(ValueError, match=r"checkpoint-4/ema\.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert attached.ema.update_index == 0
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert attached.ema.update_index == STEPS


def fail_to_save(monkeypatch, name: str, folder: Path) -> None:
    """Have torch.save raise for one file of a checkpoint in its middle, as a full disk would."""
    save = torch.save

    def full(value, file, *rest, **kwargs):
        is_ema = isinstance(value, dict) and "update_index" in value
        if folder.is_dir() and name == ("ema.pt" if is_ema else Path(file).name):
            Path(file).write_bytes(b"PK")
            raise OSError("No space left on device")
        return save(value, file, *rest, **kwargs)

    monkeypatch.setattr(torch, "save", full)


@pytest.mark.parametrize("name", ["ema.pt", "optimizer.pt"])
def test_a_crash_while_saving_leaves_no_checkpoint_that_resumes_wrongly(
    tmp_path, monkeypatch, name
) -> None:
    _, expected = trained(tmp_path / "whole")
    with monkeypatch.context() as patch:
        fail_to_save(patch, name, tmp_path / "run/checkpoint-4")
        with pytest.raises(OSError, match="No space"):
            trained(tmp_path / "run")
    half = tmp_path / "run/checkpoint-4"
    assert half.is_dir()
    assert [*half.glob("*ema*")] == ([] if name == "ema.pt" else [half / "ema.pt"])
    assert not any(path.name.startswith(".") for path in half.iterdir())
    assert not (half / "trainer_state.json").exists()  # without which a Trainer resumes from none
    with pytest.raises(FileNotFoundError, match=r"trainer_state\.json"):
        trained(tmp_path / "run", True)
    _, ema = trained(tmp_path / "run", str(tmp_path / "run/checkpoint-2"))
    assert same_state(ema.state_dict(), expected.state_dict())


@pytest.mark.integration
def test_an_old_ema_does_not_stay_beside_newer_weights(tmp_path, monkeypatch) -> None:
    """A run into the folder of an older one, which crashes between the weights and the EMA."""
    trained(tmp_path)
    fail_to_save(monkeypatch, "ema.pt", tmp_path / "checkpoint-2")
    with pytest.raises(OSError, match="No space"):
        trained(tmp_path)
    assert not (tmp_path / "checkpoint-2/ema.pt").exists()


@pytest.mark.integration
def test_a_killed_process_resumes_bit_for_bit(tmp_path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
import torch
from ema_triton.integrations.transformers import attach
from tests.integrations.with_transformers import SCHEDULE, At, make
torch.set_num_threads(1)  # as here: sums in one order
trainer = make(Path(sys.argv[1]), gradient_accumulation_steps=2)
trainer.add_callback(At(5, lambda: os.kill(os.getpid(), signal.SIGKILL)))
attach(trainer, SCHEDULE)
trainer.train()
"""
    run = tmp_path / "run"
    command = [sys.executable, "-c", program, str(run)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    _, expected = trained(tmp_path / "whole", gradient_accumulation_steps=2)
    _, ema = trained(run, True, gradient_accumulation_steps=2)
    assert same_state(ema.state_dict(), expected.state_dict())


def test_a_checkpoint_that_no_callback_hears_of_has_the_ema_too(tmp_path) -> None:
    """transformers' checkpoints at SIGTERM are written without calling on_save."""
    trainer = make(tmp_path, save_strategy="no")
    attach(trainer, SCHEDULE)
    trainer.add_callback(At(3, lambda: trainer._save_checkpoint(trainer.model, trial=None)))
    trainer.train()
    assert ema_of(tmp_path / "checkpoint-3").update_index == 3


class SavesItself(Trainer):
    """Writes its checkpoints without `save_model`, as many training scripts do; or skips some."""

    def _save_checkpoint(self, model, trial) -> None:
        if self.state.global_step == 4:
            return
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        model.save_pretrained(folder)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))


def test_a_trainer_that_saves_in_its_own_way_has_the_ema_in_its_checkpoints(tmp_path) -> None:
    trained(tmp_path, learning_rate=0.01)  # whose EMAs do not stay beside the newer weights
    shutil.rmtree(tmp_path / "checkpoint-4")
    _, expected = trained(tmp_path, kind=SavesItself)
    assert same_state(ema_of(tmp_path / "checkpoint-6").state_dict(), expected.state_dict())
    assert not (tmp_path / "checkpoint-4").exists()  # a Trainer would resume from it
    shutil.rmtree(tmp_path / "checkpoint-6")
    _, ema = trained(tmp_path, True, kind=SavesItself)
    assert same_state(ema.state_dict(), expected.state_dict())


@pytest.mark.integration
def test_its_second_training_into_the_same_folders_saves_again(tmp_path) -> None:
    trainer = make(tmp_path, kind=SavesItself, save_steps=6)
    attached = attach(trainer, SCHEDULE)
    for count in (1, 2):
        trainer.train()
        assert ema_of(tmp_path / "checkpoint-6").update_index == count * STEPS
        assert attached.ema.update_index == count * STEPS


@pytest.mark.integration
def test_with_save_only_model_the_ema_is_saved(tmp_path) -> None:
    trained(tmp_path, save_only_model=True)
    assert ema_of(tmp_path / "checkpoint-6").update_index == 6


def test_rotation_takes_the_emas_along(tmp_path) -> None:
    trained(tmp_path, save_total_limit=1)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("ema.pt")} == {
        "checkpoint-6/ema.pt"
    }
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


@pytest.fixture
def best(tmp_path):
    """A training whose best checkpoint is the one of step 4, by what its evaluations return."""
    scores = iter([1.0, 3.0, 2.0])
    trainer = make(
        tmp_path,
        of_trainer={"compute_metrics": lambda _: {"score": next(scores, 0.0)}},
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        save_total_limit=1,
    )
    return trainer, attach(trainer, SCHEDULE)


def test_at_the_end_the_ema_is_the_best_checkpoints(tmp_path, best) -> None:
    trainer, attached = best
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert attached.ema.update_index == 4
    assert same_state(attached.ema.state_dict(), ema_of(tmp_path / "checkpoint-4").state_dict())
    online = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert equal(tensors(trainer.model), tensors(online))
    in_training = [one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(in_training[1])
    assert in_training[1] != pytest.approx(in_training[2])


@pytest.mark.integration
def test_a_best_checkpoint_without_an_ema_is_warned_of(tmp_path, best) -> None:
    trainer, attached = best
    trainer.add_callback(At(6, (tmp_path / "checkpoint-4/ema.pt").unlink))
    with pytest.warns(UserWarning, match=r"checkpoint-4' has no EMA.*stays that of the last step"):
        trainer.train()
    assert attached.ema.update_index == 6


def test_save_model_saves_the_online_model_and_save_pretrained_the_ema(tmp_path) -> None:
    trainer, ema = trained(tmp_path)
    online = tensors(trainer.model)
    trainer.save_model(str(tmp_path / "online"))
    ema.ema_model.save_pretrained(tmp_path / "averaged")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "online")
    assert equal(tensors(loaded), online)
    averaged = BertForSequenceClassification.from_pretrained(tmp_path / "averaged")
    assert equal(tensors(averaged), tensors(ema.ema_model))
    assert not equal(tensors(averaged), online)
    assert not (tmp_path / "online/ema.pt").exists()
    ema.copy_to(trainer.model)
    trainer.save_model(str(tmp_path / "copied"))
    copied = BertForSequenceClassification.from_pretrained(tmp_path / "copied")
    assert equal(tensors(copied), tensors(averaged))


@pytest.mark.integration
def test_what_is_pushed_to_the_hub_is_no_checkpoint(tmp_path) -> None:
    """`push_to_hub` calls save_model for the output folder, as inside of a training."""
    trainer, _ = trained(tmp_path, save_strategy="no")
    trainer.save_model(_internal_call=True)
    assert (tmp_path / "model.safetensors").is_file()
    assert not [*tmp_path.rglob("ema.pt")]


@pytest.mark.integration
def test_before_the_training_save_model_is_the_trainers_own(tmp_path) -> None:
    trainer = make(tmp_path)
    attach(trainer, SCHEDULE)
    trainer.save_model(str(tmp_path / "first"), _internal_call=True)
    assert (tmp_path / "first/model.safetensors").is_file()
    assert not (tmp_path / "first/ema.pt").exists()


@pytest.mark.integration
def test_a_moved_folder_of_checkpoints_resumes(tmp_path) -> None:
    _, expected = trained(tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    _, ema = trained(tmp_path / "moved", str(tmp_path / "moved/checkpoint-2"))
    assert same_state(ema.state_dict(), expected.state_dict())
    assert len(examples()) == 24
