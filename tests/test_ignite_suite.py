"""What Ignite's own tests demand of its handler, demanded of this one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

pytest.importorskip("ignite")

from ignite.engine import Engine, Events

from ema_triton import EMAHandler

CPU_AND_GPU = [
    "cpu",
    pytest.param("cuda:0", marks=pytest.mark.gpu),
]


def ones() -> nn.Linear:
    """Two weights of 1."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    return model


def grow(*models: nn.Module) -> Callable[[Engine, Any], int]:
    """A training step that adds 1 to each weight, so that iteration i leaves them at 1 + i."""

    def step(engine: Engine, batch: Any) -> int:
        for model in models:
            inner = model.module if isinstance(model, DataParallel) else model
            inner.weight.data += 1
        return 0

    return step


def half_way(iterations: int, every: int) -> float:
    """The weight's EMA at a momentum of a half. Halves of small integers: exact in fp32."""
    ema = 1.0
    for iteration in range(every, iterations + 1, every):
        ema = (ema + (1 + iteration)) / 2
    return ema


def both(value: float) -> list[list[float]]:
    return [[value, value]]


@pytest.mark.parametrize("momentum", [-1, 2])
def test_momentum_outside_the_range_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="Invalid momentum"):
        EMAHandler(ones(), momentum=momentum)


def test_something_that_is_no_module_is_refused() -> None:
    message = "model should be an instance of nn.Module or its subclasses"
    with pytest.raises(ValueError, match=message):
        EMAHandler("Invalid Model")  # type: ignore[arg-type]


def test_unknown_buffer_handling_is_refused() -> None:
    with pytest.raises(ValueError, match="handle_buffers can only"):
        EMAHandler(nn.BatchNorm2d(2), momentum=0.5, handle_buffers="invalid")


def test_a_warmup_has_its_two_attributes() -> None:
    handler = EMAHandler(ones(), momentum_warmup=0.0, warmup_iters=10)
    assert hasattr(handler, "momentum_scheduler")
    assert hasattr(handler, "_momentum_lambda_obj")


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_warmup_goes_from_its_start_to_the_momentum(start: float) -> None:
    model = ones()
    engine = Engine(grow(model))
    EMAHandler(model, 0.5, start, 5).attach(engine)
    seen: list[float] = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: seen.append(engine.state.ema_momentum)
    )
    engine.run(range(10))
    assert len(seen) == 10
    assert seen[0] == start
    assert seen[5:] == [0.5] * 5
    assert all(min(start, 0.5) <= momentum <= max(start, 0.5) for momentum in seen)
    assert seen == sorted(seen, reverse=start > 0.5)
    assert 0.0 < abs(seen[2] - start) < 0.5, "it steps"


def test_weights_can_be_loaded_into_the_ema_model() -> None:
    source = ones()
    nn.init.constant_(source.weight, 2.0)
    ema_model = EMAHandler(ones()).ema_model
    ema_model.load_state_dict(source.state_dict())
    assert ema_model.weight.tolist() == both(2.0)


def test_a_constant_momentum_stays_in_the_state() -> None:
    model = ones()
    engine = Engine(grow(model))
    handler = EMAHandler(model, momentum=0.002)
    handler.attach(engine)
    seen: list[float] = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: seen.append(engine.state.ema_momentum)
    )
    engine.run(range(10))
    assert seen == [handler.momentum] * 10 == [0.002] * 10


def norm() -> nn.BatchNorm2d:
    """Statistics that are not those of the data, and one more floating buffer."""
    model = nn.BatchNorm2d(2)
    model.running_mean.fill_(1.5)
    model.running_var.fill_(1.5)
    model.register_buffer("extra", torch.tensor(1.0))
    return model


def train_norm(handle_buffers: str) -> tuple[nn.Module, nn.Module, list[dict[str, tuple]]]:
    """Four iterations: the online model, the EMA model and both's buffers after each of them."""
    model = norm()
    handler = EMAHandler(model, momentum=0.5, handle_buffers=handle_buffers)
    ema_model = handler.ema_model
    history: list[dict[str, tuple]] = []

    def step(engine: Engine, batch: Any) -> None:
        model(torch.rand(4, 2, 32, 32))
        model.extra += 1

    engine = Engine(step)
    handler.attach(engine)

    @engine.on(Events.ITERATION_COMPLETED)
    def note() -> None:
        online = dict(model.named_buffers())
        history.append(
            {name: (ema.clone(), online[name].clone()) for name, ema in ema_model.named_buffers()}
        )

    engine.run([0, 1], max_epochs=2)
    assert len(history) == 4
    assert len(history[0]) == 4
    return model, ema_model, history


