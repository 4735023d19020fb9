"""Functions that are bound to the online model, which a copy of it would go on calling."""

import functools
import pickle
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA
from tests.plain import move
from tests.test_copying import INPUTS, Net, evaluates_as_the_swapped_model, handler_of
from tests.unets import make_unet

ERROR = r"(?s)cannot be copied.*{}.*as_module=False.*swapped\(\).*ema_model"
WARNING = r"(?s){}.*online model.*as_module=False.*swapped\(\).*ema_model"


class Decorated(Net):
    """Whose forward is wrapped in its class."""

    @torch.autocast("cpu", enabled=False)
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs)


def compile_forward(model: Net) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def compile_submodule(model: Net) -> None:
    model.body.forward = torch.compile(model.body.forward, backend="eager")


def compile_twice(model: Net) -> None:
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    model.forward = torch.compile(model.forward, backend="eager")


def compile_in_place(model: Net) -> None:
    model.body.compile(backend="eager")
    model.compile(backend="eager")


def compile_parametrized(model: Net) -> None:
    nn.utils.parametrizations.weight_norm(model.body)
    model.body.compile(backend="eager")


def disable(model: Net) -> None:
    model.forward = torch.compiler.disable(model.forward)


def compile_in_compiled(model: Net) -> None:
    compile_forward(model)
    model.body = torch.compile(model.body, backend="eager")


def bind(model: Net) -> None:
    model.forward = model.forward


def partial_of_a_method(model: Net) -> None:
    model.forward = functools.partial(model.forward)


def partial_with_the_module(model: Net) -> None:
    model.forward = functools.update_wrapper(
        functools.partial(type(model).forward, model), model.forward
    )


def method_of_a_function(model: Net) -> None:
    def forward(self: Net, inputs: Tensor) -> Tensor:
        return type(self).forward(self, inputs) * 2

    model.forward = types.MethodType(forward, model)


def compiled_method_of_a_function(model: Net) -> None:
    method_of_a_function(model)
    compile_forward(model)


