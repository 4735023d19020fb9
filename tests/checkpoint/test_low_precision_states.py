"""States of bf16 and fp16 EMAs: resumed bit by bit, converted with a warning, or refused whole."""

import copy
import pickle

import pytest
import torch
from torch import nn

from ema_triton import ModelEMA
from tests.low_precision import (
    LOW,
    PRECISIONS,
    accumulated,
    assert_same_bits,
    assert_same_ema,
    floating,
    joined,
    no_warning,
    run,
    small,
    untie,
    zoo,
)
from tests.states import saved


def plain(dtype: torch.dtype, seed: int = 0, device: str | torch.device = "cpu") -> nn.Sequential:
    """Without buffers, which keep no more than their dtype."""
    model = small(dtype, torch.device(device), seed)
    return nn.Sequential(model[0], model[2])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", LOW)
def test_resumed_run_is_the_uncut_one(
    dtype: torch.dtype, precision: str, backend: str, device: torch.device
) -> None:
    options = {"backend": backend, "precision": precision, "handle_buffers": "update"}
    ema = ModelEMA(small(dtype, device), seed=11, **options)
    run(ema, range(2))
    state, online = saved(ema.state_dict()), copy.deepcopy(ema.model.state_dict())
    twins = [copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))]
    run(ema, range(2, 4))
    resumed = ModelEMA(small(dtype, device, 1), seed=99, **options)
    resumed.model.load_state_dict(online)
    with no_warning():
        resumed.load_state_dict(state)
    for other in (resumed, *twins):
        run(other, range(2, 4))
        assert_same_ema(other, ema)
    assert ema.state_dict()["random_state"] == (
        {"seed": 11, "updates": 4} if precision == "stochastic" else None
    )
    # A run that starts from the weights alone ends elsewhere.
    fresh = ModelEMA(small(dtype, device, 1), seed=99, **options)
    fresh.model.load_state_dict(online)
    fresh.ema_model.load_state_dict(state["weights"])
    run(fresh, range(2, 4))
    same = torch.equal(accumulated(fresh)["0.weight"], accumulated(ema)["0.weight"])
    assert same == (precision == "nearest")


@pytest.mark.parametrize("there", ["foreach", "triton"])
@pytest.mark.parametrize("precision", ["exact", "stochastic"])
@pytest.mark.parametrize("dtype", LOW)
def test_run_goes_on_under_the_other_backend(
    dtype: torch.dtype, precision: str, there: str, kernel_device: torch.device
) -> None:
    pytest.importorskip("triton")
    other = {"foreach": "triton", "triton": "foreach"}[there]
    model = small(dtype, kernel_device)
    first = ModelEMA(model, backend=there, precision=precision, seed=5)
    # Halves and quarters make products exact: with FMA or without, a step has the same bits.
    run(first, range(2), 0.25)
    second = ModelEMA(small(dtype, kernel_device, 1), backend=other, precision=precision)
    second.model.load_state_dict(model.state_dict())
    second.load_state_dict(saved(first.state_dict()))
    run(first, range(2, 4), 0.25)
    run(second, range(2, 4), 0.25)
    assert_same_ema(first, second)


DTYPES = (torch.float32, *LOW)


def fractions(model: nn.Module, digits: int) -> None:
    """Values in [1, 2) that need exactly `digits` binary digits after the point."""
    generator = torch.Generator().manual_seed(digits)
    with torch.no_grad():
        for value in model.parameters():
            odd = 2 * torch.randint(2 ** (digits - 1), value.shape, generator=generator) + 1
            value.copy_(1 + odd.double() * 2.0**-digits)


