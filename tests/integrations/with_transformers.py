"""Tiny models and trainers of transformers, on the CPU, and the float64 truth beside a training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from ema_triton.schedules import LinearWarmup, Schedule
from tests.oracle import Shadow
from tests.tolerances import assert_update, update_bound

disable_progress_bar()

SCHEDULE = LinearWarmup(0.5, 0.1, warmup_iters=4)
STEPS = 6


def bert() -> BertForSequenceClassification:
    """A new model, always the same. It has dropout, for which resuming needs the random state."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    return BertForSequenceClassification(config)


def examples(count: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(16, (count, 6), generator=generator)
    return [{"input_ids": one, "labels": int(one[0]) % 2} for one in ids]


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    defaults = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 24,
        "max_steps": STEPS,
        "learning_rate": 0.05,
        "save_steps": 2,
    }
    return TrainingArguments(str(folder), **{**defaults, **given})


def make(
    folder: Path,
    model: nn.Module | None = None,
    *,
    kind: type[Trainer] = Trainer,
    of_trainer: Mapping[str, Any] | None = None,
    **given: Any,
) -> Trainer:
    """A trainer of a new model, as each run of a script makes one."""
    own = {"train_dataset": examples(), "eval_dataset": examples(), **(of_trainer or {})}
    if model is None and "model_init" not in own:
        model = bert()
    return kind(model, arguments(folder, **given), **own)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters and buffers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two have the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_state(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two states of an EMA are the same, bit for bit."""
    plain = [{k: v for k, v in s.items() if not isinstance(v, Mapping)} for s in (one, other)]
    return plain[0] == plain[1] and all(
        equal(one[name], other[name]) for name in ("weights", "residuals")
    )


class Truth(TrainerCallback):
    """A float64 EMA of the parameters after every optimizer step, and how many there were."""

    def __init__(self, schedule: Schedule = SCHEDULE) -> None:
        self.schedule, self.steps = schedule, 0
        self.shadow: Shadow | None = None
        self.largest: dict[str, Tensor] = {}

    def on_train_begin(self, args, state, control, *, model, **_):
        self.shadow = Shadow(dict(model.named_parameters()))
        self.largest = {name: value.detach().abs() for name, value in model.named_parameters()}

    def on_step_end(self, args, state, control, *, model, **_):
        self.steps += 1
        self.shadow.update(dict(model.named_parameters()), self.schedule(self.steps))
        for name, value in model.named_parameters():
            self.largest[name] = torch.maximum(self.largest[name], value.detach().abs())

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """As many times the bound of one update as there were updates."""
        assert self.steps > 0
        for name, value in self.shadow.values.items():
            largest = self.largest[name]
            bound = self.steps * update_bound(largest, largest, weights[name].dtype)
            assert_update(weights[name].detach(), value, bound)


class At(TrainerCallback):
    """Calls a function at the end of one step."""

    def __init__(self, step: int, function) -> None:
        self.step, self.function = step, function

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.function()


class Crashed(Exception):  # noqa: N818  # which is what has happened
    """A training that ended in the middle."""


def crash() -> None:
    raise Crashed
