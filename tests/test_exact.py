"""An exact EMA keeps its digits, whatever is done to the modules that hold it but writing it."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ema_triton import ModelEMA
from tests.states import accumulated, saved


def averaged(model: nn.Module, **options: object) -> tuple[ModelEMA, ModelEMA]:
    """An exact EMA and an fp32 one, of a model that was trained a little."""
    pair = ModelEMA(model, **options), ModelEMA(model, ema_dtype=torch.float32, **options)
    train(model, *pair)
    return pair


def train(model: nn.Module, *emas: ModelEMA) -> None:
    for _ in range(5):
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.add_(torch.randn_like(tensor))
        for ema in emas:
            ema.update(0.01)


def assert_exact(ema: ModelEMA, wide: ModelEMA) -> None:
    found, expected = accumulated(ema), accumulated(wide)
    assert len(found) == len(expected) > 0
    assert ema.state_dict()["residuals"]
    assert all(map(torch.equal, found, expected))


def reloaded(ema: ModelEMA) -> None:
    state = saved(ema.state_dict())
    with torch.no_grad():
        for parameter in ema.ema_model.parameters():
            parameter.zero_()
    ema.load_state_dict(state)


class Cache(nn.Linear):
    """With a buffer that is averaged and not saved."""

    def __init__(self) -> None:
        super().__init__(3, 3, dtype=torch.bfloat16)
        self.register_buffer("cache", torch.ones(3, dtype=torch.bfloat16), persistent=False)


def test_a_buffer_that_is_not_saved() -> None:
    ema, wide = averaged(Cache(), handle_buffers="update")
    assert [*ema.state_dict()["residuals"]] == ["weight", "bias"]
    reloaded(ema)
    assert_exact(ema, wide)


def test_a_state_with_other_names_than_the_modules() -> None:
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(3, 3, dtype=torch.bfloat16)))
    ema, wide = averaged(model)
    assert [*ema.state_dict()["residuals"]] == ["0.weight", "0.bias"]
    reloaded(ema)
    train(model, ema, wide)
    assert_exact(ema, wide)


def test_a_hook_that_copies_the_state() -> None:
    model = nn.Linear(3, 3, dtype=torch.bfloat16)
    ema, wide = averaged(model)

    def cloned(module: nn.Module, state: dict, prefix: str, metadata: object) -> None:
        for name in state:
            state[name] = state[name].clone()

    ema.ema_model.register_state_dict_post_hook(cloned)
    assert_exact(ema, wide)
    reloaded(ema)
    assert_exact(ema, wide)


MOVES = {
    "wrapped anew": lambda m: setattr(m, "weight", nn.Parameter(m.weight, requires_grad=False)),
    "its data wrapped anew": lambda m: setattr(
        m, "weight", nn.Parameter(m.weight.data, requires_grad=False)
    ),
    "assigned to itself": lambda m: m.load_state_dict(m.state_dict(), assign=True),
    "shared": lambda m: m.share_memory(),
    "another copy of it": lambda m: setattr(m.weight, "data", m.weight.data.clone()),
    "another layout": lambda m: setattr(m.weight, "data", m.weight.data.t().contiguous().t()),
    "there and back": lambda m: m.double().bfloat16(),
    "through a queue": lambda m: ForkingPickler.dumps(m),
}


@pytest.mark.parametrize("move", MOVES)
def test_digits_outlive_a_move(move: str) -> None:
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    ema, wide = averaged(model)
    MOVES[move](ema.ema_model)
    train(model, ema, wide)
    assert_exact(ema, wide)
    for duplicate in (copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        assert_exact(duplicate, wide)


def test_digits_outlive_a_new_module_around_their_tensors() -> None:
    ema, wide = averaged(nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16)))
    module = nn.Linear(4, 4, dtype=torch.bfloat16)
    state, module.weight, module.bias = ema.state_dict(), *ema.ema_model.parameters()
    ema.ema_model[0] = module
    ema.load_state_dict(state)
    train(ema.model, ema, wide)
    assert_exact(ema, wide)
    ema.ema_model[0] = copy.deepcopy(module)
    ema.ema_model[0].weight, ema.ema_model[0].bias = module.weight, module.bias
    train(ema.model, ema, wide)
    assert_exact(ema, wide)


def test_a_tensor_wrapped_anew_is_watched() -> None:
    """Its writes are seen by the EMA, and the EMA's by autograd."""
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    ema, _ = averaged(model)
    ema.ema_model.weight = nn.Parameter(ema.ema_model.weight.data, requires_grad=False)
    ema.update(0.01)
    with torch.no_grad():
        ema.ema_model.weight.fill_(2.0)
    ema.update(0.0)
    assert ema.ema_model.weight.eq(2.0).all()
    inputs = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    loss = (inputs @ ema.ema_model.weight).sum()
    ema.update(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_backend_that_cannot_be_found_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    ema, wide = averaged(model)
    with monkeypatch.context() as broken:
        broken.setattr("ema_triton.planner.choose", lambda *_: 1 / 0)
        model.weight.data = model.weight.data.clone().t().contiguous().t()
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                ema.update(0.01)
    train(model, ema, wide)
    assert_exact(ema, wide)


def test_a_plan_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second bucket cannot be allocated: the first one's tensors stay where they were."""
    model = nn.Sequential(
        nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4, dtype=torch.float16)
    )
    ema, wide = averaged(model)
    places = [p.data_ptr() for p in ema.ema_model.parameters()]
    for layer in model:
        layer.weight.data = layer.weight.data.t().contiguous().t()
    zeros, made = torch.zeros, []

    def limited(*args: object, **kwargs: object) -> Tensor:
        made.append(args)
        if len(made) > 1:
            raise torch.OutOfMemoryError
        return zeros(*args, **kwargs)

    with monkeypatch.context() as broken:
        broken.setattr(torch, "zeros", limited)
        with pytest.raises(torch.OutOfMemoryError):
            ema.update(0.01)
    assert [p.data_ptr() for p in ema.ema_model.parameters()] == places
    train(model, ema, wide)
    assert_exact(ema, wide)


def test_updates_are_counted_while_nothing_is_rounded() -> None:
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    ema = ModelEMA(model, precision="stochastic")
    for _ in range(5):
        ema.update(0.1)
    ema.ema_model.float()
    ema.update(0.1)
    assert ema.state_dict()["random_state"] == {"seed": 0, "updates": 5}
    ema.ema_model.bfloat16()
    ema.update(0.1)
    assert ema.state_dict()["random_state"] == {"seed": 0, "updates": 6}


def test_a_compiled_models_state_dict() -> None:
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    compiled = torch.compile(model, backend="eager")
    ema = ModelEMA(compiled)
    assert [*compiled.state_dict()] == ["_orig_mod.weight", "_orig_mod.bias"]
    model.weight.data.fill_(3.0)
    with pytest.warns(UserWarning, match=r"what was rounded off 'weight', 'bias' is not in a mod"):
        ema.load_state_dict(compiled.state_dict())
    assert ema.ema_model.weight.eq(3.0).all()


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (torch.eye(4).to_sparse(), "'weight' has layout torch.sparse_coo and dtype torch.float32"),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), "'weight' is torch.float8_e4m3fn, which has"),
    ],
)
def test_what_cannot_be_loaded_is_refused_first(weight: Tensor, text: str) -> None:
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    ema, wide = averaged(model)
    state = {"weight": weight, "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=text):
        ema.load_state_dict(state)
    assert_exact(ema, wide)