@pytest.mark.parametrize("there", PRECISIONS)
@pytest.mark.parametrize("here", PRECISIONS)
def test_states_of_any_precision_and_dtype_load(here: str, there: str) -> None:
    for ema_dtype in DTYPES:
        for own_dtype in DTYPES:
            # An fp32 model of 20 digits: each low dtype loses some, where it keeps no residual.
            source = ModelEMA(plain(torch.float32), **_of(there, ema_dtype))
            fractions(source.model, 20)
            source.sync()
            values = joined(saved(source.state_dict()))
            target = ModelEMA(plain(torch.float32, 1), **_of(here, own_dtype))
            digits = {torch.float32: 20, torch.bfloat16: 7, torch.float16: 10}
            held = 20 if there == "exact" else digits[ema_dtype]
            keeps = 20 if here == "exact" else digits[own_dtype]
            assert (values["0.weight"].double() * 2.0**held).frac().eq(0).all()
            state = saved(source.state_dict())
            if held == 7 and own_dtype == torch.float16:
                continue  # 7 digits fit: see the next test
            if keeps < held:
                with pytest.warns(UserWarning, match="^The state was loaded; but .*rounded"):
                    target.load_state_dict(state)
            else:
                with no_warning():
                    target.load_state_dict(state)
            for name, value in floating(values).items():
                loaded = joined(target.state_dict())[name]
                expected = value.float() if keeps >= held else value.to(own_dtype).float()
                assert torch.equal(loaded.float(), expected), (ema_dtype, own_dtype, name)


def _of(precision: str, dtype: torch.dtype) -> dict:
    return {"precision": precision, "ema_dtype": dtype, "backend": "foreach"}


@pytest.mark.parametrize("here", PRECISIONS)
@pytest.mark.parametrize("own_dtype", LOW)
def test_representable_values_load_without_a_warning(own_dtype: torch.dtype, here: str) -> None:
    for ema_dtype in DTYPES:
        for there in PRECISIONS:
            source = ModelEMA(plain(torch.float32), **_of(there, ema_dtype))
            fractions(source.model, 6)
            source.sync()
            target = ModelEMA(plain(torch.float32, 1), **_of(here, own_dtype))
            with no_warning():
                target.load_state_dict(saved(source.state_dict()))
            for name, value in source.model.named_parameters():
                assert torch.equal(accumulated(target)[name].float(), value)


def test_double_values_are_said_to_be_rounded() -> None:
    source = ModelEMA(plain(torch.float64), backend="foreach")
    fractions(source.model, 40)
    source.sync()
    target = ModelEMA(plain(torch.bfloat16, 1), backend="foreach")
    with pytest.warns(UserWarning, match=r"^The state was loaded; but .*rounded"):
        target.load_state_dict(source.state_dict())
    for name, value in source.model.named_parameters():
        assert torch.equal(accumulated(target)[name], value.float())


