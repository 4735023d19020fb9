"""The online model with the EMA's weights as a teacher, in the middle of a training step."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA

INPLACE = "modified by an inplace operation"
DTYPES = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]


class Net(nn.Module):
    """Every backward formula of it needs a weight, or the buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5, dtype=dtype)
        self.norm = nn.LayerNorm(5, dtype=dtype)
        self.last = nn.Linear(5, 3, dtype=dtype)
        self.register_buffer("scale", torch.full((3,), 2.0, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.norm(self.first(inputs)).tanh()) * self.scale


def averaged(
    dtype: torch.dtype = torch.float32, ema_dtype: torch.dtype | None = None, **options: Any
) -> ModelEMA:
    """An EMA whose weights and buffers all differ from the online ones."""
    torch.manual_seed(0)
    ema = ModelEMA(Net(dtype), ema_dtype=ema_dtype, handle_buffers="update", **options)
    move(ema.model)
    ema.update(0.25)
    for name, value in ema.state_dict()["weights"].items():
        assert not torch.equal(value.double(), ema.model.state_dict()[name].double()), name
    return ema


@torch.no_grad()
def move(model: nn.Module) -> None:
    for index, tensor in enumerate(model.state_dict().values()):
        tensor.add_(torch.linspace(-1.0, 0.5 + index, tensor.numel()).view(tensor.shape).to(tensor))


def twin_with_the_emas_values(ema: ModelEMA) -> nn.Module:
    """A model of its own, in the online dtypes."""
    twin = copy.deepcopy(ema.model)
    twin.load_state_dict({k: v.clone() for k, v in ema.state_dict()["weights"].items()})
    return twin


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1.0, 1.0, 24, dtype=dtype).view(6, 4)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def gradients_with(model: nn.Module, teacher: nn.Module, inputs: Tensor) -> list[Tensor]:
    """The reference: two models, nothing is swapped."""
    student, teacher = copy.deepcopy(model), copy.deepcopy(teacher)
    student.zero_grad()
    with torch.no_grad():
        target = teacher(inputs)
    (student(inputs) - target).square().sum().backward()
    return gradients(student)


def by_context(ema: ModelEMA, inputs: Tensor) -> Tensor:
    with torch.no_grad(), ema.swapped() as teacher:
        return teacher(inputs)


def in_inference_mode(ema: ModelEMA, inputs: Tensor) -> Tensor:
    with ema.swapped() as teacher, torch.inference_mode():
        target = teacher(inputs)
    return target.clone()


def swapped_in_inference_mode(ema: ModelEMA, inputs: Tensor) -> Tensor:
    with torch.inference_mode(), ema.swapped() as teacher:
        target = teacher(inputs)
    return target.clone()


