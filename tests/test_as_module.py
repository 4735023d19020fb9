"""`as_module=False`: a state without a module around it does what an EMA model's does."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA
from tests.checkpoint.test_state_dict import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    NAMES,
    Net,
    assert_same_state,
    through_file,
    train,
)
from tests.plain import PlainEMA, assert_same, move

# In any order.
WITHOUT = r"(?s)(?=.*as_module=False)(?=.*swapped\(\))"
GIVEN = r"(?s)(?=.*\bema_model\b)(?=.*as_module=False)"
TRAINED = r"(?s)(?=.*\bema_train\b)(?=.*as_module=False)"


def pair(model: nn.Module, **options: Any) -> tuple[ModelEMA, ModelEMA]:
    """Without a module, and with one."""
    return ModelEMA(model, as_module=False, **options), ModelEMA(model, **options)


def train_both(emas: tuple[ModelEMA, ...], steps: range) -> None:
    for step in steps:
        move(emas[0].model, step)
        for ema in emas:
            ema.update(0.3)


def test_the_error_says_what_to_use_instead() -> None:
    ema = ModelEMA(nn.Linear(2, 2), as_module=False)
    for average in (ema, copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        with pytest.raises(RuntimeError, match=WITHOUT):
            _ = average.ema_model
    # The control.
    assert isinstance(ModelEMA(nn.Linear(2, 2), as_module=True).ema_model, nn.Linear)


def test_an_ema_model_of_ones_own_needs_a_module() -> None:
    model, given = nn.Linear(2, 2), nn.Linear(2, 2)
    before = copy.deepcopy(given.state_dict()), given.training, given.weight.requires_grad
    with pytest.raises(ValueError, match=GIVEN):
        ModelEMA(model, ema_model=given, as_module=False)
    assert_same(given.state_dict(), before[0])
    assert (given.training, given.weight.requires_grad) == before[1:]


def test_an_ema_in_train_mode_needs_a_module() -> None:
    with pytest.raises(ValueError, match=TRAINED):
        ModelEMA(nn.BatchNorm1d(2), handle_buffers="ema_train", as_module=False)


@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
@pytest.mark.parametrize("precision", ["exact", "stochastic", "nearest"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_each_update_is_that_of_an_ema_with_a_module(
    dtype: torch.dtype, precision: str, handle_buffers: str, backend: str
) -> None:
    options: dict[str, Any] = {"precision": precision, "handle_buffers": handle_buffers, "seed": 4}
    emas = pair(Net(dtype), backend=backend, nonfinite="skip", **options)
    without, with_module = emas
    plain = PlainEMA(without.model, handle_buffers=handle_buffers)
    assert without.backend == with_module.backend == backend
    assert_same_state(without, with_module)
    for step in range(4):
        train_both(emas, range(step, step + 1))
        plain.update(0.3)
        assert without.update_index == step + 1
        assert_same_state(without, with_module)
        if precision == "exact" or dtype == FP32:
            plain.check(without.state_dict()["weights"])
    assert without.state_dict()["weights"].keys() == NAMES
    assert without.distance() == with_module.distance()
    assert without.distance().distance > 0
    with torch.no_grad():
        without.model.body.weight[0] = float("nan")
    for ema in emas:
        ema.update(0.3)
    assert without.nonfinite_counts() == with_module.nonfinite_counts()
    assert without.nonfinite_counts()["body.weight"] == 4
    without.model.body.weight.data.fill_(2.0)
    for ema in emas:
        ema.sync()
    assert_same_state(without, with_module)
    assert without.state_dict()["weights"]["body.weight"].eq(2.0).all()
    assert without.distance().distance == 0


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_whatever_becomes_of_the_online_model(dtype: torch.dtype, backend: str) -> None:
    def turn(model: Net) -> None:
        model.body.weight.data = model.body.weight.data.t().contiguous().t()
        model.image.weight.data = model.image.weight.data.contiguous()

    def untie(model: Net) -> None:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())

    def replace(model: Net) -> None:
        model.scale = nn.Parameter(model.scale.detach() * 2)
        model.norm.running_mean = model.norm.running_mean + 1

    emas = pair(Net(dtype), backend=backend)
    plain = PlainEMA(emas[0].model)
    for step, change in enumerate((turn, replace, untie, lambda model: model.bfloat16(), turn)):
        change(emas[0].model)
        train_both(emas, range(step, step + 1))
        plain.update(0.3)
        assert_same_state(*emas)
        own = emas[0].state_dict()["weights"]
        plain.check({k: v for k, v in own.items() if k in plain.averaged} | copied(plain, own))


def copied(plain: PlainEMA, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is not averaged, in the dtype that plain torch has it in."""
    return {
        name: weight.to(plain.values[name].dtype)
        for name, weight in weights.items()
        if name not in plain.averaged
    }


