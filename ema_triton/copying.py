"""A model's copy around the EMA's tensors, and what in it would go on using the online model.

`copy.deepcopy` binds methods to the copy, but keeps functions as they are: a closure over the
online model is one over the online model in the copy, too.
"""

from __future__ import annotations

import copy
import dis
import functools
import warnings
import weakref
from collections import ChainMap, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from itertools import chain, islice
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ema_triton.pairing import quoted

# Models and tensors by id, or what stands for them.
Parts: TypeAlias = dict[int, Any]

# How far references are followed: steps from an attribute, and objects looked at in each. Wrappers
# upon wrappers take some; what a trainer holds may be the world.
STEPS, WIDTH = 12, 10_000

# What refers to nothing, or to the world; and what a copy keeps as it is.
ENDS = (str, bytes, int, float, complex, type(None), type, ModuleType)
KEPT = (FunctionType, BuiltinFunctionType, type(functools.cache(len)), weakref.ref)

# Methods with which a copy would move the online model, but that it can do without: accelerate's
# dispatch_model replaces them to warn.
MOVES = ("to", "cpu", "cuda", "xpu")

# Its functions refer to a module to ask for its device.
HARMLESS = "torch.ao.quantization.qconfig"

INSTEAD = (
    "build the EMA with as_module=False and evaluate the online model in swapped(), or give an "
    "ema_model, another instance of the model"
)


def check_references(model: nn.Module) -> None:
    """Look for functions in a model with which a copy of it would use the model itself; warn.

    Raises:
        RuntimeError: One replaces a method, so that the copy would compute with the online model.
    """
    own = _parts_of(model)
    refers: dict[int, bool] = {}
    replaced: list[str] = []
    others: list[str] = []
    for name, module in _copied_modules(model):
        for key, value in _attributes(module).items():
            if type(value) is weakref.ref:
                continue  # the copy gets one of its own
            for kept in _kept_by_a_copy(_eager(value)):
                if id(kept) not in refers:
                    refers[id(kept)] = any(id(found) in own for found in _reached(kept, _referred))
                if refers[id(kept)]:
                    is_method = callable(getattr(type(module), key, None)) and key not in MOVES
                    (replaced if is_method else others).append(f"{name}.{key}" if name else key)
                    break
    if replaced:
        raise RuntimeError(
            "The model cannot be copied to make an EMA model: methods were replaced by functions "
            f"that refer to the model itself: {quoted(replaced)}. A copy has the same functions, "
            f"and would compute with the online model's weights. Either {INSTEAD}, or have a "
            "function take the module as its argument: types.MethodType(function, module)."
        )
    if others:
        warnings.warn(
            "Functions or weak references of the model refer to the model itself: "
            f"{quoted(others)}. Its copy, the EMA model, has the same ones: what they call, read "
            f"or change there is the online model. If that matters, {INSTEAD}.",
            UserWarning,
            stacklevel=4,
        )


def copy_model(model: nn.Module, tensors: Mapping[Tensor | None, Tensor | None]) -> nn.Module:
    """A deep copy that is eager where the model is compiled, so that names are clean.

    Tensors of an autograd graph are copied without it, and process groups are shared.

    Args:
        model: The model.
        tensors: From the model's tensors to those that the copy has in their place. Subclasses of
            Tensor are left to their own `__deepcopy__`.

    Raises:
        RuntimeError: The model cannot be copied.
    """
    own, groups = _parts_of(model), _process_groups(model)
    twins = {id(one): two for one, two in tensors.items() if type(one) in (nn.Parameter, Tensor)}
    memo: Parts = {**groups, **twins}
    with _CopyTensors(twins):
        try:
            for module in reversed([*model.modules()]):  # inner ones first
                if isinstance(compiled := getattr(module, "_orig_mod", None), nn.Module):
                    memo[id(module)] = copy.deepcopy(compiled, memo)
            copied = copy.deepcopy(model, memo)
            for _, module in _copied_modules(model):
                _rebind(module, memo.get(id(module), module), own, memo)
        except Exception as error:
            what, value, reason = _culprit(model, {**own, **groups}) or ("it", model, error)
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            raise RuntimeError(
                f"The model cannot be copied to make an EMA model: {what} is a {kind}, whose copy "
                f"fails: {reason}. Either {INSTEAD}, or build the EMA while it is not there."
            ) from error
    return copied


class _CopyTensors(TorchFunctionMode):
    """Has `copy.deepcopy` copy tensors of a graph, and give the copy views of its own tensors."""

    def __init__(self, twins: Parts) -> None:
        super().__init__()
        self._twins = twins

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        base = tensor._base
        twin = self._twins.get(id(base))
        if twin is not None and twin.stride() == base.stride() and _bits(tensor) == _bits(base):
            start = twin.storage_offset() + tensor.storage_offset() - base.storage_offset()
            view = twin.detach().as_strided(tensor.shape, tensor.stride(), start)
            return memo.setdefault(id(tensor), view)
        if tensor.is_leaf:
            return func(tensor, memo)
        return memo.setdefault(id(tensor), tensor.detach().clone())


def _bits(tensor: Tensor) -> tuple[object, ...]:
    """What the bits in its memory mean."""
    return tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _rebind(module: nn.Module, copied: nn.Module, own: Parts, memo: Parts) -> None:
    """Give the copy of a module its own methods, uncompiled, and its own weak references."""
    attributes = vars(copied)
    for key, value in vars(module).items():
        if attributes.get(key) is not value:
            continue
        plain = _eager(value)
        if type(value) is weakref.ref:
            if id(value()) in own:
                attributes[key] = weakref.ref(copy.deepcopy(value(), memo))
        elif plain is not value and isinstance(plain, MethodType) and id(plain.__self__) in own:
            attributes[key] = copy.deepcopy(plain, memo)


