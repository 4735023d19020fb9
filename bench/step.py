"""`python -m bench step`: what an EMA adds to the time of a real training step."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import date

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench import gate, measure, peers
from bench.machine import commit, describe
from bench.measure import Subject, in_one_line
from bench.results import AGAIN, NO_EMA, Results, Spread, StepRow
from bench.run import (
    add_common_arguments,
    chosen_device,
    destination,
    earlier,
    progress,
    publish,
    selected,
    status_of,
)

MOMENTUM = 0.001

# Samples per peer, each of STEPS steps in a row; on a GPU they are queued without waiting.
ROUNDS = 30
QUICK_ROUNDS = 5
SECONDS = 120.0
STEPS = {"cpu": 2, "cuda": 10}

BATCH = {"cpu": 8, "cuda": 128}


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Both ways, added."""
        return functional.relu(self.body(x) + self.shortcut(x))


class Block(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then the MLP, each added to its input."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class Cnn(nn.Sequential):
    """A ResNet of 2.8 M parameters for images of 32 pixels."""

    def __init__(self) -> None:
        stages = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2)]
        blocks = [Residual(*stage) for stage in stages]
        super().__init__(
            nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), *blocks,
            Residual(256, 256, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 100),
        )  # fmt: skip

    def batch(self, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random images and labels."""
        images = torch.randn(size, 3, 32, 32, device=device)
        return images, torch.randint(100, (size,), device=device)


class Vit(nn.Module):
    """A vision Transformer of 10.7 M parameters, 64 tokens of 4x4 pixels."""

    def __init__(self, width: int = 384, depth: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*[Block(width, 6, causal=False) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 100)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the mean token."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))

    batch = Cnn.batch


class Gpt(nn.Module):
    """A language model of 17 M parameters, 128 tokens of context."""

    def __init__(self, width: int = 384, depth: int = 6, vocabulary: int = 8192) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 128, width))
        self.blocks = nn.Sequential(*[Block(width, 6, causal=True) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token, at every place."""
        x = self.blocks(self.tokens(tokens) + self.positions)
        return self.head(self.norm(x)).flatten(0, 1)

    def batch(self, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random tokens, and which follow them."""
        tokens = torch.randint(8192, (size, 129), device=device)
        return tokens[:, :-1], tokens[:, 1:].flatten()


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": Cnn, "vit": Vit, "gpt": Gpt}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("--models", help=f"comma-separated, of {', '.join(MODELS)}")
    add_common_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Measure, print a table, write the results file."""
    device = chosen_device(args)
    models = selected(args.models, tuple(MODELS), tuple(MODELS))
    keys = selected(args.peers, peers.PEERS, peers.PEERS)
    machine, measured_commit = describe(device), commit()
    out = destination(args, f"{machine.slug}-step")
    results = Results("step", machine, measured_commit, date.today().isoformat(), [])
    results.rows.extend(earlier(results, args.resume, out))
    done = {row.model for row in results.rows}
    for name in models:
        if name in done:
            continue
        progress(f"{name}, up to {SECONDS / 60:g} minutes")
        rounds = QUICK_ROUNDS if args.quick else ROUNDS
        results.rows.extend(measured(name, keys, device, rounds))
        if out is not None:
            results.save(out)
    publish(results, out)


def measured(name: str, keys: list[str], device: torch.device, rounds: int) -> list[StepRow]:
    """The rows of one model: without EMA, the same again, and with each peer.

    All train the same model: an update reads it and writes elsewhere.
    """
    torch.manual_seed(0)
    model = MODELS[name]().to(device)
    elements = sum(parameter.numel() for parameter in model.parameters())
    step = training_step(model, device)
    rows: dict[str, StepRow] = {}
    subjects: dict[str, Subject] = {}
    for peer in (NO_EMA, AGAIN):
        rows[peer] = StepRow(name, elements, peer, "timed")
        subjects[peer] = Subject(_steps(step, lambda: None, STEPS[device.type]))
    for key in keys:
        row, update = _built(name, elements, key, model)
        rows[row.peer] = row
        if update is not None:
            subjects[row.peer] = Subject(_steps(step, update, STEPS[device.type]))

    def sample(subject: Subject) -> dict[str, float]:
        _wait(device)
        start = time.perf_counter()
        subject.update()
        _wait(device)
        return {"step": 1e6 * (time.perf_counter() - start) / STEPS[device.type]}

    samples = measure.interleaved(subjects, sample, rounds, SECONDS)
    bare = samples[NO_EMA]["step"]
    for peer, found in samples.items():
        added = [mine - without for mine, without in zip(found["step"], bare, strict=True)]
        spreads = Spread.of(found["step"]), Spread.of(added)
        rows[peer] = StepRow(name, elements, peer, "timed", "", *spreads)
    return [*rows.values()]


def training_step(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """Forward, backward and AdamW, on a batch that stays."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    inputs, labels = model.batch(BATCH[device.type], device)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    return step


def _steps(step: Callable[[], None], update: measure.Update, count: int) -> measure.Update:
    def steps() -> None:
        for _ in range(count):
            step()
            with torch.no_grad():
                update()

    return steps


def _built(
    name: str, elements: int, key: str, model: nn.Module
) -> tuple[StepRow, measure.Update | None]:
    """The row of a peer, and its update unless it has none that is right."""
    peer_name = key
    try:
        peer = peers.load(key)
        peer_name = peer.NAME
        with torch.no_grad():
            built = peer.build(model, MOMENTUM, torch.float32)
            fault = gate.fault(built, model, (MOMENTUM, MOMENTUM))
    except ImportError as error:
        return StepRow(name, elements, peer_name, "absent", in_one_line(error)), None
    except Exception as error:  # whatever a peer raises is a finding
        return StepRow(name, elements, peer_name, status_of(error), in_one_line(error)), None
    if fault is not None:
        return StepRow(name, elements, peer_name, "wrong", fault), None
    return StepRow(name, elements, peer_name, "timed"), lambda: built.update(MOMENTUM)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
