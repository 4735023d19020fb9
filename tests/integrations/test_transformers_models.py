"""`attach` to Trainers of other kinds: LoRA, mixed precision, tied weights, odd optimizers."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from ema_triton import Constant, ModelEMA
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

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft asks transformers for what that has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def adapted(peft):
    """A BERT with adapters, and the classifier trained whole, as peft has it by default."""
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    return peft.get_peft_model(bert(), config)


LORA = {"include": ["*lora_*", "*modules_to_save*"], "as_module": False}


def is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def test_of_lora_only_the_adapter_is_averaged_and_swapped(tmp_path, peft) -> None:
    trainer = make(tmp_path, adapted(peft))
    truth = Truth()
    trainer.add_callback(truth)
    attached = attach(trainer, SCHEDULE, **LORA)
    trainer.train()
    weights = attached.ema.state_dict()["weights"]
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert weights.keys() == trained
    assert all(map(is_adapter, trained))
    truth.shadow.values = {n: v for n, v in truth.shadow.values.items() if n in trained}
    truth.check(weights)
    saved = torch.load(tmp_path / "checkpoint-6/ema.pt", weights_only=True)
    assert equal(saved["weights"], weights)
    averaged = copy.deepcopy(trainer.model)
    averaged.load_state_dict(weights, strict=False)
    batch = {"input_ids": torch.stack([one["input_ids"] for one in examples()])}
    with torch.no_grad():
        expected, online = averaged.eval()(**batch).logits, trainer.model.eval()(**batch).logits
    before = tensors(trainer.model)
    found = torch.from_numpy(trainer.predict(examples()).predictions)
    torch.testing.assert_close(found, expected)
    assert (found - online).abs().max() > 1e-3
    assert equal(tensors(trainer.model), before)


def test_lora_resumes_bit_for_bit(tmp_path, peft) -> None:
    states = []
    for folder, crashes in (("whole", False), ("run", True)):
        trainer = make(tmp_path / folder, adapted(peft))
        attached = attach(trainer, SCHEDULE, **LORA)
        if crashes:
            trainer.add_callback(At(5, crash))
            with pytest.raises(Crashed):
                trainer.train()
            trainer = make(tmp_path / folder, adapted(peft))
            attached = attach(trainer, SCHEDULE, **LORA)
        trainer.train(resume_from_checkpoint=True if crashes else None)
        states.append((attached.ema.state_dict(), tensors(trainer.model)))
    assert same_state(states[0][0], states[1][0])
    assert equal(states[0][1], states[1][1])


@pytest.mark.integration
def test_the_ema_of_an_adapter_is_saved_by_save_model_and_loaded_by_peft(tmp_path, peft) -> None:
    trainer = make(tmp_path, adapted(peft), save_strategy="no")
    attached = attach(trainer, SCHEDULE, **LORA)
    trainer.train()
    attached.ema.copy_to(trainer.model)
    trainer.save_model(str(tmp_path / "averaged"))
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "averaged")
    found = {name: value for name, value in tensors(loaded).items() if is_adapter(name)}
    assert equal(found, attached.ema.state_dict()["weights"])


@pytest.mark.integration
def test_the_best_checkpoint_of_an_adapter(tmp_path, peft) -> None:
    scores = iter([2.0, 1.0, 1.0])
    trainer = make(
        tmp_path,
        adapted(peft),
        of_trainer={"compute_metrics": lambda _: {"score": next(scores)}},
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    attached = attach(trainer, SCHEDULE, **LORA)
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-2/ema.pt", weights_only=True)
    assert attached.ema.update_index == 2
    assert equal(attached.ema.state_dict()["weights"], saved["weights"])


@pytest.mark.integration
def test_a_whole_model_beside_an_adapter_is_a_module_that_can_be_saved(tmp_path, peft) -> None:
    trainer = make(tmp_path, adapted(peft), save_strategy="no")
    attached = attach(trainer, SCHEDULE, include=LORA["include"])
    trainer.train()
    attached.ema.ema_model.save_pretrained(tmp_path / "averaged")
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "averaged")
    assert equal(tensors(loaded), tensors(attached.ema.ema_model))


def test_tied_weights_are_averaged_once_and_saved_loadable(tmp_path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    data = [{"input_ids": one["input_ids"], "labels": one["input_ids"]} for one in examples()]
    trainer = make(
        tmp_path,
        GPT2LMHeadModel(config),
        of_trainer={"train_dataset": data, "eval_dataset": data},
        save_strategy="no",
    )
    truth = Truth()
    trainer.add_callback(truth)
    attached = attach(trainer, SCHEDULE)
    trainer.train()
    ema_model = attached.ema.ema_model
    truth.check(dict(ema_model.named_parameters()))
    assert ema_model.lm_head.weight is ema_model.transformer.wte.weight
    ema_model.save_pretrained(tmp_path / "averaged")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "averaged")
    assert equal(tensors(loaded), tensors(ema_model))


class Plain(nn.Module):
    """No model of transformers, with a batch norm's buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, input_ids, labels=None):
        logits = self.body(input_ids.float())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@pytest.mark.integration