class Doubled:
    """A callable object that holds a method."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.function(inputs) * 2


def object_with_a_method(model: Net) -> None:
    model.forward = Doubled(model.forward)


REBOUND: list[Callable[[Net], object]] = [
    compile_forward,
    compile_submodule,
    compile_twice,
    compile_in_place,
    compile_parametrized,
    compile_in_compiled,
    disable,
    bind,
    partial_of_a_method,
    partial_with_the_module,
    method_of_a_function,
    compiled_method_of_a_function,
    object_with_a_method,
]


@pytest.mark.parametrize("kind", [Net, Decorated])
@pytest.mark.parametrize("change", REBOUND)
def test_a_method_in_an_attribute_is_the_copys_own(
    change: Callable[[Net], object], kind: type[Net]
) -> None:
    torch._dynamo.reset()
    model = kind()
    change(model)
    before = dict(vars(model))
    ema = ModelEMA(model)
    assert vars(model) == before  # the online model is compiled as it was
    assert evaluates_as_the_swapped_model(ema, INPUTS)


def test_the_copy_of_a_compiled_model_can_be_pickled() -> None:
    model = Net()
    compile_forward(model)
    compile_submodule(model)
    ema = ModelEMA(model).ema_model
    loaded = pickle.loads(pickle.dumps(ema))
    loaded.body.weight.data.zero_()
    loaded.body.bias.data.zero_()
    assert torch.equal(loaded(INPUTS)[0], loaded.head.bias)
    assert not torch.equal(ema(INPUTS)[0], ema.head.bias)


@pytest.mark.parametrize("options", [{}, {"as_module": False}])
def test_the_handler_and_swaps_leave_the_online_model_compiled(options: dict[str, Any]) -> None:
    model = Net()
    compile_forward(model)
    compiled = model.forward
    ema = handler_of(model, **options).ema
    with ema.swapped():
        assert model.forward is compiled
    assert model.forward is compiled
    if not options:
        assert ema.ema_model.forward.__self__ is ema.ema_model


def test_a_compiled_function_that_is_no_method_stays() -> None:
    model = Net()
    model.act = torch.compile(torch.tanh, backend="eager")
    model.other = torch.compile(lambda inputs: inputs + 1, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema = ModelEMA(model).ema_model
    assert ema.act is model.act
    assert ema.other is model.other


def test_a_weak_reference_is_to_the_copy() -> None:
    model = Net()
    model.body.parent = weakref.ref(model)
    model.body.weak = weakref.ref(model.body.weight)
    outside = nn.Linear(1, 1)
    model.body.outside = weakref.ref(outside)
    ema = ModelEMA(model).ema_model
    assert ema.body.parent() is ema
    assert ema.body.weak() is ema.body.weight
    assert ema.body.outside() is outside
    assert model.body.parent() is model


def closure(model: Net) -> Callable[..., Any]:
    forward = model.forward
    return lambda inputs: forward(inputs) * 2


def over_the_module(model: Net) -> Callable[..., Any]:
    return lambda inputs: Net.forward(model, inputs)


def over_a_submodule(model: Net) -> Callable[..., Any]:
    body = model.body
    return lambda inputs: body(inputs)


def over_a_weight(model: Net) -> Callable[..., Any]:
    weight = model.head.weight
    return lambda inputs: inputs @ weight.t()


def default(model: Net) -> Callable[..., Any]:
    return lambda inputs, forward=model.forward: forward(inputs)


def keyword_default(model: Net) -> Callable[..., Any]:
    def forward(inputs: Tensor, *, model: Net = model) -> Tensor:
        return Net.forward(model, inputs)

    return forward


def method_over_the_old_one(model: Net) -> Callable[..., Any]:
    old = model.forward
    return types.MethodType(lambda self, inputs: old(inputs) * 2, model)


def partial_of_a_closure(model: Net) -> Callable[..., Any]:
    return functools.partial(closure(model))


def nested(model: Net) -> Callable[..., Any]:
    once = closure(model)
    return functools.wraps(once)(lambda inputs: once(inputs) * 2)


def no_grad(model: Net) -> Callable[..., Any]:
    return torch.no_grad()(model.forward)


def in_an_object(model: Net) -> Callable[..., Any]:
    doubled = Doubled(model.forward)
    return lambda inputs: doubled(inputs)


def closure_in_an_object(model: Net) -> Callable[..., Any]:
    return Doubled(closure(model))


def in_a_list(model: Net) -> Callable[..., Any]:
    layers = [model.body, model.head]
    return lambda inputs: layers[1](layers[0](inputs))


def in_a_wrapper(model: Net) -> Callable[..., Any]:
    wrapper = nn.Sequential(nn.Identity(), model.body)
    return lambda inputs: wrapper(inputs)


def weak(model: Net) -> Callable[..., Any]:
    reference = weakref.ref(model)
    return lambda inputs: Net.forward(reference(), inputs)


def compiled_closure(model: Net) -> Callable[..., Any]:
    return torch.compile(closure(model), backend="eager")


def closure_over_compiled(model: Net) -> Callable[..., Any]:
    compiled = torch.compile(model.forward, backend="eager")
    return lambda inputs: compiled(inputs) * 2


def cached(model: Net) -> Callable[..., Any]:
    return functools.lru_cache(maxsize=1)(model.forward)


def method_of_a_tensor(model: Net) -> Callable[..., Any]:
    return model.head.weight.matmul


def of_a_script(model: Net) -> Callable[..., Any]:
    """What a script or a notebook says at its top level: the method is a global there."""
    script = {"model": model}
    exec("old = model.forward\nmodel.forward = lambda x: [old(one) for one in [x]][0] * 2", script)
    return model.forward


BOUND: list[Callable[[Net], Callable[..., Any]]] = [
    closure,
    over_the_module,
    over_a_submodule,
    over_a_weight,
    default,
    keyword_default,
    method_over_the_old_one,
    partial_of_a_closure,
    nested,
    no_grad,
    in_an_object,
    closure_in_an_object,
    in_a_list,
    in_a_wrapper,
    weak,
    compiled_closure,
    closure_over_compiled,
    cached,
    method_of_a_tensor,
    of_a_script,
]


@pytest.mark.parametrize("make", BOUND)
def test_a_method_replaced_by_a_function_of_the_online_model_is_refused(
    make: Callable[[Net], Callable[..., Any]],
) -> None:
    outer = nn.Sequential(model := Net())
    model.forward = make(model)
    before = dict(vars(model))
    for build in (ModelEMA, handler_of):
        with pytest.raises(RuntimeError, match=ERROR.format(r"'0\.forward'")):
            build(outer)
    assert vars(model) == before
    given = nn.Sequential(Net())
    assert ModelEMA(outer, ema_model=given).ema_model is given
    ema = ModelEMA(outer, as_module=False)
    inputs = INPUTS if make is not method_of_a_tensor else INPUTS.t()
    online = outer(inputs.clone())  # a clone, so that `cached` computes each time
    for parameter in ema.state_dict()["weights"].values():
        parameter.zero_()
    with ema.swapped(), torch.no_grad():
        found = outer(inputs.clone())
        assert not torch.equal(found, online)
        assert found.eq(0).all()
    assert torch.equal(outer(inputs.clone()), online)


@pytest.mark.parametrize("make", BOUND)
def test_a_function_of_the_online_model_elsewhere_is_warned_of(
    make: Callable[[Net], Callable[..., Any]],
) -> None:
    outer = nn.Sequential(model := Net())
    function = make(model)
    vars(model).pop("forward", None)
    model.extra = function
    with pytest.warns(UserWarning, match=WARNING.format(r"'0\.extra'")) as caught:
        ema = ModelEMA(outer)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert evaluates_as_the_swapped_model(ema, INPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelEMA(outer, as_module=False)
        ModelEMA(outer, ema_model=nn.Sequential(Net()))


def test_all_methods_that_were_replaced_are_named() -> None:
    model = Net()
    model.body.forward = model.head.forward = closure(model)
    state_dict = model.state_dict
    model.state_dict = lambda *_, **__: state_dict()
    with pytest.raises(RuntimeError, match=r"'state_dict', 'body\.forward', 'head\.forward'"):
        ModelEMA(model)


def test_one_warning_lists_all_names() -> None:
    model = Net()
    seen: list[nn.Module] = [model.body]
    model.body.register_forward_hook(lambda *_: seen.clear())
    model.head.register_forward_pre_hook(functools.partial(lambda owner, *_: None, model.body))
    model.head.register_full_backward_hook(lambda *_: seen.clear())
    model.head.register_forward_pre_hook(lambda *_, owner=model: None)
    model.register_state_dict_post_hook(lambda *_: seen.clear())
    model.callbacks = {"end": [lambda: model.eval()]}
    model.parents = [weakref.ref(model)]
    names = (
        r"'_state_dict_hooks', 'callbacks', 'parents', 'body\._forward_hooks', "
        r"'head\._backward_hooks' and 1 more"
    )
    with pytest.warns(UserWarning, match=WARNING.format(names)) as caught:
        ModelEMA(model)
    assert len(caught) == 1


def test_a_function_of_many_modules_is_named_for_each_and_read_once() -> None:
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(300)])
    for layer in model:
        layer.register_forward_hook(lambda *_, owner=model: None)
    with pytest.warns(UserWarning, match=r"'0\._forward_hooks', .* and 295 more"):
        ModelEMA(model)


def hook(module: nn.Module, arguments: object, output: object) -> None:
    """A hook that refers to nothing."""


class Trainer:
    """What others hold of a training: not the model."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.teacher = Net()

    def hook(self, module: nn.Module, arguments: object, output: Tensor) -> None:
        self.outputs["last"] = output.detach()


