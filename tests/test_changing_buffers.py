"""Buffers that change their shape, appear or vanish: caches that grow, observers, lazy buffers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA

WITH_AND_WITHOUT = pytest.mark.parametrize("kind", ["module", "given", "without"])
PERSISTENT = pytest.mark.parametrize("persistent", [True, False])
MODES = pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])


class Cache(nn.Module):
    """Keeps a table of positions as long as the longest sequence; `length` is not a buffer."""

    def __init__(self, persistent: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.persistent, self.dtype, self.length = persistent, dtype, 0
        self.fill(3)

    def fill(self, length: int) -> None:
        table = torch.arange(length, dtype=self.dtype)
        self.register_buffer("table", table, persistent=self.persistent)
        self.length = length

    def forward(self, length: int) -> Tensor:
        if length > self.length:
            self.fill(length)
        return self.table[:length] + self.weight.sum()


class Normed(nn.Module):
    """A module inside, which the tests give and take buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(2)
        self.inner.register_buffer("late", None)
        self.inner.register_buffer("mean", torch.zeros(2))


def built(model: nn.Module, kind: str, **options: Any) -> ModelEMA:
    if kind == "given":
        options["ema_model"] = copy.deepcopy(model)
    return ModelEMA(model, as_module=kind != "without", **options)


def weights(ema: ModelEMA) -> dict[str, Tensor]:
    return ema.state_dict()["weights"]


def train(ema: ModelEMA, *arguments: Any, expected: float) -> None:
    """A step that moves the weight from 1 to 2, and so the average."""
    if arguments:
        ema.model(*arguments)
    ema.model.weight.data.fill_(2.0)
    ema.update(0.5)
    assert weights(ema)["weight"].eq(expected).all()


@WITH_AND_WITHOUT
def test_a_copied_cache_that_grew_does_not_stop_the_training(kind: str) -> None:
    ema = built(Cache(), kind)
    train(ema, 5, expected=1.5)
    table = weights(ema)["table"]
    assert table.tolist() == [0, 1, 2, 3, 4]
    assert table.untyped_storage().data_ptr() != ema.model.table.untyped_storage().data_ptr()
    ema.model.table.add_(1)  # and is copied from then on
    train(ema, expected=1.75)
    assert weights(ema)["table"].tolist() == [1, 2, 3, 4, 5]
    ema.model.fill(1)
    train(ema, expected=1.875)
    assert weights(ema)["table"].tolist() == [0]


def test_under_the_handler_too() -> None:
    pytest.importorskip("ignite")
    from ignite.engine import Engine

    from ema_triton import EMAHandler

    model = Cache()
    handler = EMAHandler(model, 0.5)
    trainer = Engine(lambda engine, length: model(length))
    evaluator = Engine(lambda engine, length: model(length))
    handler.attach(trainer)
    handler.attach_swap(evaluator)
    for length in (4, 9, 6):
        evaluator.run([length + 5])
        handler.ema_model(length + 7)
        trainer.run([length])
        assert torch.equal(handler.ema_model.table, model.table)


def resize(model: nn.Module) -> None:
    model.table.resize_(5).copy_(torch.arange(5))


@pytest.mark.parametrize("grow", [lambda model: model(5), resize], ids=["replaced", "resized"])
@pytest.mark.parametrize("kind", ["module", "given"])
def test_a_copied_cache_that_grew_in_the_ema_model_alone_is_the_online_models_again(
    kind: str, grow: Callable[[nn.Module], object]
) -> None:
    ema = built(Cache(), kind)
    grow(ema.ema_model)
    assert len(ema.ema_model.table) == 5
    train(ema, expected=1.5)
    assert torch.equal(ema.ema_model.table, ema.model.table)
    assert len(ema.ema_model.table) == 3


def test_one_element_is_not_spread_over_a_buffer_that_the_ema_model_enlarged() -> None:
    model = Cache()
    model.fill(1)
    ema = ModelEMA(model)
    ema.ema_model.table.resize_(4)
    ema.update(0.5)
    assert ema.ema_model.table.shape == (1,)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (torch.int32, torch.int64, torch.int64),
        (torch.int64, torch.float32, torch.float32),
        (torch.float32, torch.int64, torch.int64),
        (torch.float32, torch.bfloat16, torch.float32),  # the EMA keeps its floating dtype
    ],
)
def test_a_new_dtype_comes_with_the_new_shape(
    before: torch.dtype, after: torch.dtype, expected: torch.dtype
) -> None:
    model = Cache(dtype=before)
    ema = ModelEMA(model)
    model.dtype = after
    train(ema, 5, expected=1.5)
    assert weights(ema)["table"].dtype == expected
    assert weights(ema)["table"].tolist() == [0, 1, 2, 3, 4]


