"""Small models, and Ignite engines that show what a handler did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ignite
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler as IgniteHandler
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ema_triton import EMAHandler
from ema_triton.schedules import (
    Constant,
    CosineRamp,
    CountWarmup,
    ExponentialRamp,
    HalfLife,
    InverseDecay,
    LinearWarmup,
)

Handler = EMAHandler | IgniteHandler


# Negative controls: the same check on the version of Ignite that has the fault.
control = pytest.mark.skipif(
    ignite.__version__ != "0.5.5", reason="the fault is that of pytorch-ignite 0.5.5"
)


BATCHES = 4


def network() -> nn.Sequential:
    """BatchNorm comes first, so that its statistics depend on the data alone."""
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 4, generator=generator, dtype=dtype) + index,
            torch.randint(0, 3, (6,), generator=generator),
        )
        for index in range(BATCHES)
    ]


def bare(model: nn.Module) -> nn.Module:
    """The network in its wrappers."""
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model


def sgd_step(model: nn.Module, net: nn.Module | None = None) -> Callable[[Engine, Any], float]:
    """One step of SGD on `model`, whose forward is called as `net`."""
    net = model if net is None else net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> float:
        device = next(model.parameters()).device
        net.train()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(batch[0].to(device)), batch[1].to(device))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


# Each ends with an update: in between, Ignite's copied buffers are the online model's own.
EVENTS = {
    "every 2": Events.ITERATION_COMPLETED(every=2),
    "every 3": Events.ITERATION_COMPLETED(every=3),
    "filter": Events.ITERATION_COMPLETED(event_filter=lambda _, event: event in (1, 5, 6, 12)),
    "epoch": Events.EPOCH_COMPLETED,
    "list": Events.ITERATION_COMPLETED(every=3) | Events.EPOCH_COMPLETED,
}


def unit_model() -> nn.Linear:
    """One weight of 1 in float64. An EMA of 0 becomes the momentum by one update."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    return model


def probing_engine(*handlers: Handler) -> tuple[Engine, list[list[float]]]:
    """An engine that shows which momentum was really applied at each of its iterations.

    Its step zeroes the EMA. After a run, the second result holds the EMA's weight at the end of
    each iteration, for every handler: the momentum, or 0.0 where no update was made.
    """
    used: list[list[float]] = [[] for _ in handlers]
    running = False

    def step(engine: Engine, batch: Any) -> None:
        nonlocal running
        running = True
        for handler in handlers:
            handler.ema_model.weight.data.zero_()

    def note() -> None:
        nonlocal running
        if running:
            for values, handler in zip(used, handlers, strict=True):
                values.append(handler.ema_model.weight.item())
        running = False

    engine = Engine(step)
    engine.add_event_handler(Events.ITERATION_STARTED | Events.COMPLETED, note)
    return engine, used


# Above a half, 1 - (1 - momentum) is the momentum up to one rounding.
def same(momenta: list[float]) -> Any:
    return pytest.approx(momenta, rel=0, abs=2**-52)


def linear(start: float, end: float, iters: int, updates: int) -> list[float]:
    return [
        start + (end - start) * min(index, iters - 1) / max(1, iters - 1)
        for index in range(updates)
    ]


SCHEDULES = [
    Constant(0.3),
    LinearWarmup(0.9, 0.1, 5),
    InverseDecay(),
    CountWarmup(0.8),
    ExponentialRamp(0.9, tau=4),
    CosineRamp(0.6, updates=9),
    HalfLife(3.0, every=2),
]


def shared_storage(handler: Any) -> list[str]:
    online = {
        tensor.untyped_storage().data_ptr()
        for tensor in [*handler.model.parameters(), *handler.model.buffers()]
    }
    named = [*handler.ema_model.named_parameters(), *handler.ema_model.named_buffers()]
    return [name for name, tensor in named if tensor.untyped_storage().data_ptr() in online]


def values(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def changed(before: dict[str, Tensor], model: nn.Module) -> list[str]:
    after = values(model)
    assert list(after) == list(before)
    return [name for name in before if not torch.equal(before[name], after[name])]


def counting() -> tuple[nn.Linear, Callable[[Engine, Any], None]]:
    """A weight of 1 and a step that adds 1 to it."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)

    def step(engine: Engine, batch: Any) -> None:
        model.weight.data.add_(1.0)

    return model, step


def data_parallel(model: nn.Module) -> nn.Module:
    """On one GPU, or on the CPU."""
    return DataParallel(model, device_ids=[0] if torch.cuda.is_available() else None)
