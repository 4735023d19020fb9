"""`strict=False`: what a state has is loaded, what it lacks stays; the warning names both."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_triton import Constant, ModelEMA
from tests.checkpoint.test_state_dict import assert_same_state
from tests.plain import assert_same, move
from tests.states import saved


class Net(nn.Module):
    """Two adapters on one body; the second one came later."""

    def __init__(self, *, later: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4, dtype=dtype)
        self.norm = nn.BatchNorm1d(4, dtype=dtype)
        if later:
            self.later = nn.Linear(4, 2, dtype=dtype)


LATER = ("later.weight", "later.bias")
LEFT_OUT = "but its 'later.weight', 'later.bias' are not in this EMA, and were left out"


def trained(later: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> ModelEMA:
    ema = ModelEMA(Net(later=later, dtype=dtype), **options)
    for step in range(3):
        move(ema.model, step)
        ema.update(0.3)
    return ema


def parts(ema: ModelEMA, *names: str) -> dict[str, dict[str, Tensor]]:
    """Copies of these weights and residuals."""
    state = ema.state_dict(clone=True)
    return {
        part: {name: state[part][name] for name in names if name in state[part]}
        for part in ("weights", "residuals")
    }


LOADS: dict[str, Callable[..., None]] = {
    "load_state_dict": lambda ema, state, **options: ema.load_state_dict(state, **options),
    "load_weights": lambda ema, state, **options: ema.load_weights(state, **options),
    "full": lambda ema, state, **options: ema.load_state_dict(
        state, full_state_dict=True, **options
    ),
}


@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_state_lacks_stays_with_its_residual(
    dtype: torch.dtype, load: str, as_module: bool
) -> None:
    old = trained(later=False, dtype=dtype)
    ema = trained(dtype=dtype, as_module=as_module)
    stays, comes = parts(ema, *LATER), parts(old, *Net(later=False).state_dict())
    assert bool(stays["residuals"]) == (dtype != torch.float32)
    with pytest.warns(UserWarning, match="which stay as they are") as caught:
        LOADS[load](ema, saved(old.state_dict()), strict=False)
    assert [str(warning.message) for warning in caught] == [
        "The state was loaded; but it has no 'later.weight', 'later.bias', which stay as they are."
    ]
    assert parts(ema, *LATER).keys() == stays.keys()
    for part in ("weights", "residuals"):
        assert_same(parts(ema, *LATER)[part], stays[part])
        assert_same(parts(ema, *Net(later=False).state_dict())[part], comes[part])
    move(ema.model, 5)
    ema.update(0.3)  # and all goes on
    assert not torch.equal(ema.state_dict()["weights"]["later.weight"], stays["weights"][LATER[0]])


@pytest.mark.parametrize("load", LOADS)
def test_what_a_state_has_besides_is_left_out_and_named(load: str) -> None:
    new, ema = trained(), trained(later=False)
    with pytest.warns(UserWarning, match=LEFT_OUT):
        LOADS[load](ema, saved(new.state_dict()), strict=False)
    loaded, expected = (parts(each, *Net(later=False).state_dict()) for each in (ema, new))
    for part in ("weights", "residuals"):
        assert_same(loaded[part], expected[part])


def test_index_and_schedule_come_along_and_with_load_weights_they_do_not() -> None:
    old = trained(later=False)
    old.schedule = Constant(0.25)
    ema, other = ModelEMA(Net()), ModelEMA(Net())
    with pytest.warns(UserWarning, match="which stay as they are"):
        ema.load_state_dict(old.state_dict(), strict=False)
    assert (ema.update_index, ema.schedule) == (3, Constant(0.25))
    with pytest.warns(UserWarning, match="which stay as they are"):
        other.load_weights(old.state_dict(), strict=False)
    assert (other.update_index, other.schedule) == (0, None)


@pytest.mark.parametrize("load", LOADS)
def test_a_shape_that_differs_stays_an_error_and_nothing_is_loaded(load: str) -> None:
    ema = trained()
    before = copy.deepcopy(ema)
    state = saved(trained(later=False).state_dict())
    state["weights"]["body.bias"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"'body\.bias' is \(5,\) in the state but \(4,\) here"):
        LOADS[load](ema, state, strict=False)
    assert_same_state(ema, before)


@pytest.mark.parametrize("load", LOADS)
def test_a_state_with_nothing_in_common_is_an_error(load: str) -> None:
    ema = trained()
    before = copy.deepcopy(ema)
    state = ModelEMA(nn.Sequential(nn.Linear(3, 4))).state_dict()
    with pytest.raises(
        ValueError,
        match=r"has none of this EMA's tensors.*'body.weight' is missing.*'0.weight' is unexpected",
    ) as caught:
        LOADS[load](ema, state, strict=False)
    assert "strict=False" not in str(caught.value)
    assert_same_state(ema, before)


@pytest.mark.parametrize("load", LOADS)
def test_the_error_says_strict_where_it_would_help(load: str) -> None:
    ema, state = trained(), saved(trained(later=False).state_dict())
    with pytest.raises(ValueError, match=r"'later\.weight' is missing.*give strict=False") as names:
        LOADS[load](ema, state)
    assert "Nothing was loaded" in str(names.value)
    state["weights"]["body.bias"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"'body\.bias' is \(5,\)") as shape:
        LOADS[load](ema, state)
    assert "strict" not in str(shape.value)


@pytest.mark.parametrize("load", LOADS)
def test_a_state_that_fits_is_loaded_without_a_word(load: str) -> None:
    ema, other = trained(dtype=torch.bfloat16), trained(dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LOADS[load](ema, other.state_dict(), strict=False)
    assert_same_state(ema, other)


def test_a_residual_without_its_weight_is_not_taken() -> None:
    ema, state = trained(dtype=torch.bfloat16), trained(dtype=torch.bfloat16).state_dict(clone=True)
    stays = parts(ema, "body.weight")
    del state["weights"]["body.weight"]
    for load in LOADS.values():
        with pytest.warns(UserWarning, match="has no 'body.weight', which stay as they are"):
            load(ema, state, strict=False)
        for part in ("weights", "residuals"):
            assert_same(parts(ema, "body.weight")[part], stays[part])


def test_one_name_of_a_tied_tensor_is_enough() -> None:
    def tied() -> nn.Module:
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        model["b"].weight = model["a"].weight
        return model

    source, ema = ModelEMA(tied()), ModelEMA(tied())
    state = source.state_dict()["weights"]
    for name in ("a.weight", "b.weight"):
        with torch.no_grad():
            ema.ema_model["a"].weight.zero_()
        with warnings.catch_warnings(action="error"):  # nothing stays as it was
            ema.load_state_dict({k: v for k, v in state.items() if k != name}, strict=False)
        assert torch.equal(ema.ema_model["a"].weight, source.ema_model["a"].weight)
        assert ema.ema_model["a"].weight is ema.ema_model["b"].weight


def test_a_file_of_some_weights_is_loaded(tmp_path: Path) -> None:
    files = pytest.importorskip("safetensors.torch")
    ema, stays = trained(), parts(trained(), *LATER)
    body = {"body.weight": torch.ones(4, 3)}
    files.save_file(body, tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match=r"'body\.bias' is missing.*give strict=False"):
        ema.load_weights(tmp_path / "some.safetensors")
    with pytest.warns(UserWarning, match="a module's state dict has no 'body.bias'"):
        ema.load_weights(tmp_path / "some.safetensors", strict=False)
    assert ema.ema_model.body.weight.eq(1).all()
    assert parts(ema, *LATER).keys() == stays.keys()
    assert not ema.ema_model.body.bias.eq(1).any()


def test_what_is_left_out_of_one_ema_is_unexpected_in_the_other() -> None:
    """An EMA of the later part alone, and one of all."""
    whole = trained()
    part = trained(as_module=False, include="later")
    assert [*part.state_dict()["weights"]] == [*LATER]
    with pytest.warns(UserWarning, match="its 'body.weight', .* are not in this EMA, and were"):
        part.load_state_dict(saved(whole.state_dict()), strict=False)
    for name in LATER:
        assert torch.equal(part.state_dict()["weights"][name], whole.state_dict()["weights"][name])
    other = trained()
    stays = parts(other, "body.weight")
    with pytest.warns(UserWarning, match="has no 'body.weight'"):
        other.load_state_dict(saved(part.state_dict()), strict=False)
    assert_same(parts(other, "body.weight")["weights"], stays["weights"])


def test_the_handler_passes_it_on() -> None:
    pytest.importorskip("ignite")
    from ema_triton import EMAHandler

    old, handler = EMAHandler(Net(later=False)), EMAHandler(Net())
    with pytest.raises(ValueError, match="give strict=False"):
        handler.load_state_dict(old.state_dict())
    with pytest.warns(UserWarning, match="which stay as they are"):
        handler.load_state_dict(old.state_dict(), strict=False)
    assert torch.equal(handler.ema_model.body.weight, old.ema_model.body.weight)
