"""Tensors that are copied and not averaged: buffers, integers. The copy touches nothing else."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ema_triton import ModelEMA


class Buffers(nn.Module):
    """A parameter and the given buffers."""

    def __init__(self, **buffers: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def test_tied_buffers_that_come_apart() -> None:
    model = nn.Sequential(Buffers(count=torch.tensor(0)), Buffers())
    model[1].register_buffer("count", model[0].count)
    ema = ModelEMA(model)
    for step in range(3):
        model[0].count = model[0].count + 1
        model[1].count = model[1].count + 10
        ema.update(0.5)
        assert ema.ema_model[0].count == step + 1
        assert ema.ema_model[1].count == 10 * (step + 1)


def test_buffers_that_are_views_of_one_another() -> None:
    base = torch.arange(4)
    model = Buffers(a=base[:3], b=base[1:])
    ema = ModelEMA(model)
    model.a, model.b = torch.tensor([10, 20, 30]), torch.tensor([1, 2, 3])
    ema.update(0.5)
    assert ema.ema_model.a.tolist() == [10, 20, 30]
    assert ema.ema_model.b.tolist() == [1, 2, 3]


class Counting(Buffers):
    def forward(self, inputs: Tensor) -> Tensor:
        self.count = self.count + 1
        return inputs * self.weight


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
def test_an_ema_buffer_that_its_own_forward_assigned_in_inference_mode(handle_buffers: str) -> None:
    model = Counting(count=torch.zeros(()))
    ema = ModelEMA(model, handle_buffers=handle_buffers)
    for _ in range(2):
        with torch.inference_mode():
            ema.ema_model(torch.ones(2))
        model.count = torch.tensor(7.0)
        ema.update(0.5)
        ema.update(0.5)
    ema.sync()
    assert ema.ema_model.count == 7.0


def test_an_ema_model_moved_or_made_in_inference_mode() -> None:
    model = nn.BatchNorm1d(2)
    ema = ModelEMA(model)
    with torch.inference_mode():
        ema.ema_model.to(torch.float64)
        twin = nn.BatchNorm1d(2)
    for average in (ema, ModelEMA(model, ema_model=twin)):
        model.weight.data.fill_(3.0)
        average.update(1.0)
        assert average.ema_model.weight.eq(3.0).all()


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
def test_expanded_buffers(handle_buffers: str) -> None:
    model = Buffers(position=torch.arange(4).expand(2, -1))
    ema = ModelEMA(model, handle_buffers=handle_buffers)
    model.position = torch.arange(1, 5).expand(2, -1)
    ema.update(0.5)
    ema.sync()
    assert torch.equal(ema.ema_model.position, model.position)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.tensor(1), torch.tensor(0.75)),
        (torch.tensor(False), torch.tensor(5)),
        (torch.tensor(0, dtype=torch.int32), torch.tensor(2**40)),
        (torch.tensor(1.0), torch.tensor(1 + 2j)),
    ],
)
def test_a_buffer_of_a_new_dtype_is_copied_exactly(before: Tensor, after: Tensor) -> None:
    model = Buffers(buffer=before)
    ema = ModelEMA(model)
    model.buffer = after
    ema.update(0.5)
    assert ema.ema_model.buffer.dtype == after.dtype
    assert torch.equal(ema.ema_model.buffer, after)


def test_an_integer_parameter_that_becomes_floating_is_averaged() -> None:
    model = Buffers()
    model.table = nn.Parameter(torch.tensor([1, 3]), requires_grad=False)
    ema = ModelEMA(model)
    model.table = nn.Parameter(torch.tensor([2.0, 5.0]))
    ema.update(0.5)
    assert ema.ema_model.table.tolist() == [1.5, 4.0]


@pytest.mark.parametrize("after", [torch.ones(2, 3).to_sparse(), torch.ones(4).to_sparse()])
def test_a_buffer_that_cannot_be_copied_stops_the_update_before_it_starts(after: Tensor) -> None:
    model = Buffers(buffer=torch.zeros(2, 3))
    ema = ModelEMA(model)
    model.weight.data.fill_(1.0)
    model.buffer = after
    with pytest.raises(TypeError, match="'buffer'"):
        ema.update(0.5)
    assert ema.ema_model.weight.eq(0.0).all()
    model.buffer = torch.ones(2, 3)
    ema.update(0.5)
    assert ema.ema_model.weight.eq(0.5).all()


def test_a_batch_kept_by_the_ema_model_is_not_written() -> None:
    class Keeping(Buffers):
        def forward(self, inputs: Tensor) -> None:
            self.last = inputs

    model = Keeping(last=torch.zeros(2))
    ema = ModelEMA(model)
    data = torch.arange(4.0).view(2, 2)
    model(data[0])
    ema.ema_model(data[1])
    ema.update(0.5)
    assert data.tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert ema.ema_model.last.tolist() == [0.0, 1.0]


def test_a_buffer_taken_from_the_online_model_is_separated() -> None:
    model = Buffers(buffer=torch.zeros(2))
    ema = ModelEMA(model)
    ema.ema_model.buffer = model.buffer
    ema.update(0.5)
    assert ema.ema_model.buffer.data_ptr() != model.buffer.data_ptr()


def test_a_persistent_buffer_filled_later_is_copied_from_then_on() -> None:
    model = Buffers(scale=None)
    ema = ModelEMA(model)
    model.scale = torch.ones(2)
    ema.update(0.5)
    assert torch.equal(ema.ema_model.scale, model.scale)
    model.scale.fill_(3.0)
    ema.update(0.5)
    assert torch.equal(ema.ema_model.scale, model.scale)


def test_unchanged_copies_need_no_new_plan() -> None:
    model = nn.BatchNorm1d(2)
    ema = ModelEMA(model)
    plan = ema._planner.plan
    model.num_batches_tracked += 1
    model.running_mean = torch.ones(2)
    ema.update(0.5)
    assert ema._planner.plan is plan
    assert ema.ema_model.running_mean.eq(1.0).all()


class ForeachCopies(TorchDispatchMode):
    """Notes the (EMA dtype, online dtype) of all tensors of each `torch._foreach_copy_`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[set[tuple[torch.dtype, torch.dtype]]] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten._foreach_copy_.default:
            ema, online = arguments[:2]
            self.seen.append({(e.dtype, o.dtype) for e, o in zip(ema, online, strict=True)})
        return function(*arguments, **(keywords or {}))


