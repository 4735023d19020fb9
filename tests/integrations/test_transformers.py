"""`attach` to a transformers Trainer: updates, evaluations, and what it refuses."""

import ast
import copy
import doctest
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from accelerate.state import GradientState
from transformers import Trainer

from ema_triton import Constant, HalfLife, ModelEMA
from ema_triton.integrations import transformers as adapter
from ema_triton.integrations.transformers import attach
from tests.integrations.with_transformers import (
    SCHEDULE,
    STEPS,
    At,
    Crashed,
    Truth,
    bert,
    crash,
    equal,
    examples,
    make,
    same_state,
    tensors,
)
from tests.test_imports import WITHOUT

pytestmark = pytest.mark.usefixtures("one_thread")


def loss_of(model) -> float:
    """What `evaluate` should find, computed by hand."""
    batch = {
        "input_ids": torch.stack([one["input_ids"] for one in examples()]),
        "labels": torch.tensor([one["labels"] for one in examples()]),
    }
    with torch.no_grad():
        return float(model.eval()(**batch).loss)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_ema_is_the_float64_average_over_the_optimizer_steps(tmp_path, accumulation) -> None:
    trainer = make(tmp_path, gradient_accumulation_steps=accumulation, max_grad_norm=0.1)
    truth = Truth()
    trainer.add_callback(truth)
    attached = attach(trainer, SCHEDULE)
    trainer.train()
    assert isinstance(attached.ema, ModelEMA)
    assert attached.ema.model is trainer.model
    assert attached.ema.update_index == trainer.state.global_step == truth.steps == STEPS
    truth.check(dict(attached.ema.ema_model.named_parameters()))
    assert not equal(tensors(attached.ema.ema_model), tensors(trainer.model))


@pytest.mark.integration
def test_the_truth_can_fail(tmp_path) -> None:
    trainer = make(tmp_path, save_strategy="no")
    truth = Truth(Constant(0.3))
    trainer.add_callback(truth)
    attached = attach(trainer, SCHEDULE)
    trainer.train()
    with pytest.raises(AssertionError, match="exceeds its bound"):
        truth.check(dict(attached.ema.ema_model.named_parameters()))


def test_evaluate_and_predict_see_the_ema_during_and_after_the_training(tmp_path) -> None:
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="no")
    attached = attach(trainer, SCHEDULE)
    expected, online = [], []

    def note() -> None:
        expected.append(loss_of(attached.ema.ema_model))
        online.append(loss_of(copy.deepcopy(trainer.model)))

    for step in (2, 4, 6):
        trainer.add_callback(At(step, note))
    trainer.train()
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert found == pytest.approx(expected, rel=1e-6)
    assert all(abs(a - b) > 1e-3 for a, b in zip(expected, online, strict=True))
    before = tensors(trainer.model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected[-1], rel=1e-6)
    predicted = torch.from_numpy(trainer.predict(examples()).predictions)
    with torch.no_grad():
        ids = torch.stack([one["input_ids"] for one in examples()])
        torch.testing.assert_close(predicted, attached.ema.ema_model(ids).logits)
    assert equal(tensors(trainer.model), before)


@pytest.mark.integration
def test_several_eval_sets_and_eval_on_start(tmp_path) -> None:
    sets = {"one": examples(), "two": examples(8)}
    trainer = make(
        tmp_path, of_trainer={"eval_dataset": sets}, eval_on_start=True, save_strategy="no"
    )
    attached = attach(trainer, SCHEDULE)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_one_loss"] == pytest.approx(loss_of(attached.ema.ema_model), rel=1e-6)
    assert "eval_two_loss" in metrics


@pytest.mark.parametrize("error", [Crashed, KeyboardInterrupt])
def test_an_exception_in_an_evaluation_leaves_the_online_weights(tmp_path, error) -> None:
    seen = []

    def fail(_):
        seen.append(tensors(trainer.model))
        raise error

    trainer = make(
        tmp_path,
        of_trainer={"compute_metrics": fail},
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="no",
    )
    attached = attach(trainer, SCHEDULE)
    noted = []
    trainer.add_callback(At(4, lambda: noted.append(tensors(trainer.model))))
    with pytest.raises(error):
        trainer.train()
    ema = tensors(attached.ema.ema_model)
    assert equal(seen[0], ema)
    assert not equal(seen[0], noted[0])
    assert equal(tensors(trainer.model), noted[0])
    with pytest.raises(error):
        trainer.evaluate()
    assert equal(seen[1], ema)
    assert equal(tensors(trainer.model), noted[0])
    trainer.compute_metrics = None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of(attached.ema.ema_model), 1e-6)


