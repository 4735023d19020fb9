"""Banks beside the single EMAs that they have to equal, and a model of every kind of tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ema_triton import Constant, EMABank, InverseDecay, LinearWarmup, ModelEMA
from ema_triton.schedules import Schedule
from tests.states import PRECISIONS, same

# The first copies at its first update, the second warms up, below and above a half.
SCHEDULES: dict[str, Schedule] = {
    "copy first": InverseDecay(),
    "warm-up": LinearWarmup(0.9, 0.1, 4),
    "small": Constant(0.01),
    "half": Constant(0.5),
    "large": Constant(0.75),
}
NAMES = [*SCHEDULES]


class Net(nn.Module):
    """Odd sizes; a tied and a frozen weight, buffers of every kind, and a matrix of images."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.conv = nn.Conv2d(3, 2, 3)
        self.tied = nn.Linear(5, 7, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))


def part_bfloat16(model: Net) -> None:
    model.first.to(torch.bfloat16)


def part_complex(model: Net) -> None:
    model.frozen = nn.Parameter(torch.randn(3, dtype=torch.complex64))


def double(model: Net) -> None:
    model.double()


def strided(model: Net) -> None:
    """Its matrix has gaps, which the kernel does not take."""
    model.conv.weight.data = torch.randn(2, 3, 3, 6)[..., ::2]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    **PRECISIONS,
    "averaged buffers": {"handle_buffers": "update"},
    "buffers in training": {"handle_buffers": "ema_train"},
    "groups": {"momentum_scale": {"first*": 0.5, "conv.weight": 4.0}},
    "excluded": {"exclude": ["conv", "frozen"]},
    "guarded": {"nonfinite": "skip"},
    "no module": {"as_module": False},
    "no module, excluded": {"as_module": False, "exclude": "conv"},
    "all at once": {
        "ema_dtype": torch.bfloat16,
        "momentum_scale": {"first*": 0.5},
        "nonfinite": "skip",
        "as_module": False,
        "handle_buffers": "update",
    },
    "noise, guarded, in groups": {
        **PRECISIONS["stochastic bfloat16"],
        "momentum_scale": {"first*": 0.5},
        "nonfinite": "skip",
    },
    "guarded fp16, copied": {"ema_dtype": torch.float16, "nonfinite": "skip", "exclude": "conv"},
}

CHANGES: dict[str, Callable[[Net], None]] = {
    "online dtypes": part_bfloat16,
    "complex": part_complex,
    "fp64": double,
    "gaps": strided,
}


def change(model: nn.Module, step: int, *, nonfinite: bool = False) -> None:
    """What a training step does to parameters and buffers."""
    chance = torch.Generator().manual_seed(step)
    for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
        if tensor.is_floating_point() or tensor.is_complex():
            noise = torch.randn(tensor.shape, generator=chance, dtype=torch.float64)
            tensor.data.add_(noise.to(tensor.device, tensor.dtype))
            if nonfinite and tensor.dim():
                tensor.data[(step % 2,) * tensor.dim()] = [float("nan"), float("inf")][step % 2]
        elif tensor.dtype == torch.bool:
            tensor.logical_not_()
        else:
            tensor += 1


def train_buffers(ema: ModelEMA, step: int) -> None:
    """What an EMA model in train mode does to its own buffers."""
    if ema.handle_buffers == "ema_train":
        ema.ema_model.norm.running_mean.add_(step)
        ema.ema_model.norm.num_batches_tracked.add_(1)


def schedules(count: int) -> dict[str, Schedule]:
    return {name: SCHEDULES[name] for name in NAMES[:count]}


def singles_of(model: nn.Module, count: int, **options: Any) -> dict[str, ModelEMA]:
    """What the bank of so many schedules has to equal."""
    singles = {name: ModelEMA(model, **options) for name in NAMES[:count]}
    for name, ema in singles.items():
        ema.schedule = SCHEDULES[name]
    return singles


def update(singles: dict[str, ModelEMA]) -> None:
    for ema in singles.values():
        ema.update(ema.next_momentum())


def assert_equal(bank: EMABank, singles: dict[str, ModelEMA]) -> None:
    """Bit by bit, as far as the bank's averages go."""
    assert len(bank) > 0
    for name, ema in bank.items():
        found, expected = ema.state_dict(), singles[name].state_dict()
        differing = [key for key in expected if not same(found[key], expected[key])]
        assert not differing, (name, differing, _differing(found, expected))
        if ema.nonfinite == "skip":
            assert ema.nonfinite_counts() == singles[name].nonfinite_counts()


def assert_different(emas: Sequence[ModelEMA]) -> None:
    """A control: each average differs from each other."""
    states = [ema.state_dict()["weights"] for ema in emas]
    for number, one in enumerate(states):
        for other in states[:number]:
            assert not same(one, other)


def _differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [
        name
        for part in ("weights", "residuals")
        for name in expected[part]
        if not same(found[part].get(name), expected[part][name])
    ]


def tensors(state: dict[str, Any]) -> list[Tensor]:
    """All tensors of a bank's state dict."""
    found: list[Tensor] = []
    for value in state.values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            found += tensors(value)
    return found
