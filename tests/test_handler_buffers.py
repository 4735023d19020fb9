"""The EMA model's buffers under the handler: of every kind, and never the online model's own."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("ignite")

import ignite
from ignite.engine import Engine
from ignite.handlers import EMAHandler as IgniteHandler

from ema_triton import EMAHandler
from tests.engines import changed, control, shared_storage, values

pytestmark = pytest.mark.usefixtures("one_thread")


class Buffered(nn.Module):
    """BatchNorm, and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("total", torch.ones(2, dtype=torch.float16))
        self.register_buffer("count", torch.zeros(2, dtype=torch.int32))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        self.total += 1
        self.count += 1
        self.seen |= x[0] > 0
        self.scratch += 1
        return self.norm(x)


def buffered(cls: type, handle_buffers: str) -> Any:
    """A handler after two updates."""
    torch.manual_seed(0)
    model = Buffered()
    handler = cls(model, momentum=0.5, handle_buffers=handle_buffers)
    engine = Engine(lambda engine, batch: model(batch))
    handler.attach(engine)
    engine.run(list(torch.randn(2, 5, 3)))
    return handler


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
def test_no_tensor_shares_storage_with_the_online_model(handle_buffers: str) -> None:
    assert shared_storage(buffered(EMAHandler, handle_buffers)) == []


@control
@pytest.mark.parametrize(
    ("handle_buffers", "shared"),
    [("copy", "norm.running_mean"), ("copy", "count"), ("update", "count"), ("update", "seen")],
)
def test_control_ignites_buffers_share_storage(handle_buffers: str, shared: str) -> None:
    assert shared in shared_storage(buffered(IgniteHandler, handle_buffers))


BUFFERS = ["count", "total", "norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]


def after_online_forward(handler: Any) -> list[str]:
    before = values(handler.ema_model)
    handler.model.train()(torch.randn(5, 3) + 3)
    return changed(before, handler.ema_model)


def after_ema_forward(handler: Any) -> list[str]:
    before = values(handler.model)
    handler.ema_model.train()(torch.randn(5, 3) + 3)
    return changed(before, handler.model)


def after_loading_into_ema(handler: Any) -> list[str]:
    before = values(handler.model)
    state = {name: value + 1 for name, value in deepcopy(handler.ema_model.state_dict()).items()}
    handler.ema_model.load_state_dict(state)
    return changed(before, handler.model)


CROSSINGS = [after_online_forward, after_ema_forward, after_loading_into_ema]


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
@pytest.mark.parametrize("crossing", CROSSINGS)
def test_one_model_leaves_the_other_alone(
    crossing: Callable[[Any], list[str]], handle_buffers: str
) -> None:
    assert crossing(buffered(EMAHandler, handle_buffers)) == []


@control
@pytest.mark.parametrize("crossing", CROSSINGS)
def test_control_ignites_models_change_each_other(crossing: Callable[[Any], list[str]]) -> None:
    assert set(BUFFERS) <= set(crossing(buffered(IgniteHandler, "copy")))


def saved_alias(cls: type, path: Path) -> bool:
    handler = buffered(cls, "copy")
    torch.save({"model": handler.model, "ema": handler.ema_model}, path)
    loaded = torch.load(path, weights_only=False)
    online = loaded["model"].norm.running_mean.untyped_storage()
    return loaded["ema"].norm.running_mean.untyped_storage().data_ptr() == online.data_ptr()


def test_no_alias_after_saving_both_models(tmp_path: Path) -> None:
    assert not saved_alias(EMAHandler, tmp_path / "both.pt")


@control
def test_control_ignites_alias_is_saved(tmp_path: Path) -> None:
    assert saved_alias(IgniteHandler, tmp_path / "both.pt")


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
def test_buffers_of_every_kind(handle_buffers: str) -> None:
    handler = buffered(EMAHandler, handle_buffers)
    online, ema = values(handler.model), values(handler.ema_model)
    start = values(Buffered())
    assert len(ema) == 9
    for name in set(ema) - {"norm.weight", "norm.bias"}:
        assert ema[name].dtype == online[name].dtype
        if handle_buffers == "ema_train":
            assert torch.equal(ema[name], start[name]), name
        elif handle_buffers == "copy" or not ema[name].is_floating_point():
            assert torch.equal(ema[name], online[name]), name
    if handle_buffers == "update":
        # total: 1, then online 2 and 3 with a momentum of a half; scratch: 0, then 1 and 2. Exact.
        assert ema["total"].tolist() == [2.25] * 2
        assert ema["scratch"].tolist() == [1.25] * 4
    else:
        assert ema["total"].tolist() == [3.0 if handle_buffers == "copy" else 1.0] * 2


def test_the_online_models_buffers_stay_its_own() -> None:
    model = Buffered()
    pointers = [buffer.data_ptr() for buffer in model.buffers()]
    handler = EMAHandler(model, momentum=0.5)
    engine = Engine(lambda engine, batch: model(batch))
    handler.attach(engine)
    engine.run(list(torch.randn(3, 5, 3)))
    assert [buffer.data_ptr() for buffer in model.buffers()] == pointers


def test_integer_parameters_are_copied() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.levels = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.ones(3))

    def run(cls: type) -> nn.Module:
        model = Quantized()
        handler = cls(model, momentum=0.5)

        def step(engine: Engine, batch: Any) -> None:
            model.levels.data += 1
            model.scale.data += 1

        engine = Engine(step)
        handler.attach(engine)
        engine.run(range(2))
        return handler.ema_model

    ema = run(EMAHandler)
    assert ema.levels.tolist() == [3, 3, 3]
    assert ema.scale.tolist() == [2.25] * 3
    if ignite.__version__ == "0.5.5":
        with pytest.raises(RuntimeError):
            run(IgniteHandler)