@pytest.mark.integration
def test_an_evaluation_inside_an_evaluation_sees_the_ema_too(tmp_path) -> None:
    def predict_more(_):
        trainer.compute_metrics = None
        inner = trainer.predict(examples()).metrics["test_loss"]
        return {"inner": inner}

    trainer = make(tmp_path, save_strategy="no", of_trainer={"compute_metrics": predict_more})
    attached = attach(trainer, SCHEDULE)
    trainer.train()
    before = tensors(trainer.model)
    metrics = trainer.evaluate()
    assert metrics["eval_inner"] == pytest.approx(metrics["eval_loss"])
    assert metrics["eval_loss"] == pytest.approx(loss_of(attached.ema.ema_model), rel=1e-6)
    assert equal(tensors(trainer.model), before)


def test_before_the_training_there_is_no_ema_and_evaluate_sees_the_model(tmp_path) -> None:
    trainer = make(tmp_path, save_strategy="no")
    attached = attach(trainer, SCHEDULE)
    with pytest.raises(RuntimeError, match=r"no EMA before trainer\.train\(\).*into a ModelEMA"):
        _ = attached.ema
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of(trainer.model), rel=1e-6)
    trainer.train()
    assert attached.ema.update_index == STEPS


@pytest.mark.integration
def test_another_model_put_into_the_trainer_is_evaluated_as_it_is(tmp_path) -> None:
    trainer = make(tmp_path, save_strategy="no")
    attach(trainer, SCHEDULE)
    trainer.train()
    trainer.model = trainer.model_wrapped = bert()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of(trainer.model), rel=1e-6)


def test_steps_that_a_scaler_skips_make_no_update(tmp_path) -> None:
    """As with fp16, which takes a GPU: accelerate's optimizer asks its scaler to step."""

    class Scaler:
        def __init__(self) -> None:
            self.calls = 0

        def step(self, optimizer, closure=None) -> None:
            self.calls += 1
            if self.calls % 3:
                optimizer.step()

        def update(self) -> None: ...

    def give_a_scaler() -> None:
        from accelerate.optimizer import patch_optimizer_step

        optimizer, optimizer.scaler = trainer.optimizer, Scaler()
        optimizer._accelerate_step_called = False
        optimizer._optimizer_original_step_method = optimizer.optimizer.step
        optimizer._optimizer_patched_step_method = patch_optimizer_step(
            optimizer, optimizer.optimizer.step
        )

    trainer = make(tmp_path, max_steps=7, save_strategy="no")
    attached = attach(trainer, SCHEDULE)
    trainer.add_callback(At(1, give_a_scaler))
    trainer.train()
    assert trainer.state.global_step == 7
    assert attached.ema.update_index == 1 + 4


def test_a_training_that_failed_can_be_begun_again(tmp_path) -> None:
    trainer = make(tmp_path, save_strategy="no")
    failing = At(3, crash)
    trainer.add_callback(failing)
    attached = attach(trainer, SCHEDULE)
    with pytest.raises(Crashed):
        trainer.train()
    assert attached.ema.update_index == 3
    trainer.optimizer.step()  # of the user's own loop: it belongs to no training
    assert attached.ema.update_index == 3
    trainer.remove_callback(failing)
    trainer.train()
    assert attached.ema.update_index == 3 + STEPS


@pytest.mark.integration
def test_a_second_training_goes_on_with_the_ema(tmp_path) -> None:
    trainer = make(tmp_path, save_strategy="no")
    attached = attach(trainer, SCHEDULE)
    trainer.train()
    first = attached.ema
    trainer.train()
    assert attached.ema is first
    assert first.update_index == 2 * STEPS


def test_each_training_of_a_new_model_has_a_new_ema(tmp_path) -> None:
    trainer = make(tmp_path, of_trainer={"model_init": bert}, save_strategy="no")
    truth = Truth()
    trainer.add_callback(truth)
    attached = attach(trainer, SCHEDULE)
    for _ in range(2):
        truth.steps = 0
        trainer.train()
        assert attached.ema.model is trainer.model
        assert attached.ema.update_index == STEPS
        truth.check(dict(attached.ema.ema_model.named_parameters()))


