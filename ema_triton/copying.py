"""A model's copy around the EMA's tensors."""

from __future__ import annotations

import copy
from collections import ChainMap, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from itertools import chain, islice
from types import MethodType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Models and tensors by id, or what stands for them.
Parts: TypeAlias = dict[int, Any]

# How far references are followed: steps from an attribute, and objects looked at in each. Wrappers
# upon wrappers take some; what a trainer holds may be the world.
STEPS, WIDTH = 12, 10_000

# What refers to nothing, or to the world.
ENDS = (str, bytes, int, float, complex, type(None), type, ModuleType)

INSTEAD = (
    "build the EMA with as_module=False and evaluate the online model in swapped(), or give an "
    "ema_model, another instance of the model"
)


def copy_model(model: nn.Module, tensors: Mapping[Tensor | None, Tensor | None]) -> nn.Module:
    """A deep copy with all torch.compile wrappers taken off, so that names are clean.

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
            return copy.deepcopy(model, memo)
        except Exception as error:
            what, value, reason = _culprit(model, {**own, **groups}) or ("it", model, error)
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            raise RuntimeError(
                f"The model cannot be copied to make an EMA model: {what} is a {kind}, whose copy "
                f"fails: {reason}. Either {INSTEAD}, or build the EMA while it is not there."
            ) from error


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


def _reached(value: object, parts: Callable[[Any], Iterable[object]]) -> Iterator[object]:
    """The value, its parts, theirs, and so on, the near ones first."""
    level: list[object] = []
    seen: dict[int, object] = {}  # which keeps alive what was made for this, so that ids stay
    following: Iterable[object] = (value,)
    for _ in range(STEPS):
        for one in islice(following, WIDTH):
            if not issubclass(type(one), ENDS) and id(one) not in seen:
                seen[id(one)] = one
                level.append(one)
        if not level:
            return
        yield from level
        following, level = chain.from_iterable(map(parts, level)), []


def _copied(value: Any) -> Iterable[object]:  # noqa: ANN401
    """What `copy.deepcopy` of the value goes on with."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        return [*value.keys(), *value.values()]
    if kind in (list, tuple):
        return value  # type: ignore[no-any-return]
    if kind is MethodType:
        return value.__func__, value.__self__
    if issubclass(kind, (*ENDS, nn.Module)) or hasattr(kind, "__deepcopy__"):
        return ()
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:
        return ()  # neither can it be copied
    if isinstance(reduced, str):
        return ()
    # Arguments and state; and items of lists and dicts, as iterators.
    return chain(reduced[1:3], *(part for part in reduced[3:5] if part is not None))
