"""The handler on wrapped models, and on models whose tensors are replaced, moved or reordered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

pytest.importorskip("ignite")

from ignite.engine import Engine
from ignite.handlers import EMAHandler as IgniteHandler

from ema_triton import EMAHandler
from tests.engines import (
    bare,
    batches,
    changed,
    control,
    counting,
    data_parallel,
    network,
    sgd_step,
    shared_storage,
    values,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A distributed world of this one process."""
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    wrapped = torch.compile(model, backend="eager")
    assert isinstance(wrapped, OptimizedModule)
    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "compiled": compiled,
    "ddp": DistributedDataParallel,
    "ddp of compiled": lambda model: DistributedDataParallel(compiled(model)),
    "compiled ddp": lambda model: compiled(DistributedDataParallel(model)),
    "dp": data_parallel,
    "dp of compiled": lambda model: data_parallel(compiled(model)),
    "compiled dp": lambda model: compiled(data_parallel(model)),
}


def names_in(state: Any) -> set[str]:
    """All keys in nested mappings."""
    if not isinstance(state, dict):
        return set()
    return {str(key) for key in state}.union(*(names_in(value) for value in state.values()))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_taken_off(wrapper: str) -> None:
    model = network()
    online = WRAPPERS[wrapper](model)
    modules = [type(module) for module in online.modules()]
    handler = EMAHandler(online, 0.25, handle_buffers="update")
    parallel = "dp" in wrapper.split()
    expected = list((data_parallel(network()) if parallel else network()).state_dict())
    assert list(handler.ema_model.state_dict()) == expected
    assert isinstance(handler.ema_model, DataParallel) is parallel
    assert not any(
        isinstance(module, OptimizedModule | DistributedDataParallel)
        for module in handler.ema_model.modules()
    )
    assert isinstance(handler.model, DataParallel) is parallel
    assert not isinstance(handler.model, OptimizedModule | DistributedDataParallel)
    if not parallel:
        assert handler.model is model
    # The online model keeps its wrappers.
    assert [type(module) for module in online.modules()] == modules

    engine = Engine(sgd_step(model, online))
    handler.attach(engine)
    before = values(bare(handler.ema_model))
    engine.run(batches()[:1])
    after, now = values(bare(handler.ema_model)), values(model)
    for name, old in before.items():
        if not old.is_floating_point():
            assert torch.equal(after[name], now[name])
            continue
        assert not torch.equal(now[name], old), "the training moved nothing"
        truth = torch.lerp(old.double(), now[name].double(), 0.25)
        # One eps of the larger value, see tolerances.update_bound.
        bound = torch.finfo(old.dtype).eps * torch.maximum(old.abs(), now[name].abs()).double()
        assert bool(((after[name].double() - truth).abs() <= bound).all()), name
    assert not any("_orig_mod" in name for name in names_in(handler.state_dict()))
    assert "1.weight" in " ".join(names_in(handler.state_dict()))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", ["compiled", "ddp", "ddp of compiled", "dp of compiled"])
def test_states_fit_whatever_the_wrapper(wrapper: str) -> None:
    handler = EMAHandler(WRAPPERS[wrapper](network()), 0.25)
    with torch.no_grad():
        for value in handler.ema_model.parameters():
            value.add_(1.0)
    plain = EMAHandler(WRAPPERS["dp" if wrapper.startswith("dp") else "none"](network()), 0.25)
    plain.load_state_dict(handler.state_dict())
    assert changed(values(bare(handler.ema_model)), bare(plain.ema_model)) == []


@control
@pytest.mark.parametrize("wrapper", ["compiled", "dp of compiled", "compiled dp"])
def test_control_ignites_names_are_not_clean(wrapper: str) -> None:
    handler = IgniteHandler(WRAPPERS[wrapper](network()))
    assert all("_orig_mod" in name for name in handler.ema_model.state_dict())


@pytest.mark.usefixtures("process_group")
def test_a_model_that_was_sharded_meanwhile_is_a_clear_error() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    handler = EMAHandler(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="Build the EMA after the model is sharded"):
        handler.ema.update(0.5)
    again = EMAHandler(model)
    with pytest.raises(RuntimeError, match="there is no ema_model"):
        _ = again.ema_model


