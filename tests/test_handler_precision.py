"""The handler's EMA of a bf16 or fp16 model does not stall, or warns that it will."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("ignite")

from ignite.engine import Engine
from ignite.handlers import EMAHandler as IgniteHandler

from ema_triton import EMAHandler
from tests.engines import control, network, values

pytestmark = pytest.mark.usefixtures("one_thread")


LOW = [torch.bfloat16, torch.float16]


UPDATES = 2000


def low_precision(cls: type, dtype: torch.dtype, **kwargs: Any) -> nn.Module:
    """The EMA model after so many updates from 1.0 towards 1.5 at the default momentum."""
    model = nn.Linear(4, 2).to(dtype)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    handler = cls(model, **kwargs)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1.5)
    engine = Engine(lambda engine, batch: None)
    handler.attach(engine)
    engine.run(range(UPDATES))
    return handler.ema_model


@pytest.mark.parametrize("dtype", LOW)
def test_fp32_ema_of_a_low_precision_model_does_not_stall(dtype: torch.dtype) -> None:
    ema = low_precision(EMAHandler, dtype, ema_dtype=torch.float32)
    truth = 1.5 - 0.5 * (1 - 0.0002) ** UPDATES
    # One eps of at most 1.5 per update, and half an eps (relative) of the momentum, whose effect
    # on the truth is at most 0.5 * UPDATES * 0.0002 * eps / 2.
    bound = UPDATES * torch.finfo(torch.float32).eps * 1.5 + torch.finfo(torch.float32).eps
    assert bound < 0.001 < truth - 1.16
    for parameter in ema.parameters():
        assert parameter.dtype == torch.float32
        assert bool(((parameter.double() - truth).abs() <= bound).all())


@control
@pytest.mark.parametrize("dtype", LOW)
def test_control_ignite_stalls_in_low_precision(dtype: torch.dtype) -> None:
    for parameter in low_precision(IgniteHandler, dtype).parameters():
        assert bool((parameter == 1.0).all())


@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
@pytest.mark.parametrize("dtype", LOW)
def test_ema_dtype_is_that_of_buffers_too(dtype: torch.dtype, handle_buffers: str) -> None:
    model = network().to(dtype)
    handler = EMAHandler(model, 0.25, handle_buffers=handle_buffers, ema_dtype=torch.float32)
    start = values(model)
    engine = Engine(lambda engine, batch: model(batch))
    handler.attach(engine)
    engine.run([torch.randn(6, 4).to(dtype)])
    ema, online = values(handler.ema_model), values(model)
    assert ema["0.running_mean"].dtype == torch.float32
    assert ema["0.num_batches_tracked"].dtype == torch.int64
    new, old = online["0.running_mean"].float(), start["0.running_mean"].float()
    assert not torch.equal(new, old)
    if handle_buffers == "copy":
        assert torch.equal(ema["0.running_mean"], new)
    else:
        # From zeros, a quarter of a float is exact.
        assert torch.equal(ema["0.running_mean"], new / 4)
    assert all(p.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize(
    ("dtype", "resolution"),
    [(LOW[0], r"0\.0(039|078)"), (LOW[1], r"0\.000(4[89]|9[78])")],
)
@pytest.mark.parametrize("warmup", [{}, {"momentum_warmup": 0.5, "warmup_iters": 2}])
def test_rounding_to_nearest_in_low_precision_warns(
    dtype: torch.dtype, resolution: str, warmup: dict[str, Any]
) -> None:
    def run() -> None:
        handler = EMAHandler(nn.Linear(4, 2).to(dtype), precision="nearest", **warmup)
        engine = Engine(lambda engine, batch: None)
        handler.attach(engine)
        engine.run(range(4))

    with pytest.warns(UserWarning, match=r"0\.0002|2e-0?4") as caught:
        run()
    text = str(caught[0].message)
    assert len(caught) == 1, [str(one.message) for one in caught]
    assert str(dtype).removeprefix("torch.") in text
    assert re.search(resolution, text), text
    assert "precision='exact'" in text  # the remedy


@pytest.mark.parametrize("dtype", LOW)
def test_a_momentum_that_low_precision_resolves_does_not_warn(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 2).to(dtype)
    handler = EMAHandler(model, 0.25)  # a warning would be an error here
    old = values(model)
    engine = Engine(lambda engine, batch: model.weight.data.add_(1.0))
    handler.attach(engine)
    engine.run(range(1))
    assert handler.ema_model.weight.dtype == dtype
    expected = old["weight"].double() + 0.25 * (model.weight.double() - old["weight"].double())
    # One eps of the larger value, see tolerances.update_bound.
    bound = torch.finfo(dtype).eps * torch.maximum(old["weight"].abs(), model.weight.abs()).double()
    assert bool(((handler.ema_model.weight.double() - expected).abs() <= bound).all())