def by_hand(ema: ModelEMA, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        target = ema.swap_in()(inputs)
    ema.swap_out()
    return target


def twice(ema: ModelEMA, inputs: Tensor) -> Tensor:
    by_context(ema, inputs)
    return by_context(ema, inputs)


def after_an_error(ema: ModelEMA, inputs: Tensor) -> Tensor:
    with pytest.raises(ValueError, match="no"), ema.swapped():
        raise ValueError("no")
    return by_context(ema, inputs)


TEACHERS = [by_context, in_inference_mode, swapped_in_inference_mode, by_hand, twice]
TEACHERS += [after_an_error]


@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize("teach", TEACHERS)
@pytest.mark.parametrize(("dtype", "ema_dtype"), DTYPES)
def test_gradients_are_those_with_an_ema_model(
    dtype: torch.dtype, ema_dtype: torch.dtype | None, teach: Callable, as_module: bool
) -> None:
    ema, inputs = averaged(dtype, ema_dtype, as_module=as_module), batch(dtype)
    teacher = twin_with_the_emas_values(ema)
    expected = gradients_with(ema.model, teacher, inputs)
    assert any(
        not torch.equal(one, other)
        for one, other in zip(expected, gradients_with(ema.model, ema.model, inputs), strict=True)
    )  # the control: the teacher counts
    loss = ema.model(inputs)
    target = teach(ema, inputs)
    assert torch.equal(target, teacher(inputs))
    (loss - target).square().sum().backward()
    assert all(map(torch.equal, gradients(ema.model), expected))


def test_a_training_by_its_own_teacher_is_that_by_an_ema_model() -> None:
    """Optimizer, update and swap in turns."""
    ema = averaged()
    other = copy.deepcopy(ema)
    optimizers = [torch.optim.SGD(one.model.parameters(), lr=0.01) for one in (ema, other)]
    for step in range(3):
        inputs = batch() + step
        for one, optimizer in zip((ema, other), optimizers, strict=True):
            student = one.model(inputs)
            if one is ema:
                target = by_context(one, inputs)
            else:
                with torch.no_grad():
                    target = one.ema_model(inputs)
            optimizer.zero_grad()
            (student - target).square().mean().backward()
            optimizer.step()
            one.update(0.25)
    for name, value in ema.state_dict()["weights"].items():
        assert torch.equal(value, other.state_dict()["weights"][name]), name
    for name, value in ema.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_an_optimizers_step_before_the_backward_stays_autograds_error() -> None:
    """The swap hides its own writes, and no others."""
    ema, inputs = averaged(), batch()
    loss = ema.model(inputs).square().sum()
    by_context(ema, inputs)
    move(ema.model)
    with pytest.raises(RuntimeError, match=INPLACE):
        loss.backward()


@pytest.mark.parametrize(("dtype", "ema_dtype"), DTYPES)
def test_a_backward_inside_of_a_graph_made_before_is_an_error_or_right(
    dtype: torch.dtype, ema_dtype: torch.dtype | None
) -> None:
    ema, inputs = averaged(dtype, ema_dtype), batch(dtype)
    reference = copy.deepcopy(ema.model)
    reference(inputs).square().sum().backward()
    loss = ema.model(inputs).square().sum()
    with ema.swapped():
        try:
            loss.backward()
        except RuntimeError as error:
            assert INPLACE in str(error)  # noqa: PT017 - no error would do as well
        else:
            assert all(map(torch.equal, gradients(ema.model), gradients(reference)))


def test_a_backward_inside_of_a_graph_made_inside_is_that_of_the_ema() -> None:
    ema, inputs = averaged(), batch()
    twin = twin_with_the_emas_values(ema)
    twin(inputs).square().sum().backward()
    with ema.swapped() as model:
        model(inputs).square().sum().backward()
    assert all(map(torch.equal, gradients(ema.model), gradients(twin)))


def nothing(ema: ModelEMA) -> None:
    pass


def another_swap(ema: ModelEMA) -> None:
    by_context(ema, batch(ema.model.scale.dtype))


def an_update(ema: ModelEMA) -> None:
    ema.update(0.25)


def a_step_and_an_update(ema: ModelEMA) -> None:
    move(ema.model)
    ema.update(0.25)


BETWEEN = [nothing, another_swap, an_update, a_step_and_an_update]


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize(("dtype", "ema_dtype"), DTYPES)
def test_a_backward_outside_of_a_graph_made_inside_is_an_error(
    dtype: torch.dtype, ema_dtype: torch.dtype | None, between: Callable[[ModelEMA], None]
) -> None:
    ema, inputs = averaged(dtype, ema_dtype), batch(dtype)
    with ema.swapped() as model:
        loss = model(inputs).square().sum()
    between(ema)
    with pytest.raises(RuntimeError, match=INPLACE):
        loss.backward()


@pytest.mark.parametrize("between", [an_update, a_step_and_an_update])
def test_a_backward_in_a_later_swap_of_a_graph_made_in_an_earlier_one_is_an_error(
    between: Callable[[ModelEMA], None],
) -> None:
    """By then the EMA has other values: the version of one swap must not be that of the next."""
    ema, inputs = averaged(), batch()
    with ema.swapped() as model:
        loss = model(inputs).square().sum()
    between(ema)
    with ema.swapped(), pytest.raises(RuntimeError, match=INPLACE):
        loss.backward()


def autocast() -> AbstractContextManager:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_autocast_keeps_casts_of_weights() -> None:
    """The premise of the tests below."""
    layer, inputs = nn.Linear(4, 3), batch()
    with autocast():
        first = layer(inputs)
        move(layer)
        assert torch.equal(layer(inputs), first)
    with autocast():
        assert not torch.equal(layer(inputs), first)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("as_module", [True, False])
def test_inside_autocast_each_model_is_evaluated_with_its_own_weights(
    as_module: bool, grad: bool
) -> None:
    ema, inputs = averaged(as_module=as_module), batch()
    twin = twin_with_the_emas_values(ema)
    with autocast():
        online, emas = ema.model(inputs), twin(inputs)
    assert not torch.equal(online, emas)
    with autocast():
        assert torch.equal(ema.model(inputs), online)
        with ema.swapped() as model, torch.set_grad_enabled(grad):
            assert torch.equal(model(inputs), emas)
        assert torch.equal(ema.model(inputs), online)


@pytest.mark.parametrize("as_module", [True, False])
def test_training_inside_autocast_goes_on_with_the_online_weights(as_module: bool) -> None:
    """Their gradients, after an evaluation that came first."""
    ema, inputs = averaged(as_module=as_module), batch()
    reference = copy.deepcopy(ema.model)
    with autocast():
        reference(inputs).square().sum().backward()
    with autocast():
        with ema.swapped() as model:
            model(inputs)
        loss = ema.model(inputs).square().sum()
    loss.backward()
    assert all(map(torch.equal, gradients(ema.model), gradients(reference)))


def test_a_teacher_inside_autocast_between_forward_and_backward() -> None:
    ema, inputs = averaged(), batch()
    with autocast():
        expected = gradients_with(ema.model, twin_with_the_emas_values(ema), inputs)
    with autocast():
        student = ema.model(inputs)
        target = by_context(ema, inputs)
        (student - target).square().sum().backward()
    assert all(map(torch.equal, gradients(ema.model), expected))


def pair() -> tuple[nn.Module, ModelEMA, ModelEMA]:
    """The online weight 1, and an EMA of 0.5 and one of 0.25 beside it."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    first, second = ModelEMA(model), ModelEMA(model)
    model.weight.data.fill_(1.0)
    first.update(0.5)
    second.update(0.25)
    return model, first, second


SECONDS: dict[str, Callable[[ModelEMA], object]] = {
    "update()": lambda ema: ema.update(0.5),
    "sync()": lambda ema: ema.sync(),
    "swapped()": lambda ema: ema.swapped().__enter__(),
    "swap_in()": lambda ema: ema.swap_in(),
}
OPENED: dict[str, Callable[[ModelEMA], object]] = {
    "context": lambda ema: ema.swapped().__enter__(),
    "by hand": lambda ema: ema.swap_in(),
}
# It is another EMA whose swap is open.
OPEN = r"(?is)(?=.*\b(another|other)\b)(?=.*ema)(?=.*swap)"


@pytest.mark.parametrize("call", SECONDS)
def test_a_second_ema_is_refused_while_the_first_one_is_swapped(call: str) -> None:
    model, first, second = pair()
    with first.swapped():
        assert model.weight.item() == 0.5
        with pytest.raises(RuntimeError, match=OPEN) as caught:
            SECONDS[call](second)
        assert re.search(re.escape(call.replace("swap_in()", "swap")), str(caught.value))
        assert model.weight.item() == 0.5
    assert (model.weight.item(), first.ema_model.weight.item()) == (1.0, 0.5)
    assert (second.ema_model.weight.item(), second.update_index) == (0.25, 1)
    # As if nothing had been: without a warning, and from the online weight.
    second.update(0.5)
    assert second.ema_model.weight.item() == 0.625
    with second.swapped():
        assert model.weight.item() == 0.625
    assert model.weight.item() == 1.0


def test_a_second_ema_is_refused_inside_a_swap_by_hand() -> None:
    _, first, second = pair()
    first.swap_in()
    with pytest.raises(RuntimeError, match=OPEN):
        second.update(0.5)
    first.swap_out()
    second.update(0.5)
    assert second.ema_model.weight.item() == 0.625


def test_a_second_ema_without_a_module_and_one_of_a_part_are_refused_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first = ModelEMA(model)
    others = [ModelEMA(model, as_module=False), ModelEMA(model[0]), ModelEMA(nn.Sequential(model))]
    for other in others:
        with first.swapped(), pytest.raises(RuntimeError, match=OPEN):
            other.update(0.5)
        with other.swapped(), pytest.raises(RuntimeError, match=OPEN):
            first.update(0.5)
    first.update(0.5)


def test_a_second_ema_that_follows_an_optimizer_is_refused_too() -> None:
    model, first, second = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    second.follow(optimizer, lambda index: 0.5)
    model.weight.grad = torch.zeros(1, 1)
    written = pytest.warns(UserWarning, match="was written, or replaced")
    with written, first.swapped(), pytest.raises(RuntimeError, match=OPEN):
        optimizer.step()
    assert (second.ema_model.weight.item(), second.update_index) == (0.25, 1)


def test_an_ema_of_another_model_goes_on() -> None:
    _, first, _ = pair()
    model, other, _ = pair()
    with first.swapped():
        other.update(0.5)
        with other.swapped():
            assert model.weight.item() == 0.75
    assert model.weight.item() == 1.0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_exception_inside_the_second_one_goes_on(error: type[BaseException]) -> None:
    _, first, second = pair()
    with pytest.raises(error), first.swapped():
        raise error
    second.update(0.5)
    assert second.ema_model.weight.item() == 0.625


def test_an_ema_that_is_gone_with_its_swap_open_does_not_block_a_new_model() -> None:
    """What is remembered of a swap belongs to the online model, not to an address."""
    for _ in range(3):
        model, first, second = pair()
        first.swap_in()
        del model, first, second
    _, _, second = pair()
    second.update(0.5)
    assert second.ema_model.weight.item() == 0.625