def with_shape(model: nn.Module) -> None:
    model.weight = nn.Parameter(torch.zeros(5, 4))


def with_buffer_shape(model: nn.Module) -> None:
    model.extra = torch.zeros(5)


def without(model: nn.Module) -> None:
    del model.bias


@pytest.mark.parametrize(
    ("change", "words", "handle_buffers"),
    [
        (with_shape, ["weight", "3, 4", "5, 4"], "copy"),
        (with_shape, ["weight", "3, 4", "5, 4"], "update"),
        (with_buffer_shape, ["extra", "2", "5", "exclude"], "update"),
        (without, ["bias"], "copy"),
        (without, ["bias"], "update"),
    ],
)
def test_a_changed_shape_is_an_error_naming_it(
    change: Callable[[nn.Module], None], words: list[str], handle_buffers: str
) -> None:
    model = nn.Linear(4, 3)
    model.register_buffer("extra", torch.ones(2))
    handler = EMAHandler(model, 0.5, 0.25, 3, handle_buffers)

    def step(engine: Engine, batch: int) -> None:
        if batch == 1:
            change(model)
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data.add_(1.0)

    engine = Engine(step)
    handler.attach(engine)
    engine.run([0])
    before = values(handler.ema_model)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - its text is checked below
        engine.run([1])
    for word in words:
        assert word in str(error.value), f"{word!r} is not in {str(error.value)!r}"
    assert changed(before, handler.ema_model) == []
    assert handler.update_index == 1


def test_a_failed_update_shows_the_momentum_that_it_would_have_had() -> None:
    model = nn.Linear(4, 3)
    handler = EMAHandler(model, 0.5, 0.25, 3)
    engine = Engine(lambda engine, batch: with_shape(model) if batch == 1 else None)
    handler.attach(engine)
    engine.run([0])
    assert engine.state.ema_momentum == 0.25
    with pytest.raises(ValueError, match="weight"):
        engine.run([1])
    assert engine.state.ema_momentum == 0.375  # written first, as in Ignite
    assert handler.update_index == 1


@control
def test_control_ignite_swallows_a_changed_buffer() -> None:
    model = nn.Linear(4, 3)
    model.register_buffer("extra", torch.ones(2))
    handler = IgniteHandler(model, 0.5, handle_buffers="update")
    engine = Engine(lambda engine, batch: with_buffer_shape(model))
    handler.attach(engine)
    engine.run([0])
    assert handler.ema_model.extra.shape == (5,)


def by_parameter(model: nn.Module) -> None:
    model.weight = nn.Parameter(torch.full((3, 4), 2.0))


def by_data(model: nn.Module) -> None:
    model.weight.data = torch.full((3, 4), 2.0)


def by_assign(model: nn.Module) -> None:
    state = {"weight": torch.full((3, 4), 2.0), "bias": model.bias.detach().clone()}
    model.load_state_dict(state, assign=True)


def by_cast(model: nn.Module) -> None:
    model.to(torch.float64)
    nn.init.constant_(model.weight, 2.0)


def by_cast_down(model: nn.Module) -> None:
    model.to(torch.bfloat16)
    nn.init.constant_(model.weight, 2.0)


def by_strides(model: nn.Module) -> None:
    model.weight.data = torch.full((4, 3), 2.0).t()


@pytest.mark.parametrize(
    "change", [by_parameter, by_data, by_assign, by_cast, by_cast_down, by_strides]
)
def test_replaced_tensors_are_followed(change: Callable[[nn.Module], None]) -> None:
    model = nn.Linear(4, 3)
    nn.init.ones_(model.weight)
    handler = EMAHandler(model, 0.5)
    engine = Engine(lambda engine, batch: change(model) if batch == 1 else None)
    handler.attach(engine)
    engine.run([0, 1, 0])
    assert handler.ema_model.weight.dtype == torch.float32
    assert handler.ema_model.weight.tolist() == [[1.75] * 4] * 3  # 1 -> 1.5 -> 1.75