@pytest.mark.integration
def test_a_smaller_batch_found_after_a_lack_of_memory_is_followed(tmp_path) -> None:
    class Large(Trainer):
        def training_step(self, model, inputs, *rest):
            if len(inputs["labels"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *rest)

    trainer = make(
        tmp_path,
        kind=Large,
        auto_find_batch_size=True,
        per_device_train_batch_size=8,
        save_strategy="no",
    )
    attached = attach(trainer, SCHEDULE)
    trainer.train()
    assert attached.ema.update_index == trainer.state.global_step == STEPS


class Overriding(Trainer):
    """As people override a Trainer, with `super()` and without a thought of an EMA."""

    calls: tuple[str, ...] = ()

    def train(self, *args, **kwargs):
        self.calls += ("train",)
        return super().train(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        self.calls += ("evaluation_loop",)
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_own"] = loss_of(copy.deepcopy(self.model))
        return output

    def save_model(self, output_dir=None, _internal_call=False):
        self.calls += ("save_model",)
        super().save_model(output_dir, _internal_call)


def test_what_a_subclass_overrides_still_runs_and_sees_the_ema(tmp_path) -> None:
    trainer = make(tmp_path, kind=Overriding)
    attached = attach(trainer, SCHEDULE)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_own"] == pytest.approx(loss_of(attached.ema.ema_model), rel=1e-6)
    assert trainer.calls == ("train", "save_model", "save_model", "save_model", "evaluation_loop")
    assert (tmp_path / "checkpoint-6/ema.pt").is_file()


@pytest.mark.integration
def test_what_others_put_on_the_trainer_still_runs(tmp_path) -> None:
    trainer = make(tmp_path, save_strategy="no")
    calls = []

    def loop(self, *args, **kwargs):
        calls.append(tensors(self.model))
        return Trainer.evaluation_loop(self, *args, **kwargs)

    trainer.evaluation_loop = types.MethodType(loop, trainer)
    attached = attach(trainer, SCHEDULE)
    trainer.train()
    trainer.evaluate()
    assert len(calls) == 1
    assert equal(calls[0], tensors(attached.ema.ema_model))


@pytest.mark.integration
def test_the_older_loop_for_evaluations_sees_the_ema(tmp_path) -> None:
    """`prediction_loop`, to which transformers 4 goes with use_legacy_prediction_loop=True."""

    class Older(Trainer):
        def prediction_loop(self, *args, **kwargs):
            return super().evaluation_loop(*args, **kwargs)

        def evaluate(self, *_):
            return self.prediction_loop(self.get_eval_dataloader(), "Evaluation").metrics

    trainer = make(tmp_path, kind=Older, save_strategy="no")
    attached = attach(trainer, SCHEDULE)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(loss_of(attached.ema.ema_model), rel=1e-6)


@pytest.mark.integration
def test_a_trainer_can_be_pickled_and_its_copy_trains_an_ema_of_its_own(tmp_path) -> None:
    GradientState._reset_state()  # of other tests' trainings, which it refers to weakly
    trainer = make(tmp_path, save_strategy="no")
    attached = attach(trainer, SCHEDULE)
    twin = pickle.loads(pickle.dumps(trainer))
    twin.train()
    (its,) = [one for one in twin.callback_handler.callbacks if isinstance(one, type(attached))]
    assert its is not attached
    assert its.ema.model is twin.model
    assert its.ema.update_index == STEPS
    assert twin.evaluate()["eval_loss"] == pytest.approx(loss_of(its.ema.ema_model), rel=1e-6)
    with pytest.raises(RuntimeError, match="no EMA before"):
        _ = attached.ema


@pytest.mark.integration
def test_a_trained_trainer_can_be_copied(tmp_path) -> None:
    trainer = make(tmp_path, save_strategy="no")
    attached = attach(trainer, SCHEDULE)
    trainer.train()
    twin = copy.deepcopy(trainer)
    (its,) = [one for one in twin.callback_handler.callbacks if isinstance(one, type(attached))]
    assert its.ema.model is twin.model
    assert twin.evaluate()["eval_loss"] == pytest.approx(loss_of(its.ema.ema_model), rel=1e-6)
    its.ema.ema_model.classifier.weight.data.zero_()
    assert attached.ema.ema_model.classifier.weight.abs().sum() > 0


@pytest.mark.parametrize("remove", ["remove_callback", "pop_callback"])
def test_removed_from_the_callbacks_it_does_nothing_and_another_can_be_attached(
    tmp_path, remove
) -> None:
    trainer = make(tmp_path, save_steps=STEPS)
    first = attach(trainer, SCHEDULE)
    trainer.train()
    getattr(trainer, remove)(first)
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of(trainer.model), rel=1e-6)
    trainer.train()
    assert first.ema.update_index == STEPS
    assert not (tmp_path / "checkpoint-6/ema.pt").exists()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of(trainer.model), rel=1e-6)

    second = attach(trainer, HalfLife(3))
    truth = Truth(HalfLife(3))
    trainer.add_callback(truth)
    trainer.train()
    truth.check(dict(second.ema.ema_model.named_parameters()))
    expected = loss_of(second.ema.ema_model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    saved = torch.load(tmp_path / "checkpoint-6/ema.pt", weights_only=True)
    assert same_state(saved, second.ema.state_dict())
    assert first.ema.update_index == STEPS


@pytest.mark.integration
def test_an_evaluation_inside_a_swap_of_ones_own_sees_the_ema(tmp_path) -> None:
    trainer = make(tmp_path, save_strategy="no")
    attached = attach(trainer, SCHEDULE)
    trainer.train()
    online = tensors(trainer.model)
    with attached.ema.swapped():
        loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(loss_of(attached.ema.ema_model), rel=1e-6)
    assert equal(tensors(trainer.model), online)


def test_attached_twice_is_an_error(tmp_path) -> None:
    trainer = make(tmp_path)
    attach(trainer, SCHEDULE)
    with pytest.raises(RuntimeError, match=r"has an EMA already.*what the first attach\(\) retur"):
        attach(trainer, HalfLife(10))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"decay": 0.999}, TypeError, "unexpected keyword argument 'decay'"),
        ({"model": bert()}, TypeError, "unexpected keyword argument 'model'"),
        ({"precision": "high"}, ValueError, "precision can only be one of"),
        ({"handle_buffers": "average"}, ValueError, "handle_buffers can only be one of"),
        ({"seed": -1}, ValueError, "seed must be"),
    ],
)
def test_wrong_options_are_errors_of_attach(tmp_path, options, error, text) -> None:
    trainer = make(tmp_path, save_strategy="no")
    with pytest.raises(error, match=text):
        attach(trainer, SCHEDULE, **options)
    attach(trainer, SCHEDULE)  # nothing of the first call is left