def test_copied_buffers_equal_the_online_ones() -> None:
    model, ema_model, history = train_norm("copy")
    assert not ema_model.training
    for index, buffers in enumerate(history, start=1):
        assert int(buffers["num_batches_tracked"][0]) == index
        for name, (ema, online) in buffers.items():
            assert torch.equal(ema, online), name
    assert float(ema_model.extra) == float(model.extra) == 5.0


def test_updated_buffers_lag_behind_and_counters_do_not() -> None:
    model, ema_model, history = train_norm("update")
    assert not ema_model.training

    def apart(ema: Tensor, online: Tensor) -> bool:
        return not torch.allclose(ema, online)

    for index, buffers in enumerate(history, start=1):
        ema, online = buffers["num_batches_tracked"]
        assert int(ema) == int(online) == index
        for name in ("extra", "running_mean", "running_var"):
            assert apart(*buffers[name]), name
    assert float(ema_model.extra) == half_way(4, 1) == 4.0625
    assert float(model.extra) == 5.0


def test_buffers_are_left_to_an_ema_in_train_mode() -> None:
    model, ema_model, history = train_norm("ema_train")
    assert ema_model.training
    for buffers in history:
        assert int(buffers["num_batches_tracked"][0]) == 0
        assert float(buffers["extra"][0]) == 1.0
        assert buffers["running_mean"][0].tolist() == [1.5, 1.5]
        assert buffers["running_var"][0].tolist() == [1.5, 1.5]
    assert float(model.extra) == 5.0


def test_two_handlers_on_one_trainer() -> None:
    first, second = ones(), ones()
    every, second_only = EMAHandler(first, momentum=0.5), EMAHandler(second, momentum=0.5)
    engine = Engine(grow(first, second))
    for handler, name, event in (
        (every, "ema_momentum_1", Events.ITERATION_COMPLETED),
        (second_only, "ema_momentum_2", Events.ITERATION_COMPLETED(every=2)),
    ):
        assert not hasattr(engine.state, name)
        handler.attach(engine, name, event=event)
        assert hasattr(engine.state, name)
    engine.run(range(2), max_epochs=2)

    assert every.ema_model.weight.tolist() == both(half_way(4, 1)) == both(4.0625)
    assert second_only.ema_model.weight.tolist() == both(half_way(4, 2)) == both(3.5)
    assert (engine.state.ema_momentum_1, engine.state.ema_momentum_2) == (0.5, 0.5)

    with pytest.warns(UserWarning, match="Attribute 'ema_momentum_1' already exists"):
        EMAHandler(ones()).attach(engine, name="ema_momentum_1")


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("device", CPU_AND_GPU)
@pytest.mark.parametrize("parallel", [False, True])
def test_final_weights(device: str, every: int, parallel: bool) -> None:
    model: nn.Module = ones().to(device)
    online = model
    if parallel:
        model = DataParallel(model)
        online = model.module
        device = str(online.weight.device)  # it takes a model to the GPU where there is one
    engine = Engine(grow(model))
    handler = EMAHandler(model, momentum=0.5)
    handler.attach(engine, "model", event=Events.ITERATION_COMPLETED(every=every))
    engine.run(range(2), max_epochs=2)
    assert isinstance(handler.ema_model, DataParallel) is parallel
    ema = handler.ema_model.module if parallel else handler.ema_model
    assert ema.weight.device == online.weight.device == torch.device(device)
    assert ema.weight.tolist() == both(half_way(4, every)) == both({1: 4.0625, 2: 3.5}[every])
    assert online.weight.tolist() == both(5.0)


@pytest.mark.parametrize("device", CPU_AND_GPU)
def test_kind_and_mode_of_the_ema_model(device: str) -> None:
    model = ones().to(device)
    plain, parallel = EMAHandler(model).ema_model, EMAHandler(DataParallel(model)).ema_model
    assert type(plain) is nn.Linear
    assert type(parallel) is DataParallel
    assert not plain.training
    assert not parallel.training