def _culprit(model: nn.Module, memo: Parts) -> tuple[str, object, Exception] | None:
    """What alone cannot be copied: its name, itself, and how it fails; inner modules first."""
    for name, module in reversed([*_copied_modules(model)]):
        for key, value in _attributes(module).items():
            if found := _culprit_in(f"{name}.{key}" if name else key, value, memo):
                return found
        others = {one: part for one, part in memo.items() if part is not module}
        if found := _culprit_in(name, module, others):
            return found
    return None


def _culprit_in(
    name: str,
    value: Any,  # noqa: ANN401
    memo: MutableMapping[int, Any],
) -> tuple[str, object, Exception] | None:
    try:
        copy.deepcopy(value, ChainMap({}, memo))  # type: ignore[arg-type]
    except Exception as error:
        items = enumerate(value) if isinstance(value, list | tuple) else ()
        for key, part in value.items() if isinstance(value, dict) else items:
            # It may hold itself.
            if found := _culprit_in(f"{name}[{key!r}]", part, ChainMap({id(value): value}, memo)):
                return found
        return f"'{name}'" if name else "it", value, error
    return None


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What of the module's attributes `copy.deepcopy` copies."""
    if not hasattr(type(module), "__deepcopy__"):
        with suppress(Exception):  # deepcopy will say so
            state = module.__getstate__()  # type: ignore[no-untyped-call]
            if isinstance(state, dict):
                return state
    return vars(module)


def _parts_of(model: nn.Module) -> Parts:
    """The model's modules and tensors."""
    return {id(one): one for one in (*model.modules(), *model.parameters(), *model.buffers())}


def _copied_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by name, without torch.compile's wrappers, which are taken off."""
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "_orig_mod", None), nn.Module):
            yield name, module


def _process_groups(model: nn.Module) -> Parts:
    """What the model has of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    modules = (module for _, module in _copied_modules(model))
    values = chain.from_iterable(_attributes(module).values() for module in modules)
    found = chain.from_iterable(_reached(value, _copied) for value in values)
    return {id(one): one for one in found if isinstance(one, torch.distributed.ProcessGroup)}


def _kept_by_a_copy(value: object) -> Iterator[object]:
    """What of it `copy.deepcopy` does not copy, though it may refer to other things."""
    return (found for found in _reached(value, _copied) if issubclass(type(found), KEPT))


def _reached(value: object, parts: Callable[[Any], Iterable[object]]) -> Iterator[object]:
    """The value, its parts, the parts of those, and so on, the near ones first."""
    level: list[object] = []
    seen: dict[int, object] = {}  # which keeps alive what was made for this, so that ids stay
    pending: Iterable[object] = (value,)
    for _ in range(STEPS):
        for one in islice(pending, WIDTH):
            if not issubclass(type(one), ENDS) and id(one) not in seen:
                seen[id(one)] = one
                level.append(one)
        if not level:
            return
        yield from level
        pending, level = chain.from_iterable(map(parts, level)), []


def _copied(value: Any) -> Iterable[object]:  # noqa: ANN401
    """What `copy.deepcopy` of the value goes on with."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        return [*value.keys(), *value.values()]
    if kind in (list, tuple):
        return value  # type: ignore[no-any-return]
    if kind is MethodType:
        return value.__func__, value.__self__
    if issubclass(kind, (*KEPT, *ENDS, nn.Module)) or hasattr(kind, "__deepcopy__"):
        return ()
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:
        return ()  # neither can it be copied
    if isinstance(reduced, str):
        return ()
    # Arguments and state; and items of lists and dicts, as iterators.
    return chain(reduced[1:3], *(part for part in reduced[3:5] if part is not None))


def _referred(value: Any) -> Iterable[object]:  # noqa: ANN401
    """What the value refers to."""
    kind = type(value)
    if kind is FunctionType:
        plain = _eager(value)
        if plain is not value:
            return (plain,)
        return () if value.__globals__.get("__name__") == HARMLESS else _used_by(value)
    if kind in (MethodType, BuiltinFunctionType):
        return value.__self__, getattr(value, "__func__", None)
    if issubclass(kind, functools.partial):
        return value.func, value.args, value.keywords
    if issubclass(kind, weakref.ref):
        return (value(),)
    if issubclass(kind, dict):
        return [*value.keys(), *value.values()]
    if issubclass(kind, list | tuple | set | frozenset | deque):
        return [*value]
    if issubclass(kind, nn.Module):
        return _parts_of(value).values()
    if issubclass(kind, (Tensor, *ENDS)):
        return ()
    with suppress(AttributeError):
        return [*object.__getattribute__(value, "__dict__").values()]
    return ()


def _used_by(function: FunctionType) -> Iterator[object]:
    """What the function's code can use: closure, defaults, modules and methods among globals."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in _globals_of(function.__code__):
        value = _eager(function.__globals__.get(name))
        # A function's own globals are read, but not those of functions that it calls.
        if isinstance(value, nn.Module | Tensor | MethodType | functools.partial | weakref.ref):
            yield value


def _globals_of(code: CodeType) -> set[str]:
    """The names of the globals that the code reads; comprehensions and the like are codes in it."""
    inner = [_globals_of(one) for one in code.co_consts if isinstance(one, CodeType)]
    own = {one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL"}
    return own.union(*inner)


def _eager(function: Any) -> Any:  # noqa: ANN401
    """The function that torch.compile or torch.compiler.disable was given; others as they are."""
    compilers = ("torch._dynamo.eval_frame", "torch._dynamo.external_utils")
    while type(function) is FunctionType and function.__globals__.get("__name__") in compilers:
        if (wrapped := vars(function).get("__wrapped__")) is None:
            break
        function = wrapped
    return function