@pytest.mark.gpu
def test_moved_models_are_followed() -> None:
    model = nn.Linear(4, 3)
    nn.init.ones_(model.weight)
    handler = EMAHandler(model, 0.5)

    def step(engine: Engine, batch: str) -> None:
        nn.init.constant_(model.to(batch).weight, 2.0)

    engine = Engine(step)
    handler.attach(engine)
    engine.run(["cpu", "cuda", "cpu"])
    assert handler.ema_model.weight.device.type == "cpu"
    assert handler.ema_model.weight.tolist() == [[1.875] * 4] * 3


def reordered(cls: type) -> nn.Module:
    """Layers of one shape change places in the order of registration."""
    model = nn.Module()
    model.first, model.second = nn.Linear(2, 2), nn.Linear(2, 2)
    for value, layer in ((1.0, model.first), (5.0, model.second)):
        nn.init.constant_(layer.weight, value)
    handler = cls(model, 0.5)
    first = model.first
    del model.first
    model.first = first
    assert [name for name, _ in model.named_children()] == ["second", "first"]
    engine = Engine(lambda engine, batch: None)
    handler.attach(engine)
    engine.run([0])
    return handler.ema_model


def test_parameters_are_paired_by_name() -> None:
    ema = reordered(EMAHandler)
    assert ema.first.weight.unique().tolist() == [1.0]
    assert ema.second.weight.unique().tolist() == [5.0]


@control
def test_control_ignite_pairs_by_position() -> None:
    assert reordered(IgniteHandler).first.weight.unique().tolist() == [3.0]


def test_requires_grad_of_the_ema_is_harmless() -> None:
    model, step = counting()
    handler = EMAHandler(model, 0.5)
    handler.ema_model.requires_grad_(True)
    engine = Engine(step)
    handler.attach(engine)
    engine.run(range(2))
    assert handler.ema_model.weight.item() == 2.25
    assert handler.ema_model.weight.is_leaf
    handler.ema_model(torch.ones(1, 1)).sum().backward()
    assert handler.ema_model.weight.grad.item() == 1.0
    assert model.weight.grad is None


@control
def test_control_ignite_needs_requires_grad_off() -> None:
    model, step = counting()
    handler = IgniteHandler(model, 0.5)
    handler.ema_model.requires_grad_(True)
    engine = Engine(step)
    handler.attach(engine)
    with pytest.raises(RuntimeError, match="leaf"):
        engine.run([0])


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
def test_sync_takes_a_model_loaded_later(handle_buffers: str) -> None:
    model = network()
    handler = EMAHandler(model, 0.5, handle_buffers=handle_buffers)
    other = network()
    other(torch.randn(6, 4) + 3)  # statistics and a count of its own
    model.load_state_dict(other.state_dict())
    assert changed(values(model), handler.ema_model) != []
    handler.sync()
    assert changed(values(model), handler.ema_model) == []
    assert shared_storage(handler) == []
    engine = Engine(lambda engine, batch: model[1].weight.data.add_(1.0))
    handler.attach(engine)
    engine.run([0])
    truth = other[1].weight.double() + 0.5
    # One eps of the larger value, see tolerances.update_bound, and one for the step's own rounding.
    bound = 2 * torch.finfo(torch.float32).eps * (other[1].weight.abs().double() + 1)
    assert bool(((handler.ema_model[1].weight.double() - truth).abs() <= bound).all())


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_into_the_ema_go_on(assign: bool) -> None:
    model, step = counting()
    handler = EMAHandler(model, 0.5)
    engine = Engine(step)
    handler.attach(engine)
    engine.run([0])
    handler.ema_model.load_state_dict({"weight": torch.tensor([[7.0]])}, assign=assign)
    engine.run([0])
    assert handler.ema_model.weight.item() == 5.0  # between 7 and 3


def test_a_frozen_parameter_is_averaged() -> None:
    model, step = counting()
    model.requires_grad_(False)
    handler = EMAHandler(model, 0.5)
    engine = Engine(step)
    handler.attach(engine)
    engine.run(range(2))
    assert handler.ema_model.weight.item() == 2.25
