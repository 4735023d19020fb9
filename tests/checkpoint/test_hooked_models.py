"""Models that drop, rename or add keys of their state dict: an EMA saves what it can load."""

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ema_triton import ModelEMA
from tests.checkpoint.test_state_dict import assert_same_state, through_file
from tests.plain import assert_same

Hook = Callable[[nn.Module, dict[str, Any], str], None]


def drop(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """As a model does that saves its adapters only, or leaves out its frozen text encoder."""
    del state[f"{prefix}body.weight"]


def drop_all(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def rename(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    state[f"{prefix}body.kernel"] = state.pop(f"{prefix}body.weight")


def add(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    state[f"{prefix}format"] = torch.tensor(3)


def transpose(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    state[f"{prefix}body.weight"] = state[f"{prefix}body.weight"].t()


class Net(nn.Module):
    """It changes its state dict in a hook."""

    def __init__(self, hook: Hook, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4, dtype=dtype)
        self.norm = nn.BatchNorm1d(4, dtype=dtype)
        self.register_state_dict_post_hook(lambda m, state, prefix, _: hook(m, state, prefix))


class Overridden(nn.Module):
    """It changes its state dict without a hook."""

    def __init__(self, hook: Hook, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4, dtype=dtype)
        self.norm = nn.BatchNorm1d(4, dtype=dtype)
        self.hook = hook

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        self.hook(self, state, prefix)
        return state


def nested(hook: Hook, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2, dtype=dtype), Net(hook, dtype))


HOOKS: dict[str, Hook] = {
    "drop": drop,
    "drop all": drop_all,
    "rename": rename,
    "add": add,
    "transpose": transpose,
}
MODELS: dict[str, Callable[..., nn.Module]] = {
    "hook": Net,
    "override": Overridden,
    "nested": nested,
}


def trained(model: str, hook: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> ModelEMA:
    ema = ModelEMA(MODELS[model](HOOKS[hook], dtype), **options)
    for step in range(2):
        with torch.no_grad():
            for number, parameter in enumerate(ema.model.parameters()):
                parameter.add_(step + number + 1 / 3)
            for buffer in ema.model.buffers():
                buffer.add_(1)
        ema.update(0.3)
    return ema


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("model", MODELS)
def test_the_hook_changes_the_modules_state_dict(model: str, hook: str) -> None:
    """The control."""
    built = MODELS[model](HOOKS[hook])
    state, plain = built.state_dict(), MODELS[model](lambda *_: None).state_dict()
    same = state.keys() == plain.keys()
    assert same == (hook == "transpose")
    if same:
        assert any(state[name].shape != plain[name].shape for name in plain)


SAVES: dict[str, Callable[[ModelEMA, ModelEMA], None]] = {
    "state dict": lambda ema, other: other.load_state_dict(through_file(ema.state_dict())),
    "clone": lambda ema, other: other.load_state_dict(ema.state_dict(clone=True)),
    "full": lambda ema, other: other.load_state_dict(
        ema.state_dict(full_state_dict=True), full_state_dict=True
    ),
}


@pytest.mark.parametrize("options", [{}, {"as_module": False}, {"handle_buffers": "update"}])
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("model", MODELS)
def test_a_state_has_all_tensors_and_loads(
    model: str, hook: str, save: str, options: dict[str, Any]
) -> None:
    ema = trained(model, hook, **options)
    other = ModelEMA(MODELS[model](HOOKS[hook], torch.bfloat16), **options)
    before = other.state_dict(clone=True)["weights"]
    assert {*ema.state_dict()["weights"]} == {*names_of(ema.model)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAVES[save](ema, other)
    assert_same_state(other, ema)
    assert not any(map(torch.equal, before.values(), other.state_dict()["weights"].values()))
    for each in (ema, other):
        each.update(0.3)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("model", MODELS)
def test_files_have_all_tensors_and_load(model: str, hook: str, tmp_path: Path) -> None:
    files = pytest.importorskip("safetensors.torch")
    ema = trained(model, hook, torch.float32)
    ema.save_weights(tmp_path / "ema.safetensors")
    assert {*files.load_file(tmp_path / "ema.safetensors")} == {*names_of(ema.model)}
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    for name in ("ema.safetensors", "ema.pt"):
        other = ModelEMA(MODELS[model](HOOKS[hook]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.load_weights(tmp_path / name)
        assert_same(other.state_dict()["weights"], ema.state_dict()["weights"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("model", MODELS)
def test_torch_distributed_checkpoint_saves_and_loads_all(
    model: str, hook: str, tmp_path: Path
) -> None:
    ema = trained(model, hook)
    other = ModelEMA(MODELS[model](HOOKS[hook], torch.bfloat16))
    dcp.save({"ema": ema}, checkpoint_id=tmp_path)
    dcp.load({"ema": other}, checkpoint_id=tmp_path)
    assert_same_state(other, ema)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("model", MODELS)
def test_ignites_checkpoint_saves_and_loads_all(
    model: str, hook: str, alone: bool, tmp_path: Path
) -> None:
    pytest.importorskip("ignite")
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver

    from ema_triton import EMAHandler

    built = MODELS[model](HOOKS[hook], torch.bfloat16)
    handler = EMAHandler(built, momentum=0.3)

    def step(engine: Engine, batch: int) -> None:
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(batch + 1 / 3)

    trainer = Engine(step)
    handler.attach(trainer)
    to_save: dict[str, Any] = {"ema": handler} if alone else {"ema": handler, "trainer": trainer}
    checkpoint = Checkpoint(to_save, DiskSaver(str(tmp_path), require_empty=False))
    trainer.add_event_handler(Events.COMPLETED, checkpoint)
    trainer.run([1, 2, 3])
    state = torch.load(tmp_path / checkpoint.last_checkpoint, weights_only=True)
    other = EMAHandler(MODELS[model](HOOKS[hook], torch.bfloat16), momentum=0.3)
    Checkpoint.load_objects({"ema": other} if alone else {"ema": other, "trainer": trainer}, state)
    assert_same_state(other.ema, handler.ema)
    assert other.update_index == 3


ERRORS = {
    "drop": r"'body\.weight' is missing\. Nothing was loaded\..*; or give strict=False",
    "rename": r"'body\.weight' is missing, 'body\.kernel' is unexpected\. Noth.* give strict=False",
    "add": r"'format' is unexpected\. Nothing was loaded\..*; or give strict=False",
    "transpose": r"'body\.weight' is \(3, 4\) in the state but \(4, 3\) here",
}


@pytest.mark.parametrize("hook", ERRORS)
@pytest.mark.parametrize("model", ["hook", "override"])
def test_what_the_module_itself_saves_is_an_error_that_says_strict_false(
    model: str, hook: str
) -> None:
    """Of the online model, and of the EMA model, which has the hooks too."""
    ema, other = trained(model, hook, torch.float32), ModelEMA(MODELS[model](HOOKS[hook]))
    before = copy.deepcopy(other.state_dict())
    for module in (ema.model, ema.ema_model):
        state = module.state_dict()
        for load in (other.load_state_dict, other.load_weights):
            with pytest.raises(ValueError, match=ERRORS[hook]):
                load(state)
        assert_same(other.state_dict()["weights"], before["weights"])
    if hook == "transpose":
        return
    text = {
        "drop": "a module's state dict has no 'body.weight', which stay as they are.",
        "rename": "a module's state dict has no 'body.weight', which stay as they are; its "
        "'body.kernel' are not in this EMA, and were left out.",
        "add": "its 'format' are not in this EMA, and were left out.",
    }[hook]
    for load in (other.load_state_dict, other.load_weights):
        with pytest.warns(UserWarning, match=re.escape(f"was loaded; but {text}")):
            load(ema.ema_model.state_dict(), strict=False)
    expected = {**ema.state_dict()["weights"]}
    if hook != "add":
        expected["body.weight"] = before["weights"]["body.weight"]
    assert_same(other.state_dict()["weights"], expected)


def test_a_state_dict_that_is_empty_is_an_error() -> None:
    """Where the hook drops everything."""
    ema = trained("hook", "drop all")
    for load in (ema.load_state_dict, ema.load_weights):
        for strict in (True, False):
            with pytest.raises(ValueError, match="must be a dict with weights, but got an empty"):
                load(ema.model.state_dict(), strict=strict)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2])
@pytest.mark.parametrize("as_module", [True, False])
def test_a_buffer_of_any_dtype_that_is_saved_is_loaded(dtype: torch.dtype, as_module: bool) -> None:
    def build(value: float) -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("codes", torch.full((3,), value).to(dtype))
        return model

    ema, other = ModelEMA(build(2), as_module=as_module), ModelEMA(build(1), as_module=as_module)
    ema.update(0.5)
    state = through_file(ema.state_dict())
    other.load_state_dict(state)
    assert_same_state(other, ema)
    other.load_weights(state["weights"])
    wider = {**state["weights"], "codes": torch.zeros(3).to(torch.float8_e4m3fn)}
    with pytest.raises(ValueError, match=r"'codes' is torch\.float8_e4m3fn, which has to be"):
        other.load_weights(wider)
