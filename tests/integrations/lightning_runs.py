"""Small trainings in Lightning, the same however often they are interrupted."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ema_triton import Constant, LinearWarmup
from ema_triton.integrations.lightning import EMACallback
from tests.oracle import Shadow

BATCHES = 5  # per epoch: neither 2 nor 3 divides it
WARMUP = LinearWarmup(0.9, 0.1, 6)
MARKS = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]
EPS = torch.finfo(torch.float32).eps


class SigintError(Exception):
    """Stands for a real Ctrl-C."""


class Net(pl.LightningModule):
    """Its data follow from epoch and batch index alone, so that a resumed run sees the same."""

    def __init__(self, width: int = 8, compiled: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.head = nn.Linear(1, 1)
        if compiled:
            self.net = torch.compile(self.net, backend="eager")
        self.seen: dict[str, list[dict[str, Tensor]]] = {}
        self.fail_in: dict[str, BaseException] = {}

    def loss(self, stage: str, number: int) -> Tensor:
        if stage != "train":
            self.seen.setdefault(stage, []).append(weights(self))
        if isinstance(self.fail_in.get(stage), SigintError):
            signal.raise_signal(signal.SIGINT)
        if stage in self.fail_in:
            raise self.fail_in[stage]
        chance = torch.Generator().manual_seed(number)
        dtype = self.head.weight.dtype
        x, y = torch.randn(6, 4, generator=chance), torch.randn(6, 1, generator=chance)
        return (self.head(self.net(x.to(dtype))) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss("train", 100 * self.current_epoch + batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        stage = "sanity" if self.trainer.sanity_checking else "validate"
        self.log("val_loss", self.loss(stage, 1000 + batch_idx))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss("test", 2000 + batch_idx))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss("predict", 3000 + batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Oracle(pl.Callback):
    """The EMA in float64, updated whenever the online weights have changed."""

    def __init__(self, schedule: Any = WARMUP) -> None:
        self.schedule, self.updates = schedule, 0
        self.shadow: Shadow | None = None
        self.before: dict[str, Tensor] = {}
        self.online: list[dict[str, Tensor]] = []  # after each batch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before = parameters(pl_module)
        self.shadow = self.shadow or Shadow(self.before)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        now = parameters(pl_module)
        self.online.append(weights(pl_module))
        if not same(now, self.before):
            self.updates += 1
            self.shadow.update(now, self.schedule(self.updates))
        self.before = now

    def check(self, ema: dict[str, Tensor]) -> None:
        """Within one rounding per update of the largest value on the way."""
        for name, truth in self.shadow.values.items():
            largest = max(online[name].abs().max().item() for online in self.online)
            bound = self.updates * EPS * max(largest, truth.abs().max().item())
            assert (ema[name].double() - truth).abs().max() <= bound, name


class Save(pl.Callback):
    """A checkpoint after each batch, by number."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.count += 1
        trainer.save_checkpoint(self.folder / f"{self.count}.ckpt")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def ema_weights(callback: EMACallback) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in callback.ema.state_dict()["weights"].items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def same_state(one: EMACallback, other: EMACallback) -> bool:
    """Bit for bit, residuals too."""
    a, b = one.ema.state_dict(), other.ema.state_dict()
    tensors = ("weights", "residuals")
    return all(same(a[part], b[part]) for part in tensors) and all(
        a[key] == b[key] for key in a if key not in tensors
    )


def callback(schedule: Any = WARMUP, **options: Any) -> EMACallback:
    return EMACallback(schedule, **options)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    options = {"max_epochs": 2, "enable_checkpointing": False, **options}
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
        **options,
    )


def batches(count: int = BATCHES) -> DataLoader:
    return DataLoader(torch.arange(count).float(), batch_size=1)


def fit(
    model: pl.LightningModule, *callbacks: pl.Callback, ckpt_path: Any = None, **options: Any
) -> pl.Trainer:
    made = trainer(*callbacks, **options)
    made.fit(model, batches(), batches(2), ckpt_path=ckpt_path)
    return made


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


CONSTANT = Constant(0.1)