class Evaluated(nn.Module):
    """Whose outputs depend on all that it has."""

    def __init__(self, dtype: torch.dtype = FP32) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6, device=DEVICE, dtype=dtype)
        self.norm = nn.BatchNorm1d(6, device=DEVICE, dtype=dtype)
        self.last = nn.Linear(6, 3, device=DEVICE, dtype=dtype)
        self.register_buffer("shift", torch.randn(3, device=DEVICE, dtype=dtype), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.norm(self.first(inputs))) + self.shift


def positive_variance(model: Evaluated) -> None:
    model.norm.running_var.abs_()


@pytest.mark.parametrize("options", [{}, {"handle_buffers": "update"}, {"exclude": "first"}])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_evaluation_by_swapping_is_that_of_the_module(
    dtype: torch.dtype, options: dict[str, Any], backend: str
) -> None:
    model = Evaluated(dtype)
    emas = without, with_module = pair(model, backend=backend, **options)
    for step in range(3):
        move(model, step)
        positive_variance(model)
        for ema in emas:
            ema.update(0.3)
    inputs = torch.randn(7, 4, device=DEVICE, dtype=dtype)
    model.eval()
    online = copy.deepcopy(model.state_dict())
    expected, own = with_module.ema_model(inputs), model(inputs)
    assert not torch.equal(expected, own)
    before = without.state_dict(clone=True)
    with without.swapped() as evaluated:
        assert evaluated is model
        assert torch.equal(model(inputs), expected)
        inside = without.state_dict()
        for part in ("weights", "residuals"):
            assert_same(inside[part], before[part])
        with pytest.raises(RuntimeError, match="while the models' weights are swapped"):
            without.update(0.3)
    assert_same(model.state_dict(), online)
    assert torch.equal(model(inputs), own)
    with pytest.raises(ZeroDivisionError), without.swapped():
        _ = 1 / 0
    assert_same(model.state_dict(), online)
    # And all goes on as if nothing had been.
    train_both(emas, range(3, 5))
    if not options.get("exclude"):
        assert_same_state(*emas)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("precision", ["exact", "stochastic"])
def test_states_of_one_kind_load_into_the_other(
    precision: str, dtype: torch.dtype, backend: str
) -> None:
    options: dict[str, Any] = {"precision": precision, "backend": backend}
    source = pair(Net(dtype), seed=5, **options)
    train_both(source, range(3))
    target = pair(copy.deepcopy(source[0].model), **options)
    for ema, other in zip(target, reversed(source), strict=True):
        ema.load_state_dict(through_file(other.state_dict()))
        assert_same_state(ema, other)
        assert ema.update_index == 3
    for average in (source, target):
        train_both(average, range(3, 5))
    assert_same_state(target[0], source[0])
    assert_same_state(target[1], source[1])


def test_weights_in_files(tmp_path: Path) -> None:
    files = pytest.importorskip("safetensors.torch")
    emas = pair(Net())
    train_both(emas, range(3))
    for ema, name in zip(emas, ("without", "with"), strict=True):
        ema.save_weights(tmp_path / name)
    found, expected = (files.load_file(tmp_path / name) for name in ("without", "with"))
    assert_same(found, expected)
    assert len(found) == len(NAMES) - 1  # of the tied two, one
    others = pair(Net())
    for ema in others:
        ema.load_weights(tmp_path / "without")
        assert_same(ema.state_dict()["weights"], emas[0].state_dict()["weights"])
    # A module's state dict, too.
    state = Net().state_dict()
    for ema in others:
        ema.load_weights(state)
        assert_same(ema.state_dict()["weights"], state)
        with pytest.raises(ValueError, match=r"'scale' is missing"):
            ema.load_state_dict({name: value for name, value in state.items() if name != "scale"})


COPIES: dict[str, Callable[[ModelEMA], ModelEMA]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda ema: pickle.loads(pickle.dumps(ema)),
}


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("precision", ["exact", "stochastic"])
def test_a_copy_is_independent_and_goes_on(precision: str, duplicate: str, backend: str) -> None:
    ema = ModelEMA(
        Net(BF16), as_module=False, precision=precision, nonfinite="skip", backend=backend
    )
    train(ema, range(2))
    ema.model.scale.data.fill_(float("inf"))
    ema.update(0.3)
    ema.model.scale.data.fill_(1.0)
    twin = COPIES[duplicate](ema)
    assert twin.model is not ema.model
    assert twin.nonfinite_counts() == ema.nonfinite_counts()
    assert twin.nonfinite_counts()["scale"] == 1
    before = ema.state_dict(clone=True)
    train(twin, range(3, 6))
    assert_same(ema.state_dict()["weights"], before["weights"])
    assert_same(ema.state_dict()["residuals"], before["residuals"])
    assert not torch.equal(before["weights"]["scale"], twin.state_dict()["weights"]["scale"])
    train(ema, range(3, 6))
    assert_same_state(ema, twin)


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("an open file")


