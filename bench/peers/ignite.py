"""PyTorch-Ignite's handler, driven by its engine's event as in training."""

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from torch import nn

from bench.peers import Built, cast, memory_of_cast

NAME = "Ignite EMAHandler"

memory = memory_of_cast


def build(model: nn.Module, momentum: float, ema_dtype: torch.dtype) -> Built:
    """Fire the event at which the handler updates; it reads the momentum from the state."""
    engine = Engine(lambda _engine, _batch: None)
    handler = EMAHandler(model, momentum)
    handler.attach(engine)

    def update(momentum: float) -> None:
        engine.state.ema_momentum = momentum
        engine.fire_event(Events.ITERATION_COMPLETED)

    return Built(update, cast(handler.ema_model, ema_dtype))
