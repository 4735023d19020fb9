"""Train a small convolutional net on handwritten digits, with an EMA of its weights.

The learning rate is deliberately high, so that the online model's accuracy jumps about from epoch
to epoch; the EMA model's does not. Ctrl-C stops the training, and --resume continues it.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, ProgressBar, global_step_from_engine
from ignite.metrics import Accuracy
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ema_triton import EMAHandler

BATCH_SIZE = 16
LEARNING_RATE = 0.5
INPUT_NOISE = 0.4  # standard deviation; the pixels are in [0, 1]


@dataclass
class History:
    """What the picture shows; it is in the checkpoints, so a resumed run draws all of it."""

    online: list[float] = field(default_factory=list)  # validation accuracy after each epoch
    ema: list[float] = field(default_factory=list)
    momentum: list[float] = field(default_factory=list)  # of each update

    def state_dict(self) -> dict[str, list[float]]:
        """Return the history as plain lists."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take over the lists that `state_dict` returned."""
        self.online, self.ema, self.momentum = state["online"], state["ema"], state["momentum"]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small net on handwritten digits, with an EMA of its weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where to train")
    parser.add_argument("--epochs", type=int, default=12, help="epochs in all")
    parser.add_argument("--backend", choices=("auto", "triton", "foreach"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise")
    parser.add_argument(
        "--output", type=Path, default=Path("digits_run"), help="folder of checkpoints and picture"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in --output"
    )
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"argument --epochs: must be at least 1, but is {args.epochs}")
    if args.resume and newest_checkpoint(args.output) is None:
        parser.error(f"argument --resume: there is no checkpoint in {args.output}")
    args.others = [
        f"--{name}={getattr(args, name)}"
        for name in ("device", "backend", "seed", "output")
        if getattr(args, name) != parser.get_default(name)
    ]
    return args


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that was written last, if there is one."""
    checkpoints = folder.glob("checkpoint_*.pt")
    return max(checkpoints, key=lambda path: path.stat().st_mtime_ns, default=None)


def load_data() -> tuple[DataLoader, DataLoader]:
    """Return 1078 digits for training and 719 for validation, always the same ones."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.4, stratify=labels, random_state=0)
    train_images, valid_images = (
        torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for part in split[:2]
    )
    train_labels, valid_labels = (torch.tensor(part) for part in split[2:])
    return (
        DataLoader(TensorDataset(train_images, train_labels), BATCH_SIZE, shuffle=True),
        DataLoader(TensorDataset(valid_images, valid_labels), batch_size=256),
    )


def make_model() -> nn.Module:
    """Return a net of two convolutions with BatchNorm, 10 thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def noisy_batch(batch: Sequence[Tensor], device: str, non_blocking: bool) -> tuple[Tensor, Tensor]:
    """Move a batch to the device and add noise to its images."""
    images, labels = (part.to(device, non_blocking=non_blocking) for part in batch)
    return images + INPUT_NOISE * torch.randn_like(images), labels


def draw(history: History, path: Path) -> None:
    """Draw the accuracies of both models and, beneath, the momentum."""
    epochs = range(1, len(history.online) + 1)
    updates_per_epoch = len(history.momentum) / len(history.online)
    updates = [index / updates_per_epoch for index in range(1, len(history.momentum) + 1)]

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    above, beneath = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.plot(epochs, history.online, marker="o", color="tab:orange", label="online model")
    above.plot(epochs, history.ema, marker="o", color="tab:blue", label="EMA model")
    above.set_ylabel("validation accuracy")
    above.legend(loc="lower right")
    beneath.plot(updates, history.momentum, color="tab:gray")
    beneath.set_yscale("log")
    beneath.set_ylabel("momentum")
    beneath.set_xlabel("epoch")
    beneath.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, beneath):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def train(args: argparse.Namespace) -> None:
    """Train, or go on training, up to `args.epochs`; then draw the picture."""
    torch.manual_seed(args.seed)
    train_loader, valid_loader = load_data()
    model = make_model().to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    trainer = create_supervised_trainer(
        model, optimizer, nn.CrossEntropyLoss(), args.device, prepare_batch=noisy_batch
    )

    # The warm-up, three epochs long: at first the EMA follows quickly, then it smooths.
    handler = EMAHandler(
        model, momentum=0.01, momentum_warmup=0.2, warmup_iters=200, backend=args.backend
    )
    handler.attach(trainer)
    print(f"EMA backend: {handler.ema.backend} ({handler.ema.backend_reason})")

    metrics = {"accuracy": Accuracy()}
    online_evaluator = create_supervised_evaluator(model, metrics, args.device)
    ema_evaluator = create_supervised_evaluator(handler.ema_model, metrics, args.device)
    bar = ProgressBar()
    if sys.stdout.isatty() and sys.stderr.isatty():  # in a log, each of its steps would be a line
        bar.attach(trainer, output_transform=lambda loss: {"loss": loss})
    history = History()

    @trainer.on(Events.EPOCH_STARTED)
    def seed_epoch(engine: Engine) -> None:
        # Batches and noise depend on the epoch alone: a resumed run sees those it would have seen.
        torch.manual_seed(1000 * args.seed + engine.state.epoch)

    @trainer.on(Events.ITERATION_COMPLETED)
    def record_momentum(engine: Engine) -> None:
        history.momentum.append(engine.state.ema_momentum)

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate(engine: Engine) -> None:
        history.online.append(online_evaluator.run(valid_loader).metrics["accuracy"])
        history.ema.append(ema_evaluator.run(valid_loader).metrics["accuracy"])
        bar.log_message(
            f"epoch {engine.state.epoch:3d}   online {history.online[-1]:.4f}   "
            f"EMA {history.ema[-1]:.4f}   momentum {engine.state.ema_momentum:.4f}"
        )
        sys.stdout.flush()  # into a pipe too

    to_save = {
        "model": model,
        "optimizer": optimizer,
        "trainer": trainer,
        "ema": handler,
        "history": history,
    }
    if args.resume:
        path = newest_checkpoint(args.output)
        checkpoint = torch.load(path, map_location=args.device, weights_only=True)
        Checkpoint.load_objects(to_save, checkpoint)
        print(f"resumed from {path}")

    # Two are kept, because Ignite deletes the older one before it writes the new one.
    checkpointer = Checkpoint(
        to_save,
        DiskSaver(args.output, atomic=True, require_empty=False),
        n_saved=2,
        global_step_transform=global_step_from_engine(trainer, Events.EPOCH_COMPLETED),
    )
    trainer.add_event_handler(Events.STARTED | Events.EPOCH_COMPLETED, checkpointer)

    if trainer.state.epoch < args.epochs:
        try:
            trainer.run(train_loader, max_epochs=args.epochs)
        finally:
            if bar.pbar is not None:
                # After Ctrl-C it is still open, and would wipe the last line at exit.
                bar.pbar.close()
    else:
        print(f"already finished: {trainer.state.epoch} epochs are done")
    draw(history, args.output / "digits.png")
    print_end(args)


def print_end(args: argparse.Namespace) -> None:
    """Say what was made, and how to go on."""
    made = {
        args.output / "digits.png": "a picture: accuracy of both models, and the momentum",
        newest_checkpoint(args.output): "model, EMA, optimizer: all that a training goes on with",
    }
    print("\nMade:")
    width = max(len(str(path)) for path in made)
    for path, meaning in made.items():
        print(f"  {path!s:{width}}   {meaning}")
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    again = [str(python), sys.argv[0], "--resume", f"--epochs={2 * args.epochs}", *args.others]
    print(f"Train for as many epochs again:\n  {shlex.join(again)}")
    print("Use it in your own training:\n  README.md, and the pages in docs/")


def main() -> None:
    """Train, and on Ctrl-C say how to go on."""
    args = parse_args()
    # Ignite logs every exception as an error, Ctrl-C too, before it reaches us.
    logging.getLogger("ignite").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)  # the net is too small to gain from more
    try:
        train(args)
    except KeyboardInterrupt:
        checkpoint = newest_checkpoint(args.output)
        remedy = f"--resume goes on from {checkpoint}" if checkpoint else "nothing is saved yet"
        print(f"\nInterrupted: {remedy}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