def test_the_module_is_not_copied(backend: str) -> None:
    model = nn.Sequential(Uncopyable(3, 3, device=DEVICE))
    with pytest.raises(RuntimeError, match=r"cannot be copied.*an open file"):
        ModelEMA(model, backend=backend)
    ema = ModelEMA(model, as_module=False, backend=backend)
    plain = PlainEMA(model)
    for step in range(2):
        move(model, step)
        ema.update(0.3)
        plain.update(0.3)
    plain.check(ema.state_dict()["weights"])
    with ema.swapped():
        assert_same(dict(model.named_parameters()), ema.state_dict()["weights"])


CHOICES: dict[str, dict[str, Any]] = {
    "exclude": {"exclude": ["body", "embedding"]},
    "include": {"include": ["image", "norm", "waves", "scale", "nothing", "frozen"]},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_what_is_left_out_is_not_held(
    dtype: torch.dtype, handle_buffers: str, choice: str, backend: str
) -> None:
    """Nor in a state; buffers neither, where `include` does not name them."""
    options: dict[str, Any] = {"handle_buffers": handle_buffers, "backend": backend}
    model = Net(dtype)
    ema = ModelEMA(model, as_module=False, **CHOICES[choice], **options)
    whole = ModelEMA(model, **options)
    left_out = {"body.weight", "body.bias", "embedding.weight", "head.weight"}
    left_out |= {"mask"} if choice == "include" else set()
    train_both((ema, whole), range(3))
    state, expected = ema.state_dict(), whole.state_dict()
    assert state["weights"].keys() == NAMES - left_out
    assert not left_out & state["residuals"].keys()
    assert_same(state["weights"], {name: expected["weights"][name] for name in NAMES - left_out})
    online = copy.deepcopy(model.state_dict())
    with ema.swapped():
        swapped = {name: value.detach().clone() for name, value in tensors(model).items()}
    for name, value in swapped.items():
        assert torch.equal(value, online[name] if name in left_out else state["weights"][name])
    assert_same(model.state_dict(), online)
    other = ModelEMA(copy.deepcopy(model), as_module=False, **CHOICES[choice], **options)
    other.load_state_dict(through_file(state))
    assert_same_state(other, ema)
    train_both((ema, whole), range(3, 5))
    ema.sync()
    whole.sync()
    for name, value in ema.state_dict()["weights"].items():
        assert torch.equal(value, whole.state_dict()["weights"][name]), name


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Its state dict, without the hooks that warn of a swap."""
    found = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return {name: found[name] for name in NAMES}


def test_a_handler_evaluates_by_swapping() -> None:
    engine = pytest.importorskip("ignite.engine")
    from ema_triton import EMAHandler

    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    handler = EMAHandler(model, momentum=0.5, as_module=False)
    with pytest.raises(RuntimeError, match=WITHOUT):
        _ = handler.ema_model
    trainer = engine.Engine(lambda engine, batch: model.weight.data.fill_(batch).item())
    seen: list[float] = []
    evaluator = engine.Engine(lambda engine, batch: seen.append(model.weight.item()))
    handler.attach(trainer)
    handler.attach_swap(evaluator)
    trainer.add_event_handler(engine.Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
    trainer.run([1.0, 2.0], max_epochs=2)
    # 0.5 and 1.25, then 1.125 and 1.5625.
    assert seen == [1.25, 1.5625]
    assert model.weight.item() == 2.0
    assert handler.ema.state_dict()["weights"]["weight"].item() == 1.5625
    assert trainer.state.ema_momentum == 0.5
    other = EMAHandler(nn.Linear(1, 1, bias=False), momentum=0.5, as_module=False)
    other.load_state_dict(handler.state_dict())
    assert other.update_index == 4
    assert other.ema.state_dict()["weights"]["weight"].item() == 1.5625
    handler.sync()
    assert handler.ema.state_dict()["weights"]["weight"].item() == 2.0


def test_a_handler_refuses_what_the_ema_refuses() -> None:
    pytest.importorskip("ignite")
    from ema_triton import EMAHandler

    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=TRAINED):
        EMAHandler(model, handle_buffers="ema_train", as_module=False)
    with pytest.raises(ValueError, match=GIVEN):
        EMAHandler(model, ema_model=nn.Linear(1, 1), as_module=False)


def test_a_parameter_filled_later_is_an_error_though_another_empty_one_is_left_out() -> None:
    model = nn.ModuleDict(
        {"head": nn.Linear(2, 2, bias=False), "body": nn.Linear(2, 2, bias=False)}
    )
    ema = ModelEMA(model, as_module=False, exclude="head")
    model["body"].bias = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"lacks: 'body\.bias'"):
        ema.update(0.5)
