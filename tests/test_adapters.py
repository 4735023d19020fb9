"""Adapters on a base that is frozen, quantized or shared: only what is included is looked at."""

import copy
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ema_triton import ModelEMA
from ema_triton.ops.precision import RESIDUAL_DTYPE
from tests.checkpoint.test_state_dict import assert_same_state, through_file
from tests.plain import assert_same

FP8 = torch.float8_e4m3fn
ADAPTERS = "*lora_*"


class Quantized(Tensor):
    """As torchao's: a subclass with its data in other tensors, which nothing may write or copy."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        name = func.overloadpacket.__name__
        assert name in ("linear", "t", "mm", "addmm"), f"{name} of a quantized tensor"

        def dequantized(value: Any) -> Any:
            return value.codes * value.scale if isinstance(value, cls) else value

        return func(*tree_map(dequantized, args), **tree_map(dequantized, kwargs or {}))


def in_float8(weight: Tensor) -> Tensor:
    return weight.to(FP8)


def in_int8(weight: Tensor) -> Tensor:
    return (weight * 100).round().to(torch.int8)


def quantized(weight: Tensor) -> Tensor:
    return Quantized(in_int8(weight), torch.tensor(0.01))


def plain(weight: Tensor) -> Tensor:
    return weight


BASES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": plain,
    "float8": in_float8,
    "int8": in_int8,
    "quantized": quantized,
}


class Base(nn.Module):
    """A layer whose weight is a frozen parameter, or a buffer, with buffers of its own."""

    def __init__(self, convert: Callable[[Tensor], Tensor], as_buffer: bool = False) -> None:
        super().__init__()
        weight = convert(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) / 8)
        if as_buffer:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("seen", torch.zeros(64))

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight if isinstance(self.weight, Quantized) else self.weight.float()
        return nn.functional.linear(inputs, weight)


class LoRA(nn.Module):
    """PEFT's names: `base_layer`, and the adapters `lora_A.default` and `lora_B.default`."""

    def __init__(self, base: nn.Module, rank: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base_layer = base
        options: dict[str, Any] = {"bias": False, "dtype": dtype}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(64, rank, **options)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, 64, **options)})

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.lora_A["default"](inputs.to(self.lora_A["default"].weight.dtype))
        return self.base_layer(inputs) + self.lora_B["default"](hidden).to(inputs.dtype)


NAMES = ["0.lora_A.default.weight", "0.lora_B.default.weight"]


def model_of(base: str, dtype: torch.dtype = torch.float32, *, as_buffer: bool = False) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(LoRA(Base(BASES[base], as_buffer), dtype=dtype))


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}


def train(ema: ModelEMA, steps: Iterable[int] = range(3)) -> None:
    for step in steps:
        for number, parameter in enumerate(adapters(ema.model).values()):
            chance = torch.Generator().manual_seed(10 * step + number)
            parameter.add_(torch.randn(parameter.shape, generator=chance))
        ema.update(0.3)


def averages_of(model: nn.Module, steps: Iterable[int] = range(3)) -> dict[str, Tensor]:
    """What `train` makes of an fp32 model's adapters, by torch."""
    values = {name: value.clone() for name, value in adapters(model).items()}
    online = {name: value.clone() for name, value in adapters(model).items()}
    for step in steps:
        for number, (name, value) in enumerate(online.items()):
            chance = torch.Generator().manual_seed(10 * step + number)
            value.add_(torch.randn(value.shape, generator=chance))
            torch._foreach_lerp_([values[name]], [value], 0.3)
    return values


def held(ema: ModelEMA, *elsewhere: nn.Module) -> int:
    """The bytes of all storages that an EMA keeps alive, but for those of other models."""
    state = ema._state
    found = [slot.whole() for slot in state.slots().values()]
    found += [*state.residuals.values(), *(bucket.flat for bucket in state.buckets)]
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found
           if t is not None and not isinstance(t, Quantized)}  # fmt: skip
    flat = [bucket.flat for bucket in state.buckets]
    flat += [bucket.residual for bucket in state.buckets if bucket.residual is not None]
    inside = [(b.data_ptr(), b.data_ptr() + b.nbytes) for b in flat]  # views lie in these
    own |= {b.data_ptr(): b.nbytes for b in flat}
    begins = {b.data_ptr() for b in flat}
    for model in elsewhere:
        for tensor in (*model.parameters(), *model.buffers()):
            if not isinstance(tensor, Quantized):
                own.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(
        size
        for address, size in own.items()
        if address in begins or not any(begin <= address < end for begin, end in inside)
    )


