"""The wall time of one update on this CPU, ours and Ignite's, interleaved in one run.

python -m bench.against_ignite
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import ignite
import torch
from ignite.engine import Engine
from ignite.handlers import EMAHandler as IgniteHandler
from torch import nn

from ema_triton import ModelEMA

ROUNDS = 30


def resnet50() -> nn.Module:
    """ResNet-50's parameters and buffers (He et al. 2015): 161 tensors, 25,557,032 elements."""

    def convolution(inputs: int, outputs: int, size: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, size, bias=False), nn.BatchNorm2d(outputs)]

    layers = convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers += convolution(inputs, width, 1) + convolution(width, width, 3)
            layers += convolution(width, 4 * width, 1)
            if block == 0:
                layers += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    model = nn.Sequential(*layers, nn.Linear(2048, 1000))
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
    assert len([*model.parameters()]) == 161
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": resnet50,
    "1000 tensors of 64, one module": lambda: nn.ParameterList(
        [torch.randn(64) for _ in range(1000)]
    ),
    "1000 tensors of 64, 1000 modules": lambda: nn.Sequential(
        *[nn.Linear(8, 8, bias=False) for _ in range(1000)]
    ),
}


def interleaved(theirs: Callable[[], None], ours: Callable[[], None], block: int) -> list[float]:
    """Median milliseconds per update of both, taking turns after every `block` updates."""
    columns: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for update, column in zip((theirs, ours), columns, strict=True):
            start = time.perf_counter()
            for _ in range(block):
                update()
            column.append(1e3 * (time.perf_counter() - start) / block)
    return [statistics.median(column) for column in columns]


def main() -> None:
    """Print a line per model, with blocks of 10 updates, and of 1, where each evicts the other."""
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"ignite {ignite.__version__}; milliseconds per update, medians of {ROUNDS} rounds"
    )
    print(f"{'model':34s} {'turns of':>8s} {'Ignite':>8s} {'ours':>8s} {'ratio':>7s}")
    for name, make in MODELS.items():
        model = make()
        handler, ema = IgniteHandler(model, momentum=0.1), ModelEMA(model)
        engine = Engine(lambda _engine, _batch: None)
        engine.state.momentum = 0.1
        theirs = partial(handler._update_ema_model, engine, "momentum")
        ours = partial(ema.update, 0.1)
        interleaved(theirs, ours, 1)
        for block in (10, 1):
            first, second = interleaved(theirs, ours, block)
            print(f"{name:34s} {block:8d} {first:8.2f} {second:8.2f} {first / second:6.1f}x")


if __name__ == "__main__":
    main()