APPEARING: dict[str, Callable[[nn.Module], None]] = {
    "inner.late": lambda model: setattr(model.inner, "late", torch.ones(4)),
    "inner.new": lambda model: model.inner.register_buffer("new", torch.ones(4)),
    "new": lambda model: model.register_buffer("new", torch.ones(4)),
}


@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
@pytest.mark.parametrize("name", APPEARING)
@WITH_AND_WITHOUT
def test_a_persistent_buffer_that_appears_is_the_emas_too(
    kind: str, name: str, handle_buffers: str
) -> None:
    model = Normed()
    ema = built(model, kind, handle_buffers=handle_buffers)
    APPEARING[name](model)
    ema.update(0.5)
    assert weights(ema)[name].eq(1.0).all()
    if kind != "without":
        assert torch.equal(ema.ema_model.get_buffer(name), weights(ema)[name])
        assert name in ema.ema_model.state_dict()
    model.get_buffer(name).fill_(3.0)
    ema.update(0.5)
    assert weights(ema)[name].eq(3.0 if handle_buffers == "copy" else 2.0).all()
    twin = built(model, kind, handle_buffers=handle_buffers)
    twin.load_state_dict(ema.state_dict())
    assert torch.equal(weights(twin)[name], weights(ema)[name])


def delete(model: nn.Module) -> None:
    del model.inner.mean


def empty(model: nn.Module) -> None:
    model.inner.mean = None


@pytest.mark.parametrize("vanish", [delete, empty])
@WITH_AND_WITHOUT
def test_a_copied_buffer_that_vanishes_vanishes_from_the_ema(
    kind: str, vanish: Callable[[nn.Module], None]
) -> None:
    model = Normed()
    ema = built(model, kind)
    vanish(model)
    ema = pickle.loads(pickle.dumps(ema))
    model = ema.model
    ema.update(0.5)
    assert "inner.mean" not in weights(ema)
    if kind != "without":
        assert ("mean" in ema.ema_model.inner._buffers) == (vanish is empty)
        assert ema.ema_model.state_dict().keys() == model.state_dict().keys()
    plan = ema._planner.plan
    ema.update(0.5)
    assert ema._planner.plan is plan
    model.inner.register_buffer("mean", torch.ones(3))
    ema.update(0.5)
    assert weights(ema)["inner.mean"].tolist() == [1.0] * 3


def test_a_buffer_of_a_module_that_the_ema_model_lacks_is_an_error() -> None:
    model = Normed()
    ema = ModelEMA(model)
    model.more = nn.BatchNorm1d(2, affine=False)
    with pytest.raises(ValueError, match=r"EMA model lacks: 'more\.running_mean'.*Build a new"):
        ema.update(0.5)
    del model.more
    ema.update(0.5)
    ema = ModelEMA(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)))
    del ema.model[1]
    with pytest.raises(ValueError, match=r"online model lacks: '1\.running_mean'.*Build a new"):
        ema.update(0.5)
    assert len(ema.ema_model[1]._buffers) == 3


def test_a_given_ema_model_with_a_buffer_too_many_is_an_error_and_keeps_it() -> None:
    model, given = Normed(), Normed()
    given.inner.late = torch.ones(2)
    with pytest.raises(ValueError, match=r"online model lacks: 'inner\.late'"):
        ModelEMA(model, ema_model=given)
    assert given.inner.late.eq(1.0).all()


@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
def test_a_persistent_buffer_that_the_ema_models_forward_made_is_its_own(
    handle_buffers: str,
) -> None:
    model = Normed()
    ema = ModelEMA(model, handle_buffers=handle_buffers)
    ema.ema_model.inner.late = torch.ones(2)
    ema.ema_model.inner.register_buffer("made", torch.ones(2))
    for _ in range(2):
        ema.update(0.5)
        model.inner.weight = nn.Parameter(torch.ones(2))  # makes a new plan
    assert ema.ema_model.inner.late.eq(1.0).all()
    assert ema.ema_model.inner.made.eq(1.0).all()


