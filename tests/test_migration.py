"""The rows of docs/migration.md: the same weights from the same trainings."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_triton import (
    Constant,
    CountWarmup,
    Delayed,
    EqualAverage,
    InverseDecay,
    ModelEMA,
)
from ema_triton.schedules import Schedule

UPDATES = 12


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def train(model: nn.Module, after_step: Callable[[int], object]) -> None:
    """Random walks for weights and running statistics."""
    generator = torch.Generator().manual_seed(1)
    for step in range(1, UPDATES + 1):
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator))
            else:
                tensor.add_(1)
        after_step(step)


def averaged_here(schedule: Schedule, handle_buffers: str = "copy") -> dict[str, Tensor]:
    model = net()
    ema = ModelEMA(model, handle_buffers=handle_buffers)
    train(model, lambda step: ema.update(schedule(step)))
    return ema.ema_model.state_dict()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # One rounding of eps / 2 in each operation: two here, up to three in the others.
        atol = 5 * UPDATES * torch.finfo(torch.float32).eps / 2 * float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("multi_avg_fn", "schedule"),
    [
        (get_ema_multi_avg_fn(0.9), Delayed(Constant(0.1), 1)),
        (None, EqualAverage()),
    ],
    ids=["ema", "equal"],
)
@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
def test_torch_averaged_model(
    multi_avg_fn: Callable[..., None] | None, schedule: Schedule, handle_buffers: str
) -> None:
    model = net()
    theirs = AveragedModel(model, multi_avg_fn=multi_avg_fn, use_buffers=handle_buffers == "update")
    train(model, lambda step: theirs.update_parameters(model))
    expected, found = theirs.module.state_dict(), averaged_here(schedule, handle_buffers)
    if handle_buffers == "update":  # torch averages the count of batches too, in integers
        assert expected.pop("1.num_batches_tracked") != found.pop("1.num_batches_tracked")
    assert_close(found, expected)


def test_control_without_the_first_copy_torch_averages_otherwise() -> None:
    model = net()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, lambda step: theirs.update_parameters(model))
    with pytest.raises(AssertionError):
        assert_close(averaged_here(Constant(0.1)), theirs.module.state_dict())


@pytest.mark.parametrize(
    ("arguments", "schedule"),
    [
        ({"decay": 0.75}, Delayed(CountWarmup(0.75), 1)),
        ({"decay": 0.75, "use_ema_warmup": True}, InverseDecay(max_decay=0.75)),
    ],
    ids=["default", "use_ema_warmup"],
)
def test_diffusers(arguments: dict[str, float], schedule: Schedule) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    model = net()
    theirs = training_utils.EMAModel(model.parameters(), **arguments)
    train(model, lambda step: theirs.step(model.parameters()))
    result = net()
    theirs.copy_to(result.parameters())
    expected = {name: p.detach() for name, p in result.named_parameters()}
    found = averaged_here(schedule)
    assert_close({name: found[name] for name in expected}, expected)


def test_ema_pytorch() -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch")
    model = net()
    theirs = ema_pytorch.EMA(model, beta=0.75, update_after_step=3, update_every=1)
    train(model, lambda step: theirs.update())
    expected = dict(theirs.ema_model.named_parameters())
    found = averaged_here(Delayed(InverseDecay(max_decay=0.75), 3))
    assert_close({name: found[name] for name in expected}, expected)


def test_timm_averages_floating_buffers() -> None:
    # The arithmetic of timm's ModelEmaV3(decay=0.75, use_warmup=True): all of the state dict, and a
    # decay of 0 at the first step.
    model = net()
    theirs = copy.deepcopy(model.state_dict())

    def update(step: int) -> None:
        decay = min(1 - (1 + (step - 1) / 1.0) ** -(2 / 3), 0.75)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                theirs[name].lerp_(tensor, 1 - decay)
            else:
                theirs[name].copy_(tensor)

    train(model, update)
    assert_close(averaged_here(InverseDecay(max_decay=0.75), "update"), theirs)
    with pytest.raises(AssertionError):
        assert_close(averaged_here(InverseDecay(max_decay=0.75), "copy"), theirs)
