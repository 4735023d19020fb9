"""What other libraries save of an EMA, told by what is in it: the weights, by our names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from torch import Tensor

from ema_triton import shards
from ema_triton.pairs import INTEGERS, clean_weights, elements, flaw

PLAIN = "a module's state dict"
WRAPPED = "a wrapped module's state dict"


class Wrapper(NamedTuple):
    """A module around the model: in its state dict, the model's names have a prefix."""

    source: str
    prefix: str
    others: tuple[str, ...]  # how names without the prefix begin
    counter: str | None  # the one of them that counts the updates

    def inner(self, name: str) -> str | None:
        """The name without the prefix; None: it has none."""
        return name[len(self.prefix) :] if name.startswith(self.prefix) else None


# DistributedDataParallel, DataParallel and timm's ModelEmaV2 and V3 cannot be told apart.
WRAPPERS = (
    Wrapper(WRAPPED, "module.", (), None),
    Wrapper("torch's AveragedModel", "module.", ("n_averaged",), "n_averaged"),
    Wrapper("ema-pytorch's EMA", "ema_model.", ("initted", "step", "online_model."), "step"),
)


class Found(NamedTuple):
    """The weights that a state holds, and what else it tells."""

    weights: dict[str, Any]  # by clean name
    source: str
    updates: int | None  # as that library counts them; None: it does not tell
    kept: list[str]  # names that it does not have, whose values are the EMA model's own


def weights_of(state: object, own: Mapping[str, Any], parameters: Sequence[str]) -> Found:
    """Recognise what another library saved, and take the weights out of it.

    That is a module's state dict, of a module in any nesting of DistributedDataParallel,
    torch.compile, torch's AveragedModel, timm's ModelEmaV2 and V3 and ema-pytorch's EMA; timm's
    checkpoint; and the state of diffusers' EMAModel. A prefix is taken off only where the names fit
    better without it. Whether they fit in the end is left to `Saved.check_fit`; but diffusers'
    tensors, which have no names, are compared with the parameters here.

    Args:
        state: What was read from a file.
        own: The EMA model's own state, by clean name.
        parameters: Their names in `own`, in the order of `model.parameters()`.

    Raises:
        ValueError: It is none of these, or diffusers' tensors do not fit the parameters.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> averaged = AveragedModel(model)
        >>> averaged.update_parameters(model)
        >>> found = weights_of(averaged.state_dict(), model.state_dict(), ["weight"])
        >>> [*found.weights], found.source, found.updates
        (['weight'], "torch's AveragedModel", 1)
    """
    if not isinstance(state, Mapping) or not state:
        got = "an empty one" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise ValueError(
            f"The state must be a dict with a model's weights, but got {got}. Give what a module's "
            "state_dict() returned, or what PyTorch, timm, ema-pytorch or diffusers saved of an "
            "EMA."
        )
    shadows = state.get("shadow_params")
    if isinstance(shadows, (list, tuple)):
        return _by_order(shadows, _count(state.get("optimization_step")), own, parameters)
    checkpoint = isinstance(state.get("state_dict_ema"), Mapping)
    weights = state["state_dict_ema"] if checkpoint else state
    found = _by_name(weights, own)
    if found is None:
        raise _unknown(state, own)
    return found._replace(source="timm's checkpoint") if checkpoint else found


def _by_name(state: Mapping[Any, Any], own: Mapping[str, Any]) -> Found | None:
    """With as many prefixes taken off as makes the names fit best; None: it holds no weights."""
    if not all(isinstance(name, str) for name in state):
        return None
    weights = clean_weights(state)
    source, updates = PLAIN, None
    best = Found(weights, source, updates, [])
    while (wrapper := _wrapper(weights)) is not None:
        if source in (PLAIN, WRAPPED):  # the outermost one that tells something
            source = wrapper.source
            updates = _count(weights.get(wrapper.counter)) if wrapper.counter else None
        weights = {
            inner: value
            for name, value in weights.items()
            if (inner := wrapper.inner(name)) is not None
        }
        if len(weights.keys() ^ own.keys()) < len(best.weights.keys() ^ own.keys()):
            best = Found(weights, source, updates, [])
    if not best.weights.keys() & own.keys() and (
        any(isinstance(value, Mapping) for value in state.values())
        or not any(isinstance(value, Tensor) for value in state.values())
    ):
        return None
    return best