def test_tensors_of_one_dtype_are_copied_in_one_call() -> None:
    layers = [nn.BatchNorm1d(2, dtype=torch.float16 if i % 3 == 0 else None) for i in range(9)]
    model = nn.Sequential(*layers)
    ema = ModelEMA(model, precision="nearest")
    for index, layer in enumerate(layers):
        layer.running_mean.fill_(float(index))
        layer.num_batches_tracked += index
    with ForeachCopies() as copies:
        ema.update(0.5)
    kinds = [(dtype, dtype) for dtype in (torch.float16, torch.float32, torch.int64)]
    assert sorted(map(str, copies.seen)) == sorted(str({kind}) for kind in kinds)
    for ours, layer in zip(ema.ema_model, layers, strict=True):
        assert torch.equal(ours.running_mean, layer.running_mean)
        assert torch.equal(ours.num_batches_tracked, layer.num_batches_tracked)


def test_extra_state_is_in_the_modules_state_dict_alone() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Tensor:
            return torch.ones(3)

        def set_extra_state(self, value: Tensor) -> None:
            raise AssertionError

    ema = ModelEMA(Extra(2, 2))
    assert [*ema.state_dict()["weights"]] == ["weight", "bias"]
    assert "_extra_state" in ema.ema_model.state_dict()
    ema.load_weights(ema.ema_model.state_dict())  # which leaves it out


def test_a_model_that_holds_its_own_ema_can_be_copied() -> None:
    model = nn.Linear(2, 2)
    object.__setattr__(model, "ema", ModelEMA(model))
    twin = copy.deepcopy(model)
    twin.weight.data.fill_(4.0)
    twin.ema.update(1.0)
    assert twin.ema.ema_model.weight.eq(4.0).all()
    assert not model.ema.ema_model.weight.eq(4.0).any()