@MODES
@PERSISTENT
@pytest.mark.parametrize("side", ["ema_model", "model", "swapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_validating_longer_sequences_does_not_stop_the_training(
    side: str, persistent: bool, handle_buffers: str, dtype: torch.dtype
) -> None:
    if (side, persistent, handle_buffers, dtype) == ("model", True, "update", torch.float32):
        return  # an averaged tensor, see below
    ema = ModelEMA(Cache(persistent, dtype), handle_buffers=handle_buffers)
    for round_, expected in enumerate((1.5, 1.75, 1.875)):
        for length in (2, 6 + 2 * round_):
            if side == "swapped":
                with ema.swapped() as model:
                    model.eval()(length)
                    model.train()
            else:
                getattr(ema, side)(length)
        if persistent:  # such a table is a part of the state, and so is its length
            for one in (ema.model, ema.ema_model):
                one.length = len(one.table)
        train(ema, 2, expected=expected)
        if persistent:
            ema.ema_model.length = len(ema.ema_model.table)


@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
def test_a_non_persistent_cache_of_another_length_is_each_models_own(handle_buffers: str) -> None:
    ema = ModelEMA(Cache(persistent=False), handle_buffers=handle_buffers)
    train(ema, 5, expected=1.5)
    assert (len(ema.model.table), len(ema.ema_model.table)) == (5, 3)
    ema.ema_model(9)
    train(ema, 6, expected=1.75)
    assert (len(ema.model.table), len(ema.ema_model.table)) == (6, 9)
    plan = ema._planner.plan
    train(ema, 7, expected=1.875)
    assert ema._planner.plan is plan  # though it grows at every step
    assert torch.equal(ema.ema_model.table, torch.arange(9.0))


def test_what_is_each_models_own_keeps_no_memory_of_the_averages() -> None:
    ema = ModelEMA(Cache(persistent=False), handle_buffers="update")
    taken = ema.ema_model.table.data_ptr()
    flat = ema._state.buckets[0].flat
    assert flat.data_ptr() <= taken < flat.data_ptr() + flat.nbytes
    train(ema, 5, expected=1.5)
    taken = ema.ema_model.table.data_ptr()
    assert not flat.data_ptr() <= taken < flat.data_ptr() + flat.nbytes
    assert ema.ema_model.table.tolist() == [0, 1, 2]


def test_an_averaged_buffer_that_changes_its_shape_is_an_error_that_says_what_to_do() -> None:
    ema = ModelEMA(Cache(), handle_buffers="update")
    ema.model(5)
    text = r"'table' is \(5,\) in the online model but \(3,\) .*exclude='table'"
    with pytest.raises(ValueError, match=text):
        ema.update(0.5)
    assert weights(ema)["table"].tolist() == [0, 1, 2]
    del ema.model.table
    with pytest.raises(ValueError, match=r"online model lacks: 'table'"):
        ema.update(0.5)
    assert weights(ema)["table"].tolist() == [0, 1, 2]


@WITH_AND_WITHOUT
def test_excluded_from_the_average_it_is_copied(kind: str) -> None:
    ema = built(Cache(), kind, handle_buffers="update", exclude="table")
    train(ema, 5, expected=1.5)
    if kind == "without":  # it is not held
        assert "table" not in weights(ema)
        return
    assert weights(ema)["table"].tolist() == [0, 1, 2, 3, 4]
    del ema.model.table
    train(ema, expected=1.75)
    assert "table" not in weights(ema)


@pytest.mark.parametrize("precision", ["exact", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_averaged_buffer_that_only_the_ema_models_forward_replaced_starts_anew(
    dtype: torch.dtype, precision: str
) -> None:
    ema = ModelEMA(Cache(dtype=dtype), handle_buffers="update", precision=precision)
    ema.ema_model(5)
    ema.model.table.add_(1)
    train(ema, expected=1.5)
    assert weights(ema)["table"].tolist() == [1, 2, 3]
    ema.model.table.add_(1)
    train(ema, expected=1.75)
    assert weights(ema)["table"].tolist() == [1.5, 2.5, 3.5]


def test_an_averaged_parameter_of_another_shape_in_the_ema_model_stays_an_error() -> None:
    ema = ModelEMA(Cache(), exclude="weight")
    ema.ema_model.weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"'weight' is \(2,\) in the online model but \(3,\)"):
        ema.update(0.5)


@pytest.mark.parametrize("kind", ["module", "given"])
def test_with_ema_train_every_shape_is_the_ema_models_own(kind: str) -> None:
    ema = built(Cache(), kind, handle_buffers="ema_train")
    train(ema, 5, expected=1.5)
    assert ema.ema_model.table.tolist() == [0, 1, 2]
    online = ema.model.table
    with ema.swapped() as model:
        model.eval()
        assert model.table.tolist() == [0, 1, 2]
        assert model.table is not ema.ema_model.table
        model.table.add_(1)
    assert ema.model.table is online
    assert ema.model.table.tolist() == [0, 1, 2, 3, 4]
    assert ema.ema_model.table.tolist() == [0, 1, 2]
    ema.sync()
    assert torch.equal(ema.ema_model.table, online)
    assert ema.ema_model.table is not online


def test_the_first_forward_of_quantization_aware_training() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")

    class Quantized(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.fake = quantization.FakeQuantize(
                quantization.MovingAveragePerChannelMinMaxObserver,
                quant_min=-128,
                quant_max=127,
                dtype=torch.qint8,
                qscheme=torch.per_channel_affine,
                ch_axis=0,
            )

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.fake(self.weight), self.bias)

    for kind in ("module", "given", "without"):
        ema = built(Quantized(), kind)
        assert ema.model.fake.scale.shape == (1,)
        with ema.swapped() as model:
            model(torch.ones(1, 3))
        assert ema.model.fake.scale.shape == (1,)
        assert ema.model.fake.scale.item() == 1.0
        if kind != "without":
            ema.ema_model(torch.ones(1, 3))
        ema.update(0.5)
        assert weights(ema)["fake.scale"].shape == (1,)
        ema.model(torch.ones(1, 3))
        ema.update(0.5)
        for name, buffer in ema.model.named_buffers():
            assert torch.equal(weights(ema)[name], buffer), name
        assert weights(ema)["fake.scale"].shape == (4,)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "grows": lambda model: model.fill(7),
    "grows by its own": lambda model: model.register_buffer(
        "table", torch.cat([model.table, model.table]), persistent=model.persistent
    ),
    "is resized": resize,
    "shrinks": lambda model: model.fill(1),
    "is None": lambda model: setattr(model, "table", None),
    "is deleted": lambda model: delattr(model, "table"),
    "appears": lambda model: model.register_buffer("new", torch.ones(2), model.persistent),
    "is filled": lambda model: setattr(model, "later", torch.ones(2)),
}


@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
@PERSISTENT
@pytest.mark.parametrize("kind", ["module", "without"])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_becomes_of_a_buffer_in_a_swap_the_training_goes_on(
    change: str, kind: str, persistent: bool, handle_buffers: str
) -> None:
    model = Cache(persistent)
    model.register_buffer("later", None, persistent)
    ema = built(model, kind, handle_buffers=handle_buffers)
    model.table.add_(10)
    online = model.table.tolist()
    averages = {name: value.clone() for name, value in weights(ema).items()}
    with ema.swapped() as inside:
        inside.eval()
        CHANGES[change](inside)
        inside.train()
    if persistent:
        assert model.table.tolist() == online
        assert [*model.state_dict()] == ["weight", "table"]
        assert "new" not in model._buffers
    for name, value in averages.items():
        assert torch.equal(weights(ema)[name], value), name
    train(ema, expected=1.5)
    train(ema, expected=1.75)
    with ema.swapped():
        pass


@WITH_AND_WITHOUT
def test_what_another_emas_swap_refuses_changes_nothing(kind: str) -> None:
    """No new plan is made of what its body does to the buffers."""
    model = Cache()
    ema, other = built(model, kind), ModelEMA(model)
    with other.swapped():
        model(5)
        for refused in (lambda: ema.update(0.5), ema.sync, lambda: ema.copy_to(Cache())):
            with pytest.raises(RuntimeError, match=r"another EMA .* Nothing was changed"):
                refused()
        assert weights(ema)["table"].tolist() == [0, 1, 2]
    train(ema, 7, expected=1.5)
    assert weights(ema)["table"].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_a_second_ema_notices_a_swap_of_a_parameter_that_its_plan_does_not_know() -> None:
    model = Cache()
    stale = ModelEMA(model)
    model.weight = nn.Parameter(torch.zeros(2))
    ema = ModelEMA(model)
    with ema.swapped(), pytest.raises(RuntimeError, match="another EMA of this online model"):
        stale.update(0.5)
    stale.update(0.5)
    assert weights(stale)["weight"].eq(0.5).all()


def test_a_loaded_state_with_a_buffer_of_another_shape_is_an_error() -> None:
    ema, other = ModelEMA(Cache()), ModelEMA(Cache())
    train(other, 5, expected=1.5)
    with pytest.raises(ValueError, match=r"'table' is \(5,\) in the state but \(3,\) here"):
        ema.load_state_dict(other.state_dict())
    ema.model(5)
    ema.load_state_dict(other.state_dict())
    assert weights(ema)["weight"].eq(1.5).all()


def test_a_changed_shape_during_a_capture_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ema = ModelEMA(Cache())
    ema.model(5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="A CUDA graph is being captured, and the EMA is not"):
        ema.update(0.5)
    assert weights(ema)["table"].tolist() == [0, 1, 2]