def _wrapper(weights: Mapping[str, Any]) -> Wrapper | None:
    for wrapper in WRAPPERS:
        others = [name for name in weights if not name.startswith(wrapper.prefix)]
        if len(others) < len(weights) and all(name.startswith(wrapper.others) for name in others):
            return wrapper
    return None


def _by_order(
    shadows: Sequence[object], updates: int | None, own: Mapping[str, Any], names: Sequence[str]
) -> Found:
    """The weights of diffusers' EMAModel, a list; it has no buffers."""
    problem = None
    for position, (shadow, name) in enumerate(zip(shadows, names, strict=False)):
        if not _is_plain(shadow):
            problem = f"[{position}] is a {type(shadow).__name__}, not a dense tensor with values"
        elif name not in own:
            problem = f"[{position}] is of '{name}', which the EMA model's state dict does not have"
        elif shadow.shape != own[name].shape:
            shape = tuple(own[name].shape)
            problem = f"[{position}] is {tuple(shadow.shape)}, but '{name}' is {shape} here"
        if problem:
            break
    if problem is None and len(shadows) < len(names):
        problem = f"[{len(shadows)}] is missing, which would be '{names[len(shadows)]}'"
    if problem is None and len(shadows) > len(names):
        problem = f"[{len(names)}] is beyond the last parameter"
    if problem:
        raise ValueError(
            f"The state of diffusers' EMAModel has {len(shadows)} tensors without names, which do "
            f"not fit this EMA model's {len(names)} parameters by their order: "
            f"shadow_params{problem}. Nothing was loaded. Load it into the EMA of a model like the "
            "one it was made of, from all of model.parameters()."
        )
    by_name = dict(zip(names, shadows, strict=True))
    by_place = {
        place: by_name[name] for name in names if (place := _elements(own[name])) is not None
    }
    weights: dict[str, Any] = {}
    kept = []
    for name, value in own.items():
        if name in by_name:
            weights[name] = by_name[name]
        elif (place := _elements(value)) in by_place:  # the other name of a tied parameter
            weights[name] = by_place[place]
        else:
            weights[name] = value
            kept.append(name)
    return Found(weights, "diffusers' EMAModel", updates, kept)


def _is_plain(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and flaw(shards.local(value)) is None


def _elements(value: object) -> object:
    """The same for tied tensors alone; None: it has none."""
    return elements(value) if isinstance(value, Tensor) and value.numel() else None


def _count(value: object) -> int | None:
    if isinstance(value, Tensor):
        if not _is_plain(value) or value.dtype not in INTEGERS:
            return None
        value = value.item() if value.numel() == 1 else None
    return value if type(value) is int and value >= 0 else None


def _unknown(state: Mapping[Any, Any], own: Mapping[str, Any]) -> ValueError:
    keys = [repr(key) if isinstance(key, str) else f"a {type(key).__name__}" for key in state]
    shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    fitting = [
        key
        for key, value in state.items()
        if isinstance(key, str)
        and isinstance(value, Mapping)
        and (found := _by_name(value, own)) is not None
        and found.weights.keys() & own.keys()
    ]
    # Where online and EMA weights lie side by side, the EMA's are wanted.
    fitting.sort(key=lambda key: "ema" not in key.lower())
    example = repr(fitting[0]) if fitting else "'model'"
    return ValueError(
        "The state is none that is recognised: neither a model's weights by name, nor what "
        f"PyTorch, timm, ema-pytorch or diffusers save of an EMA. Its keys are {shown}. Hand over "
        f"the weights in it, e.g. load_weights(torch.load(path)[{example}])."
    )
