"""Train a small net on digits once, and choose the width of its weight average afterwards.

Two averages are kept while it trains, and snapshots of them. Averages of other widths are rebuilt
from those, and their accuracies drawn beside those of averages that were kept too, to compare.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits import LEARNING_RATE, load_data, make_model, noisy_batch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ema_triton import EMABank, PowerFunction
from ema_triton.posthoc import Snapshots

KEPT = (0.05, 0.10)  # widths of the two averages, as fractions of the training
SWEEP = (0.03, 0.04, 0.05, 0.07, 0.10, 0.14, 0.20)
SNAPSHOTS = 32


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=12, help="default: 12")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise")
    parser.add_argument("--output", type=Path, default=Path("posthoc_run"), help="folder to write")
    return parser.parse_args()


def bank_of(model: nn.Module, widths: tuple[float, ...]) -> EMABank:
    """Averages of these widths, of BatchNorm's statistics too."""
    schedules = {f"{width:.2f}": PowerFunction(sigma_rel=width) for width in widths}
    return EMABank(model, schedules, handle_buffers="update")


@torch.no_grad()
def accuracy(model: nn.Module, weights: dict[str, Tensor], loader: DataLoader) -> float:
    """The fraction of digits that the model tells with these weights."""
    model.load_state_dict(weights)
    model.eval()
    right = [(model(images).argmax(1) == labels).float() for images, labels in loader]
    return float(torch.cat(right).mean())


def distance(weights: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """How far floating weights are from others, as a fraction of these."""
    names = [name for name, weight in others.items() if weight.is_floating_point()]
    apart = torch.stack([(weights[name] - others[name]).norm() for name in names]).norm()
    return float(apart / torch.stack([others[name].norm() for name in names]).norm())


def train(args: argparse.Namespace) -> tuple[Snapshots, EMABank]:
    """Train; the snapshots of two averages, and the averages of all widths for comparison."""
    torch.manual_seed(args.seed)
    loader, _ = load_data()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    bank, tracked = bank_of(model, KEPT), bank_of(model, SWEEP)
    snapshots = Snapshots(args.output / "snapshots")
    snapshots.record(bank)
    every = max(1, args.epochs * len(loader) // SNAPSHOTS)
    for epoch in range(1, args.epochs + 1):
        for batch in loader:
            images, labels = noisy_batch(batch, "cpu", non_blocking=False)
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bank.update()
            tracked.update()
            if bank.update_index % every == 0:
                snapshots.save(bank)
        print(f"epoch {epoch:3d}   loss {float(loss):.3f}", flush=True)
    snapshots.save(bank)
    return snapshots, tracked


def draw(path: Path, rebuilt: list[float], tracked: list[float]) -> None:
    """Draw accuracy against width."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(SWEEP, tracked, "o", color="black", mfc="none", ms=9, label="kept while training")
    axes.plot(SWEEP, rebuilt, ".-", color="tab:orange", label="rebuilt from snapshots")
    for width in KEPT:
        axes.axvline(width, color="0.8", linewidth=1, zorder=0)
    axes.set_xlabel("width of the average, as a fraction of the training")
    axes.set_ylabel("validation accuracy")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train, sweep, draw."""
    args = parse_args()
    torch.set_num_threads(1)  # the net is too small to gain from more
    snapshots, tracked = train(args)
    print(snapshots)
    _, loader = load_data()
    model = make_model()
    targets = [PowerFunction(sigma_rel=width) for width in SWEEP]
    found = snapshots.reconstruct_all(targets)
    rebuilt, kept = [], []
    print("width   rebuilt   kept     weights apart   expected")
    for result, average in zip(found, tracked.values(), strict=True):
        weights = average.ema_model.state_dict()
        rebuilt.append(accuracy(model, result.weights, loader))
        kept.append(accuracy(model, weights, loader))
        apart = distance(result.weights, weights)
        width = SWEEP[len(kept) - 1]
        print(
            f"{width:.2f}    {rebuilt[-1]:.4f}    {kept[-1]:.4f}   {apart:13.2e}   "
            f"{result.expected_error:.2e}"
        )
    best = max(range(len(SWEEP)), key=rebuilt.__getitem__)
    print(f"best: {SWEEP[best]:.2f}, of which {rebuilt[best]:.4f} of the digits are right")
    draw(args.output / "posthoc.png", rebuilt, kept)
    print(f"picture: {args.output / 'posthoc.png'}")


if __name__ == "__main__":
    main()