def harmless(model: Net) -> None:
    trainer, outputs, count = Trainer(), [], 3
    empty: Any

    def over_an_empty_cell(*_: object) -> object:
        return empty

    model.register_forward_hook(hook)
    model.body.register_forward_hook(lambda module, _, output: outputs.append(output.detach()))
    model.body.register_forward_hook(trainer.hook)
    model.body.register_forward_hook(lambda *arguments: trainer.hook(*arguments))
    model.body.register_forward_pre_hook(lambda *_: outputs.clear(), with_kwargs=True)
    model.body.register_load_state_dict_pre_hook(lambda *_: count)
    model.handle = model.register_forward_hook(model.watch)
    model.register_state_dict_pre_hook(model.watch)
    model.scale = lambda inputs: inputs * count
    model.later = over_an_empty_cell
    model.table = {"act": torch.tanh, "of": Net.forward, "kind": Net}
    model.again = functools.partial(model.watch, 3)
    model.children_too = [model.body, model.head]
    model.known = {model.body: "body"}
    if count < 0:
        empty = 0


class Watched(Net):
    def watch(self, *_: object) -> None: ...


def test_what_does_not_refer_to_the_online_model_is_not_warned_of() -> None:
    model = Watched()
    harmless(model)
    ema = ModelEMA(model)  # a warning is an error
    assert ema.ema_model.again.func.__self__ is ema.ema_model
    assert ema.ema_model.children_too[0] is ema.ema_model.body
    assert ema.ema_model.known == {ema.ema_model.body: "body"}
    assert evaluates_as_the_swapped_model(ema, INPUTS)