@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
def test_any_module_with_buffers_trains_and_resumes(tmp_path, handle_buffers) -> None:
    states = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        trainer = make(tmp_path, Plain())
        attached = attach(trainer, SCHEDULE, handle_buffers=handle_buffers)
        trainer.train(resume_from_checkpoint=resume)
        states.append(attached.ema.state_dict())
    assert same_state(*states)
    norm = attached.ema.ema_model.body[1]
    same = torch.equal(norm.running_mean, trainer.model.body[1].running_mean)
    assert same == (handle_buffers == "copy")
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.integration
@pytest.mark.parametrize(
    "given",
    [
        {"bf16": True},  # accelerate replaces the model's forward
        {"neftune_noise_alpha": 5.0},  # a hook on the embeddings
        {"bf16": True, "activation_checkpointing": True},
    ],
    ids=lambda given: "+".join(given),
)
def test_what_a_trainer_does_to_a_model_does_not_stay_on_the_emas(tmp_path, given) -> None:
    trainer = make(tmp_path, save_strategy="no", **given)
    truth = Truth()
    trainer.add_callback(truth)
    attached = attach(trainer, SCHEDULE)
    trainer.train()
    ema_model = attached.ema.ema_model
    truth.check(dict(ema_model.named_parameters()))
    ema_model.save_pretrained(tmp_path / "averaged")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "averaged").eval()
    assert equal(tensors(loaded), tensors(ema_model))
    ids = torch.stack([one["input_ids"] for one in examples()])
    predicted = torch.from_numpy(trainer.predict(examples()).predictions)
    with torch.no_grad():
        tolerance = 0.02 if "bf16" in given else 1e-6
        torch.testing.assert_close(predicted, loaded(ids).logits, rtol=0.02, atol=tolerance)
        torch.testing.assert_close(ema_model(ids).logits, predicted)


@pytest.mark.integration
def test_an_evaluation_in_bf16_casts_the_ema_and_leaves_the_online_model_in_fp32(tmp_path) -> None:
    trainer = make(tmp_path, save_strategy="no", bf16_full_eval=True)
    attached = attach(trainer, SCHEDULE)
    trainer.train()
    before, ema = tensors(trainer.model), tensors(attached.ema.ema_model)
    with pytest.warns(UserWarning, match="was written, or replaced"):
        found = torch.from_numpy(trainer.predict(examples()).predictions)
    ids = torch.stack([one["input_ids"] for one in examples()])
    with torch.no_grad():
        expected = copy.deepcopy(attached.ema.ema_model).bfloat16()(ids).logits.float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    assert equal(tensors(trainer.model), before)
    assert equal(tensors(attached.ema.ema_model), ema)


class ScheduleFree(torch.optim.SGD):
    """Schedule-free SGD: the model has y in training, and the average x in an evaluation."""

    beta, trains = 0.5, True

    def _move(self, weight: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if "z" in self.state[parameter]:
                    parameter.data.lerp_(self.state[parameter]["z"], weight)

    def eval(self) -> None:
        if self.trains:
            self.trains = False
            self._move(1 - 1 / self.beta)

    def train(self) -> None:
        if not self.trains:
            self.trains = True
            self._move(1 - self.beta)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert self.trains
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("z", parameter.detach().clone())
                state["t"] = state.get("t", 0) + 1
                if parameter.grad is None:
                    continue
                parameter.lerp_(state["z"], 1 / state["t"])
                parameter.sub_(parameter.grad, alpha=group["lr"] * 0.1)
                state["z"].sub_(parameter.grad, alpha=group["lr"])


def test_a_schedule_free_optimizer_writes_its_own_average_outside_of_the_swap(tmp_path) -> None:
    """Its `eval()`, which evaluations call, would write into the EMA, and spoil the training."""
    results = []
    for evaluates in ("no", "steps"):
        model = Plain()  # without dropout, as an evaluation's loader draws a random number
        optimizer = ScheduleFree(model.parameters(), lr=0.05)
        trainer = make(
            tmp_path,
            model,
            of_trainer={"optimizers": (optimizer, None)},
            save_strategy="no",
            eval_strategy=evaluates,
            eval_steps=2,
        )
        attached = attach(trainer, SCHEDULE)
        trainer.train()
        optimizer.train()
        results.append((tensors(attached.ema.ema_model), tensors(trainer.model)))
    for without, evaluated in zip(*results, strict=True):
        for name, value in without.items():
            torch.testing.assert_close(evaluated[name], value, rtol=1e-5, atol=1e-6)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.integration
@pytest.mark.parametrize(
    ("of_trainer", "of_ema", "text"),
    [
        pytest.param(
            {"optimizers": (torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), None)},
            {},
            "has none of this model's parameters",
            id="optimizer of other parameters",
        ),
        pytest.param({}, {"include": "*lora_*"}, "lora_", id="include that matches nothing"),
    ],
)
def test_what_cannot_be_averaged_is_an_error_before_the_first_step(
    of_trainer: dict, of_ema: dict, text: str, tmp_path
) -> None:
    trainer = make(tmp_path, of_trainer=of_trainer, save_strategy="no")
    attach(trainer, SCHEDULE, **of_ema)
    with pytest.raises(ValueError, match=text):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.integration
def test_a_given_ema_model_is_used(tmp_path) -> None:
    trainer = make(tmp_path, save_strategy="no")
    own = bert()
    attached = attach(trainer, Constant(1.0), ema_model=own, nonfinite="skip")
    trainer.train()
    assert attached.ema.ema_model is own
    assert equal(tensors(own), tensors(trainer.model))
    assert attached.ema.nonfinite_count() == 0
    assert isinstance(attached.ema, ModelEMA)
    assert attached.ema.update_index == STEPS
