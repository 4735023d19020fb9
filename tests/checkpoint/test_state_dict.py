"""What a state dict holds: the state by name, as others left it."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA
from tests.plain import LOW, PlainEMA, apart, assert_same, move

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Net(nn.Module):
    """Tied, complex, strided, 0-d, empty and frozen tensors; buffers, one of them not saved."""

    def __init__(self, dtype: torch.dtype = FP32, device: torch.device = DEVICE) -> None:
        super().__init__()
        place: Any = {"dtype": dtype, "device": device}
        self.embedding = nn.Embedding(6, 4, **place)
        self.body = nn.Linear(4, 5, **place)
        self.image = nn.Conv2d(3, 4, 2, **place).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(5, **place)
        self.head = nn.Linear(4, 6, bias=False, **place)
        self.head.weight = self.embedding.weight
        self.waves = nn.Parameter(torch.randn(3, dtype=torch.complex64, device=device))
        self.scale = nn.Parameter(torch.randn((), **place))
        self.nothing = nn.Parameter(torch.empty(0, 2, **place))
        self.frozen = nn.Parameter(torch.randn(3, **place), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False], device=device))
        self.register_buffer("cache", torch.randn(4, **place), persistent=False)


NAMES = {
    *("embedding.weight", "head.weight", "body.weight", "body.bias", "image.weight", "image.bias"),
    *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"),
    *("norm.num_batches_tracked", "waves", "scale", "nothing", "frozen", "mask"),
}


def train(ema: ModelEMA, steps: range, momentum: float = 0.3) -> None:
    for step in steps:
        move(ema.model, step)
        ema.update(momentum)


def assert_same_state(left: ModelEMA, right: ModelEMA) -> None:
    """Bit by bit, with all that belongs to the weights."""
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if key in ("weights", "residuals"):
            assert_same(value, theirs[key])
        else:
            assert value == theirs[key], key


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location=DEVICE)


KEYS = {
    *("version", "update_index", "schedule", "weights", "precision", "residuals"),
    "random_state",
}


@pytest.mark.parametrize("precision", ["exact", "stochastic", "nearest"])
def test_the_format(precision: str, backend: str) -> None:
    ema = ModelEMA(Net(BF16), precision=precision, seed=7, backend=backend)
    train(ema, range(2))
    state = ema.state_dict()
    assert state.keys() == KEYS
    assert (state["version"], state["update_index"], state["schedule"]) == (2, 2, None)
    assert state["precision"] == precision
    random_state = {"seed": 7, "updates": 2} if precision == "stochastic" else None
    assert state["random_state"] == random_state
    assert state["weights"].keys() == NAMES
    # The bf16 tensors have residuals; the one without elements may have one.
    low = {"body.weight", "body.bias", "image.weight", "image.bias", "norm.weight", "norm.bias"}
    low |= {"embedding.weight", "head.weight", "scale", "frozen"}
    assert state["residuals"].keys() - {"nothing"} == (low if precision == "exact" else set())
    other = ModelEMA(Net(BF16), precision=precision, backend=backend)
    other.load_state_dict(through_file(state))
    assert_same_state(other, ema)


def test_format_1_is_refused() -> None:
    ema = ModelEMA(Net(BF16))
    state = copy.deepcopy(ema.state_dict())
    for weight in state["weights"].values():
        weight.zero_()
    before = copy.deepcopy(ema.state_dict())
    old = {
        "version": 1,
        "update_index": 3,
        "schedule": None,
        "weights": state["weights"],
        "precision": "exact",
        "companions": state["residuals"],
        "rounding": None,
    }
    mixed = {**state, "version": 1}
    for refused in (old, mixed):
        with pytest.raises(ValueError, match=r"version 1\b.*\bversion 2\b"):
            ema.load_state_dict(refused)
    assert ema.update_index == 0
    assert_same(ema.state_dict()["weights"], before["weights"])
    assert_same(ema.state_dict()["residuals"], before["residuals"])
    # The control: it is the version that was wrong.
    ema.load_state_dict(state)
    assert ema.ema_model.body.weight.eq(0).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_tied_tensor_stands_under_each_of_its_names(dtype: torch.dtype, backend: str) -> None:
    ema = ModelEMA(Net(dtype), backend=backend)
    plain = PlainEMA(ema.model)
    for step in range(3):
        move(ema.model, step)
        ema.update(0.3)
        plain.update(0.3)
    state = ema.state_dict()
    plain.check(state["weights"])
    for part in ("weights", "residuals") if dtype == BF16 else ("weights",):
        one, other = state[part]["embedding.weight"], state[part]["head.weight"]
        assert one.data_ptr() == other.data_ptr()
        assert torch.equal(one, other)
    loaded = ModelEMA(Net(dtype), backend=backend)
    loaded.load_state_dict(through_file(state))
    assert loaded.ema_model.head.weight is loaded.ema_model.embedding.weight
    assert_same_state(loaded, ema)


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
def test_non_persistent_buffers_are_left_out(handle_buffers: str) -> None:
    ema = ModelEMA(Net(BF16), handle_buffers=handle_buffers)
    train(ema, range(2))
    state = ema.state_dict()
    assert "cache" not in state["weights"]
    assert "cache" not in state["residuals"]
    # Averaged or copied, it restarts from the online value of the model that goes on.
    resumed = Net(BF16)
    other = ModelEMA(resumed, handle_buffers=handle_buffers)
    other.load_state_dict(through_file(state))
    assert torch.equal(other.ema_model.cache, resumed.cache)
    assert not torch.equal(other.ema_model.cache, ema.ema_model.cache)
    assert_same_state(other, ema)


class Hooked(nn.Linear):
    """Every way in which a module takes part in a state dict."""

    def __init__(self) -> None:
        super().__init__(3, 3, device=DEVICE)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    def _save_to_state_dict(self, *args: Any) -> None:
        raise AssertionError

    def _load_from_state_dict(self, *args: Any) -> None:
        raise AssertionError

    def get_extra_state(self) -> Any:
        raise AssertionError

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError


def fails(*_: Any) -> None:
    raise AssertionError


def test_no_hooks_of_modules_are_called(tmp_path: Path) -> None:
    ema = ModelEMA(nn.Sequential(Hooked()))
    train(ema, range(2))
    for module in (ema.model, ema.model[0], ema.ema_model, ema.ema_model[0]):
        module.register_state_dict_pre_hook(fails)
        module.register_state_dict_post_hook(fails)
        module.register_load_state_dict_pre_hook(fails)
        module.register_load_state_dict_post_hook(fails)
    # The controls.
    with pytest.raises(AssertionError):
        ema.ema_model.state_dict()
    with pytest.raises(AssertionError):
        ema.ema_model.load_state_dict({})
    state = ema.state_dict(clone=True)
    assert [*state["weights"]] == ["0.weight", "0.bias"]
    train(ema, range(2, 3))
    assert not torch.equal(ema.state_dict()["weights"]["0.weight"], state["weights"]["0.weight"])
    ema.load_state_dict(state)
    assert_same(ema.state_dict()["weights"], state["weights"])
    ema.load_weights(state["weights"])
    assert_same(copy.deepcopy(ema).state_dict()["weights"], state["weights"])
    with ema.swapped():
        assert_same(ema.state_dict()["weights"], state["weights"])


def test_names_that_a_modules_hook_changed_are_an_error_that_lists_both() -> None:
    model = nn.Linear(2, 2)
    ema = ModelEMA(model)

    def renamed(module: nn.Module, state: dict[str, Any], *_: object) -> None:
        state["kernel"] = state.pop("weight")

    model.register_state_dict_post_hook(renamed)
    assert [*ema.state_dict()["weights"]] == ["weight", "bias"]
    before = ema.state_dict(clone=True)["weights"]
    model.bias.data.fill_(9.0)
    for load in (ema.load_state_dict, ema.load_weights):
        with pytest.raises(ValueError, match=r"'weight' is missing.*'kernel' is unexpected"):
            load(model.state_dict())
    assert_same(ema.state_dict()["weights"], before)


@torch.no_grad()
def in_place(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        module.state_dict()[name].copy_(value)


def data(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        owner, _, key = name.rpartition(".")
        getattr(module.get_submodule(owner), key).data = value.clone()


def replaced(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        owner, _, key = name.rpartition(".")
        place = module.get_submodule(owner)
        is_buffer = key in place._buffers
        new = value.clone() if is_buffer else nn.Parameter(value.clone(), requires_grad=False)
        setattr(place, key, new)


def loaded(module: nn.Module, values: dict[str, Tensor], *, assign: bool = False) -> None:
    module.load_state_dict({k: v.clone() for k, v in values.items()}, strict=False, assign=assign)


WRITES: dict[str, Callable[[nn.Module, dict[str, Tensor]], None]] = {
    "in place": in_place,
    "data": data,
    "replaced": replaced,
    "loaded": loaded,
    "loaded by assignment": functools.partial(loaded, assign=True),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_what_others_write_into_the_ema_model_is_saved(
    dtype: torch.dtype, write: str, backend: str
) -> None:
    ema = ModelEMA(Net(dtype), backend=backend)
    train(ema, range(3))
    before = ema.state_dict(clone=True)["weights"]
    values = {
        name: torch.randn_like(before[name])
        for name in ("body.weight", "image.weight", "waves", "scale", "norm.running_mean")
    }
    WRITES[write](ema.ema_model, values)
    expected = before | values
    state = ema.state_dict()
    assert_same(state["weights"], expected)
    assert_same(ema.ema_model.state_dict(), expected)
    # The file has it, and goes on from there.
    other = ModelEMA(copy.deepcopy(ema.model), backend=backend)
    other.load_state_dict(through_file(state))
    assert_same(other.state_dict()["weights"], expected)
    move(ema.model, 3)
    other.model.load_state_dict(ema.model.state_dict())
    for average in (ema, other):
        average.update(0.3)
        found = average.state_dict()["weights"]
        for name, value in values.items():
            online = ema.model.state_dict()[name]
            if name not in dict(ema.model.named_parameters()):
                assert torch.equal(found[name], online), name
            elif dtype in LOW and not value.is_complex():
                # What it goes on from is within half a spacing of what was written, and what it
                # shows is within half a spacing of what it holds; the lerp itself is fp32's.
                largest = torch.maximum(value.double().abs(), online.double().abs())
                truth = torch.lerp(value.double(), online.double(), 0.3)
                eps = torch.finfo(dtype).eps + torch.finfo(FP32).eps
                least = torch.finfo(dtype).smallest_normal
                assert (apart(found[name], truth) <= eps * largest.clamp(min=least)).all(), name
            else:
                old, new = (torch.view_as_real(t) if t.is_complex() else t for t in (value, online))
                torch._foreach_lerp_([ema_value := old.clone()], [new], 0.3)
                shown = found[name]
                shown = torch.view_as_real(shown) if shown.is_complex() else shown
                assert torch.equal(shown, ema_value), name


def test_a_cast_by_others_is_saved(backend: str) -> None:
    """And an exact EMA's residuals survive one to a wider dtype."""
    ema = ModelEMA(Net(BF16), backend=backend)
    train(ema, range(3))
    twin = copy.deepcopy(ema)
    shown = ema.state_dict(clone=True)["weights"]
    ema.ema_model.double()
    found = ema.state_dict()["weights"]
    assert found["body.weight"].dtype == torch.float64
    for name, value in found.items():
        assert torch.equal(value, shown[name].to(value.dtype)), name
    ema.ema_model.bfloat16()
    assert_same(ema.state_dict()["weights"], shown)
    # Written nowhere, the values go on with all their digits.
    for average in (ema, twin):
        train(average, range(3, 5))
    assert_same_state(ema, twin)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_ema_models_own_buffers_are_kept_and_saved(dtype: torch.dtype, backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(DEVICE, dtype)
    ema = ModelEMA(model, handle_buffers="ema_train", backend=backend)
    names = ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    reference = copy.deepcopy(ema.ema_model)
    for step in range(3):
        move(model, step)
        ema.update(0.3)
        inputs = torch.randn(8, 3, device=DEVICE, dtype=dtype)
        ema.ema_model(inputs)
        with torch.no_grad():
            for theirs, ours in zip(
                reference.parameters(), ema.ema_model.parameters(), strict=True
            ):
                theirs.copy_(ours)
        reference(inputs)
    expected = {name: reference.state_dict()[name] for name in names}
    assert expected["1.num_batches_tracked"] == 3
    assert not torch.equal(expected["1.running_mean"], model.state_dict()["1.running_mean"])
    other = ModelEMA(copy.deepcopy(model), handle_buffers="ema_train", backend=backend)
    other.load_state_dict(through_file(ema.state_dict()))
    for average in (ema, other, copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        weights = average.state_dict()["weights"]
        assert_same({name: weights[name] for name in names}, expected)
        assert_same({name: average.ema_model.state_dict()[name] for name in names}, expected)
        assert average.ema_model.training
        average.update(0.3)
        assert_same({name: average.state_dict()["weights"][name] for name in names}, expected)