@pytest.mark.parametrize("as_buffer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_without_a_module_the_adapters_alone_are_held(
    base: str, dtype: torch.dtype, as_buffer: bool
) -> None:
    model = model_of(base, dtype, as_buffer=as_buffer)
    ema = ModelEMA(model, include=ADAPTERS, as_module=False)
    train(ema)
    state = ema.state_dict()
    assert [*state["weights"]] == NAMES
    residual = RESIDUAL_DTYPE[dtype].itemsize if dtype in RESIDUAL_DTYPE else 0
    assert held(ema, model) == 2 * 2 * 64 * (dtype.itemsize + residual)
    ema.sync()
    assert ema.distance().distance == 0


def test_what_is_held_is_counted() -> None:
    """The control: with a module, the base is held twice, and without patterns averaged too."""
    model = model_of("plain")
    base, both = 4 * 64 * 64 + 4 * 64, 4 * 2 * 2 * 64
    assert held(ModelEMA(model, include=ADAPTERS), model) == base + both
    assert held(ModelEMA(model, as_module=False), model) == base + both
    assert held(ModelEMA(model, include=ADAPTERS, as_module=False), model) == both


@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_the_averages_are_right_and_the_base_is_as_it_was(base: str, as_module: bool) -> None:
    if as_module and base == "quantized":
        pytest.skip("is an error: test_what_cannot_be_copied_says_as_module_false")
    model = model_of(base)
    expected, before = averages_of(model), copy.copy(model[0].base_layer.weight)
    ema = ModelEMA(model, include=ADAPTERS, as_module=as_module)
    train(ema)
    assert_same({name: ema.state_dict()["weights"][name] for name in NAMES}, expected)
    assert not torch.equal(adapters(model)[NAMES[0]], expected[NAMES[0]])
    inputs = torch.randn(3, 64)
    with torch.no_grad():
        online = model(inputs)
        reference = model_of(base)
        reference.load_state_dict(expected, strict=False)
        with ema.swapped() as evaluated:
            assert torch.equal(evaluated(inputs), reference(inputs))
        assert torch.equal(model(inputs), online)
        assert not torch.equal(online, reference(inputs))
        if as_module:
            assert torch.equal(ema.ema_model(inputs), reference(inputs))
            assert ema.ema_model[0].base_layer.weight.dtype == before.dtype
    if base != "quantized":
        after = model[0].base_layer.weight
        assert torch.equal(after.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_states_and_files_go_round(base: str, as_module: bool, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    if as_module and base == "quantized":
        pytest.skip("is an error")
    options: dict[str, Any] = {"include": ADAPTERS, "as_module": as_module}
    ema = ModelEMA(model_of(base, torch.bfloat16), **options)
    train(ema)
    other = ModelEMA(model_of(base, torch.bfloat16), **options)
    other.load_state_dict(through_file(ema.state_dict()))
    assert_same_state(other, ema)
    ema.save_weights(tmp_path / "ema.safetensors")
    other = ModelEMA(model_of(base, torch.bfloat16), **options)
    with pytest.warns(UserWarning, match="what was rounded off"):
        other.load_weights(tmp_path / "ema.safetensors")
    assert_same(other.state_dict()["weights"], ema.state_dict()["weights"])
    twins = []
    if base != "quantized":  # which would have to know how
        twins.append(copy.deepcopy(ema))
    if base in ("plain", "int8"):  # torch cannot pickle a float8 tensor
        twins.append(pickle.loads(pickle.dumps(ema)))
    for twin in twins:
        train(twin, [5])
        assert twin.update_index == 4


def test_a_float8_base_is_copied_as_it_is() -> None:
    """Whatever the EMA's dtype, at every update."""
    model = model_of("float8")
    for options in ({}, {"ema_dtype": torch.bfloat16}, {"handle_buffers": "update"}):
        ema = ModelEMA(model, include=ADAPTERS, **options)
        model[0].base_layer.weight.data = torch.full((64, 64), 1.5).to(FP8)
        ema.update(0.1)
        copied = ema.ema_model[0].base_layer.weight
        assert copied.dtype == FP8
        assert copied.data_ptr() != model[0].base_layer.weight.data_ptr()
        assert copied.float().eq(1.5).all()
        model[0].base_layer.weight.data.view(torch.uint8).zero_()  # in place
        ema.update(0.0)
        assert copied.float().eq(0).all()
        ema.sync()


@pytest.mark.parametrize("base", ["float8", "int8"])
def test_a_base_that_is_dequantized_is_copied_still(base: str) -> None:
    model = model_of(base)
    ema = ModelEMA(model, include=ADAPTERS)
    weight = model[0].base_layer.weight
    for dtype in (torch.float32, weight.dtype):
        weight.data = torch.full((64, 64), 2.0, dtype=dtype)
        ema.update(0.1)
        assert ema.ema_model[0].base_layer.weight.float().eq(2).all()
        with ema.swapped():
            assert weight.float().eq(2).all()
        weight.data = torch.full((64, 64), 3.0, dtype=dtype)
        ema.copy_to(model)
        assert weight.float().eq(2).all()


def test_a_float8_weight_is_not_averaged() -> None:
    with pytest.raises(TypeError, match=r"0\.base_layer\.weight' is torch.float8_e4m3fn in the .*"
                       "leave it out by include or exclude"):  # fmt: skip
        ModelEMA(model_of("float8"))


@pytest.mark.parametrize("options", [{}, {"include": ADAPTERS}, {"include": "0.base_layer",
                                      "as_module": False}])  # fmt: skip
def test_what_cannot_be_copied_says_as_module_false(options: dict[str, Any]) -> None:
    text = (
        r"'0\.base_layer\.weight' is a Quantized, a subclass that keeps its data in other tensors, "
        r"and can be neither averaged nor copied\. Build the EMA before the model is converted, "
        r"e\.g\. quantized; or, where it is not to be averaged, leave it out by include or "
        r"exclude, with as_module=False, which does not look at it, or with an ema_model that "
        r"shares its module\."
    )
    with pytest.raises(NotImplementedError, match=text):
        ModelEMA(model_of("quantized"), **options)
    given = nn.Sequential(LoRA(Base(plain)))
    if "as_module" not in options:
        with pytest.raises(NotImplementedError, match=text):
            ModelEMA(model_of("quantized"), ema_model=given, **options)
        assert given[0].base_layer.weight.requires_grad is False
        assert given[0].lora_A["default"].weight.requires_grad


@pytest.mark.parametrize("kind", [torch.device("meta"), "lazy", "sparse"])
def test_what_is_left_out_may_be_of_any_kind(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    if kind == "lazy":
        model.append(nn.LazyLinear(2))
    elif kind == "sparse":
        model[1].weight = nn.Parameter(torch.eye(2).to_sparse())
    else:
        model[1] = nn.Linear(2, 2, device=kind)
    with pytest.raises((ValueError, TypeError)):
        ModelEMA(model, include="0")
    ema = ModelEMA(model, include="0", as_module=False)
    model[0].weight.data.add_(1)
    ema.update(0.5)
    assert [*ema.state_dict()["weights"]] == ["0.weight", "0.bias"]


# How an EMA model comes to share the backbone.
SHARES: dict[str, Callable[[Any], Any]] = {
    "the module": lambda model: copy.deepcopy(
        model, {id(model[0].base_layer): model[0].base_layer}
    ),
    "the parameters": lambda model: copy.deepcopy(
        model, {id(t): t for t in (*model[0].base_layer.parameters(), model[0].base_layer.seen)}
    ),
}


@pytest.mark.parametrize("choice", [{"include": ADAPTERS}, {"exclude": "0.base_layer"}])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("share", SHARES)
def test_a_backbone_that_is_shared_and_left_out_is_not_held_twice(
    share: str, base: str, choice: dict[str, Any]
) -> None:
    model = model_of(base)
    given, expected = SHARES[share](model), averages_of(model)
    weight = model[0].base_layer.weight
    ema = ModelEMA(model, ema_model=given, **choice)
    train(ema)
    assert given[0].base_layer.weight is model[0].base_layer.weight is weight
    assert given[0].base_layer.seen is model[0].base_layer.seen
    assert held(ema, model) == 4 * 2 * 2 * 64
    assert_same(ema.state_dict()["weights"], expected)
    inputs = torch.randn(3, 64)
    with torch.no_grad():
        averaged, online = given(inputs), model(inputs)
        assert not torch.equal(averaged, online)
        with ema.swapped():
            assert torch.equal(model(inputs), averaged)
            assert torch.equal(given(inputs), online)
        assert torch.equal(model(inputs), online)
    ema.sync()
    assert_same(dict(adapters(given)), dict(adapters(model)))


def test_what_is_shared_is_the_online_models_own() -> None:
    """It goes on being trained, in its mode, and no load of the EMA writes it."""
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
                           "head": nn.Linear(2, 2)})  # fmt: skip
    given = copy.deepcopy(model, {id(model["body"]): model["body"]})
    ema = ModelEMA(model, ema_model=given, exclude="body")
    assert model["body"][0].weight.requires_grad
    assert all(module.training for module in model.modules())
    assert not given.training
    assert not given["head"].training
    assert not given["head"].weight.requires_grad
    state = copy.deepcopy(ema.state_dict())
    assert [*state["weights"]] == ["head.weight", "head.bias"]
    model["body"][0].weight.data.fill_(5)
    model["body"][1].running_mean.fill_(5)
    ema.update(0.5)
    ema.load_state_dict(state)
    assert model["body"][0].weight.eq(5).all()
    assert model["body"][1].running_mean.eq(5).all()
    # Its state and that of an EMA without a module are alike.
    other = ModelEMA(model, exclude="body", as_module=False)
    other.load_state_dict(state)
    ema.load_weights(other.state_dict())
    with pytest.warns(UserWarning, match=r"its 'body\.0\.weight', .* are not in this EMA"):
        ema.load_weights(model.state_dict(), strict=False)
    twin = copy.deepcopy(ema)
    assert twin.ema_model["body"] is twin.model["body"]
    assert twin.ema_model["body"] is not model["body"]
    assert [*twin.state_dict()["weights"]] == ["head.weight", "head.bias"]
    twin.update(0.5)


@pytest.mark.parametrize("share", SHARES)
def test_what_is_no_longer_shared_is_copied_again(share: str) -> None:
    model = model_of("plain")
    given = SHARES[share](model)
    ema = ModelEMA(model, ema_model=given, include=ADAPTERS)
    assert [*ema.state_dict()["weights"]] == NAMES
    layer = model[0].base_layer
    if share == "the module":
        model[0].base_layer = layer = copy.deepcopy(layer)
    else:
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    layer.weight.data.fill_(3)
    ema.update(0.1)
    assert given[0].base_layer.weight.eq(3).all()
    assert given[0].base_layer.weight is not layer.weight
    layer.weight.data.fill_(4)
    assert given[0].base_layer.weight.eq(3).all()
    ema.update(0.1)
    assert given[0].base_layer.weight.eq(4).all()
    assert "0.base_layer.weight" in ema.state_dict()["weights"]


def test_what_is_shared_and_averaged_stays_an_error() -> None:
    model = model_of("plain")
    given = SHARES["the module"](model)
    text = r"'0\.base_layer\.weight' belongs to a module that the EMA model shares.*leave it out by"
    with pytest.raises(ValueError, match=text):
        ModelEMA(model, ema_model=given)
    assert given[0].lora_A["default"].weight.requires_grad


def test_left_out_goes_by_all_names_of_a_tied_tensor() -> None:
    model = nn.ModuleDict({"a": Base(in_float8), "b": Base(in_float8), "head": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    ModelEMA(model, exclude="a.weight").update(0.5)
    with pytest.raises(TypeError, match="float8"):
        ModelEMA(model, exclude="a.seen")


def test_a_handler_holds_the_adapters_alone() -> None:
    engines = pytest.importorskip("ignite.engine")
    from ema_triton import EMAHandler

    for base in BASES:
        model = model_of(base)
        expected = averages_of(model, range(1))
        handler = EMAHandler(model, momentum=0.3, include=ADAPTERS, as_module=False)

        def step(engine: Any, batch: Any, model: nn.Module = model) -> None:
            for number, parameter in enumerate(adapters(model).values()):
                chance = torch.Generator().manual_seed(number)
                parameter.add_(torch.randn(parameter.shape, generator=chance))

        trainer = engines.Engine(step)
        handler.attach(trainer)
        trainer.run([0])
        assert_same(handler.state_dict()["weights"], expected)
        other = EMAHandler(model_of(base), include=ADAPTERS, as_module=False)
        with pytest.warns(UserWarning, match="replaces Constant"):
            other.load_state_dict(through_file(handler.state_dict()))
        assert_same(other.state_dict()["weights"], expected)