def test_a_schedule_that_is_none_and_a_trainer_that_is_none_are_errors(tmp_path) -> None:
    with pytest.raises(TypeError, match="schedule"):
        attach(make(tmp_path), 0.1)
    with pytest.raises(TypeError, match="must be a transformers Trainer, but got BertForSequence"):
        attach(bert(), SCHEDULE)


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout


IMPORT = """
try:
    import ema_triton.integrations.transformers
except ImportError as error:
    print(error)
"""


def test_without_transformers_the_import_says_what_to_do() -> None:
    found = run(WITHOUT.format(names=("transformers",)) + IMPORT)
    assert "pip install --upgrade 'transformers[torch]>=4.50'" in found
    assert "ema_triton.ModelEMA" in found


@pytest.mark.integration
def test_with_an_old_transformers_the_import_says_what_to_do() -> None:
    old = """
import sys, types
old = types.ModuleType("transformers")
old.__version__, old.Trainer, old.TrainerCallback = "4.9.2", object, object
sys.modules["transformers"] = old
"""
    found = run(old + IMPORT)
    assert "version 4.9.2 is older than 4.50" in found
    assert "pip install --upgrade 'transformers[torch]>=4.50'" in found


def test_the_adapter_imports_no_other_framework() -> None:
    tree = ast.parse(Path(adapter.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {
        one.name for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names
    }
    packages = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert packages == {"ema_triton", "torch", "transformers", "typing_extensions"}


def test_the_example_of_attach() -> None:
    result = doctest.testmod(adapter)
    assert result.attempted > 0
    assert result.failed == 0