@pytest.mark.parametrize("dtype", LOW)
def test_state_of_a_module_loads_and_says_what_it_does_not_know(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    ema = ModelEMA(plain(dtype, 0, device), backend=backend)
    run(ema, range(3))
    module = saved(plain(dtype, 4, device).state_dict())
    with pytest.warns(UserWarning, match="^The state was loaded; but .*module's state dict"):
        ema.load_state_dict(module)
    weights = {name: value.float() for name, value in module.items()}
    assert_same_bits(accumulated(ema), weights)
    wider = saved(plain(torch.float32, 5, device).state_dict())
    with no_warning():
        ema.load_state_dict(wider)
    assert_same_bits(
        accumulated(ema),
        dict(wider),
    )
    wide = ModelEMA(plain(torch.float32, 0, device), backend=backend)
    wide.load_state_dict(wider)
    with no_warning():
        for step in range(3):
            for one in (ema, wide):
                one.model.load_state_dict(plain(dtype, 20 + step, device).state_dict())
                one.update(0.01)
    assert_same_bits(
        accumulated(ema),
        accumulated(wide),
    )


@pytest.mark.parametrize("dtype", LOW)
def test_state_of_a_tied_model_loads_into_an_untied_one(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    source = ModelEMA(zoo(dtype, device), backend=backend)
    run(source, range(2), 0.013)
    model = zoo(dtype, device, 1)
    untie(model)
    exact = ModelEMA(model, backend=backend)
    wide = ModelEMA(model, backend=backend, ema_dtype=torch.float32)
    truth = accumulated(source)["odd"]
    for target in (exact, wide):
        target.load_state_dict(source.state_dict())
        for name in ("odd", "tied"):
            assert torch.equal(accumulated(target)[name], truth), name


def _damage(name: str, state: dict) -> None:
    residuals, weight = state["residuals"], "0.weight"
    if name == "shape":
        residuals[weight] = residuals[weight][:-1].clone()
    elif name == "transposed":
        residuals[weight] = residuals[weight].t().clone()
    elif name == "flat":
        residuals[weight] = residuals[weight].flatten()
    elif name == "dtype":
        residuals[weight] = residuals[weight].to(torch.int32)
    elif name == "float16":
        residuals[weight] = residuals[weight].to(torch.float16)
    elif name == "unknown":
        residuals["unknown"] = residuals[weight]
    elif name == "of an integer":
        residuals["1.num_batches_tracked"] = torch.tensor(0, dtype=torch.int16)
    elif name == "no tensor":
        residuals[weight] = residuals[weight].tolist()
    elif name == "none":
        residuals[weight] = None
    elif name == "list":
        state["residuals"] = list(residuals.values())
    elif name == "precision":
        state["precision"] = "kahan"
    elif name == "version":
        state["version"] = 1000
    elif name == "weight shape":
        state["weights"]["2.bias"] = torch.zeros(4)
    elif name == "weight missing":
        del state["weights"]["2.bias"]
    else:
        del state[name.removeprefix("no ")]


DAMAGES = [
    "shape",
    "transposed",
    "flat",
    "dtype",
    "float16",
    "unknown",
    "of an integer",
    "no tensor",
    "none",
    "list",
    "precision",
    "version",
    "weight shape",
    "weight missing",
    "no version",
    "no weights",
    "no precision",
    "no residuals",
    "no random_state",
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("dtype", LOW)
def test_damaged_state_changes_nothing(dtype: torch.dtype, damage: str) -> None:
    cpu = torch.device("cpu")
    source = ModelEMA(small(dtype, cpu, 1), backend="foreach")
    run(source, range(3))
    state = saved(source.state_dict())
    target = ModelEMA(small(dtype, cpu, 2), backend="foreach")
    run(target, range(2))
    before = copy.deepcopy(target)
    _damage(damage, state)
    with pytest.raises(ValueError, match=r"\w"):
        target.load_state_dict(state)
    assert_same_ema(target, before)
    for ema in (target, before):
        run(ema, range(2, 4))
    assert_same_ema(target, before)


@pytest.mark.parametrize(
    "random_state",
    [
        {"seed": -1, "updates": 0},
        {"seed": 2**63, "updates": 0},
        {"seed": True, "updates": 0},
        {"seed": 0, "updates": -1},
        {"seed": 0, "updates": 0.5},
        {"seed": 0},
        {"updates": 0},
        [0, 0],
        "0",
    ],
)
def test_a_damaged_random_state_changes_nothing(random_state: object) -> None:
    cpu = torch.device("cpu")
    options = {"backend": "foreach", "precision": "stochastic"}
    state = saved(ModelEMA(small(torch.bfloat16, cpu, 1), **options).state_dict())
    target = ModelEMA(small(torch.bfloat16, cpu, 2), seed=3, **options)
    run(target, range(2))
    before = copy.deepcopy(target)
    state["random_state"] = random_state
    with pytest.raises(ValueError, match=r"\w"):
        target.load_state_dict(state)
    assert_same_ema(target, before)


def test_a_parameter_may_be_called_like_extra_state() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.my_extra_state = nn.Parameter(torch.randn(4).bfloat16())

    net = Net()
    ema = ModelEMA(net)
    net.my_extra_state.data.add_(1.0)
    ema.update(1e-3)
    state = copy.deepcopy(ema.state_dict())
    assert state["residuals"]["my_extra_state"].any()
    other = ModelEMA(net)
    other.load_state_dict(state)
    assert torch.equal(
        other.state_dict()["residuals"]["my_extra_state"], state["residuals"]["my_extra_state"]
    )