def test_a_large_attribute_is_not_walked_through() -> None:
    calls = 0

    class Entry:
        def __reduce_ex__(self, protocol: Any) -> Any:
            nonlocal calls
            calls += 1
            return Entry, ()

    model = Net()
    model.entries = [Entry() for _ in range(100_000)]
    ModelEMA(model, as_module=False)
    assert calls == 0
    ModelEMA(model)
    assert 100_000 <= calls < 150_000


def test_checkpointed_modules_are_not_warned_of() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Net()
    model.body = checkpoint_wrapper(model.body)
    assert evaluates_as_the_swapped_model(ModelEMA(model), INPUTS)


def test_a_traced_module_is_not_warned_of() -> None:
    assert evaluates_as_the_swapped_model(ModelEMA(torch.fx.symbolic_trace(Net())), INPUTS)


def prepared(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)


def test_accelerates_mixed_precision_is_that_of_the_copy() -> None:
    model = prepared(Net())
    ema = ModelEMA(model)
    assert ema.ema_model(INPUTS).dtype == torch.float32
    assert evaluates_as_the_swapped_model(ema, INPUTS)


def test_accelerates_mixed_precision_around_another_forward_is_refused() -> None:
    model = Net()
    partial_with_the_module(model)
    model = prepared(model)
    with pytest.raises(RuntimeError, match=ERROR.format("'forward'")):
        ModelEMA(model)
    ModelEMA(model, as_module=False).update(0.5)


def test_accelerates_hooks_are_those_of_the_copy() -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubling(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 2

    model = Net()
    hooks.add_hook_to_module(model, Doubling())
    hooks.add_hook_to_module(model.body, Doubling())
    assert evaluates_as_the_swapped_model(ModelEMA(model), INPUTS)


def test_accelerates_dispatched_model_is_warned_of_for_its_moves() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(Net())
    accelerate.dispatch_model(model, {"0.body": "cpu", "0.head": "cpu"}, force_hooks=True)
    with pytest.warns(UserWarning, match=WARNING.format("'to', ")):
        ema = ModelEMA(model)
    assert evaluates_as_the_swapped_model(ema, INPUTS)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max")
def test_a_model_prepared_for_quantization_is_not_warned_of() -> None:
    from torch.ao import quantization

    model = Net()
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    quantization.prepare_qat(model, inplace=True)
    model(INPUTS).sum().backward()
    model.register_forward_hook(lambda *_: model.train())  # the control
    with pytest.warns(UserWarning, match="model itself: '_forward_hooks'\\.") as caught:
        ModelEMA(model)
    assert len(caught) == 1


def test_models_of_transformers_are_not_warned_of() -> None:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 11}
    configuration = transformers.LlamaConfig(
        **size, intermediate_size=8, num_key_value_heads=2, max_position_embeddings=16
    )
    model = transformers.LlamaForCausalLM(configuration)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    tokens = torch.tensor([[1, 2, 3]])
    model(tokens, labels=tokens, output_hidden_states=True).loss.backward()
    ema = ModelEMA(model)
    move(model, 0)
    ema.update(0.5)
    with torch.no_grad():
        found = ema.ema_model(tokens).logits
        model.eval()
        assert not torch.equal(found, model(tokens).logits)
        with ema.swapped():
            assert torch.equal(found, model(tokens).logits)


def test_models_of_diffusers_are_not_warned_of() -> None:
    model = make_unet(attention=True)
    model.enable_gradient_checkpointing()
    noise = torch.randn(1, 1, 8, 8)
    model(noise, 3).sample.sum().backward()
    ema = ModelEMA(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    ema.update(0.5)
    with torch.no_grad():
        found = ema.ema_model(noise, 3).sample
        model.eval()
        assert not torch.equal(found, model(noise, 3).sample)
        with ema.swapped():
            assert torch.equal(found, model(noise, 3).sample)


def test_hooks_of_diffusers_that_replace_a_forward_are_refused() -> None:
    model = make_unet(attention=True)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with pytest.raises(RuntimeError, match=ERROR.format(r"forward'")):
        ModelEMA(model)
    ModelEMA(model, as_module=False).update(0.5)
