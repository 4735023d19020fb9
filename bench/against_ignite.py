"""The wall time of one update on this CPU, ours and Ignite's, interleaved in one run.

python -m bench.against_ignite
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

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


def main() -> None:
    """Print the median of every pair of updates, and the median of their ratios."""
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"ignite {ignite.__version__}; medians of {ROUNDS} interleaved updates"
    )
    print(f"{'model':34s} {'Ignite':>10s} {'ours':>10s} {'ratio':>7s}")
    for name, make in MODELS.items():
        model = make()
        theirs, ours = IgniteHandler(model, momentum=0.1), ModelEMA(model)
        engine = Engine(lambda _engine, _batch: None)
        engine.state.momentum = 0.1
        times: list[tuple[float, float]] = []
        for _ in range(ROUNDS + 3):
            start = time.perf_counter()
            theirs._update_ema_model(engine, "momentum")
            middle = time.perf_counter()
            ours.update(0.1)
            times.append((middle - start, time.perf_counter() - middle))
        medians = [1e3 * statistics.median(column) for column in zip(*times[3:], strict=True)]
        ratio = statistics.median(one / other for one, other in times[3:])
        print(f"{name:34s} {medians[0]:7.2f} ms {medians[1]:7.2f} ms {ratio:6.1f}x")


if __name__ == "__main__":
    main()
