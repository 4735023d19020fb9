"""What other libraries save of an EMA, told by what is in it: the weights, by our names."""

from __future__ import annotations

import argparse
import os
import stat
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from ema_triton.distributed import dtensor
from ema_triton.modules import clean_weights
from ema_triton.pairing import INTEGERS, memory_key, unsupported

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


def extract_weights(state: object, own: Mapping[str, Any], parameters: Sequence[str]) -> Found:
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
        >>> found = extract_weights(averaged.state_dict(), model.state_dict(), ["weight"])
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
    return isinstance(value, Tensor) and unsupported(dtensor.local_part(value)) is None


def _elements(value: object) -> object:
    """The same for tied tensors alone; None: it has none."""
    return memory_key(value) if isinstance(value, Tensor) and value.numel() else None


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


# What the metadata has beside the names of tied tensors.
FORMAT, UPDATE_INDEX = "format", "update_index"


def write_safetensors(
    path: str | os.PathLike[str], weights: Mapping[str, Tensor], update_index: int
) -> None:
    """Write a safetensors file, which replaces an old one only once it is complete.

    Args:
        path: The file; its folder exists.
        weights: Dense tensors by name, on any device and of any strides. Of tied ones the first
            by name is written, and the metadata has the names of the others, as safetensors'
            `save_model` does.
        update_index: The number of updates made, for the metadata.

    Raises:
        ValueError: A tensor is of a kind that safetensors cannot hold. Nothing was written.
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "weights.safetensors")
        >>> write_safetensors(path, {"weight": torch.arange(3)}, 7)
        >>> read_file(path)
        {'weight': tensor([0, 1, 2])}
    """
    safetensors = _safetensors()
    metadata = {FORMAT: "pt", UPDATE_INDEX: str(update_index)}
    tensors: dict[str, Tensor] = {}
    written: dict[object, str] = {}
    for name in sorted(weights):
        tensor = weights[name]
        try:
            # One without elements shows whether its kind can be held.
            safetensors.torch.save({name: tensor.new_empty(0)})
            first = written.setdefault(memory_key(tensor), name) if tensor.numel() else name
            if first != name and name not in metadata:
                metadata[name] = first
            else:
                tensors[name] = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        except Exception as error:
            raise ValueError(
                f"'{name}' cannot be written as safetensors ({type(error).__name__}: {error}). "
                "Nothing was written. Leave it out or convert it, or save the whole with "
                "torch.save."
            ) from error
    _separate(tensors)
    _replace(os.fsdecode(path), lambda new: safetensors.torch.save_file(tensors, new, metadata))


def read_file(path: str | os.PathLike[str]) -> object:
    """Read a safetensors or torch.save file onto the CPU, telling them by how they begin.

    Args:
        path: The file, of any name.

    Returns:
        A dict of tensors, under tied names too; or what was given to torch.save.

    Raises:
        ValueError: It is not such a file, or damaged, or holds more than weights_only allows.
        OSError: It cannot be opened.
        ImportError: It is a safetensors file, and safetensors is not installed.
    """
    name = os.fsdecode(path)
    with open(name, "rb") as file:
        # safetensors: the length of the header in 8 bytes, then the header, which is JSON.
        is_safetensors = file.read(9)[8:] == b"{"
        file.seek(0)
        try:
            return _load_safetensors(name) if is_safetensors else _torch_load(file)
        except (ImportError, MemoryError):
            raise
        except Exception as error:
            raise ValueError(
                f"No weights can be read from '{name}' ({type(error).__name__}): it is damaged or "
                "incomplete, or no file of safetensors or torch.save, or it holds more than "
                "tensors and plain values, which torch.load(weights_only=True) refuses. Give "
                "another copy of the file, or a dict of its weights."
            ) from error


def _load_safetensors(path: str) -> dict[str, Tensor]:
    with _safetensors().safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        # Copies, as the file is mapped: its tensors would change, or crash, when it does.
        weights: dict[str, Tensor] = {
            name: file.get_tensor(name).clone() for name in sorted(file.keys())
        }
    for name, first in metadata.items():
        if name not in (FORMAT, UPDATE_INDEX) and first in weights:
            weights.setdefault(name, weights[first])
    return weights


def _torch_load(file: IO[bytes]) -> object:
    # timm's checkpoints hold the arguments of its training script, a namespace of plain values.
    # What the user allowed is left out, as it would be forbidden afterwards.
    allowed = {argparse.Namespace}.difference(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([*allowed]):
        # The open file, as torch.load goes by a path's ending; only a path could be mapped.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=False)


def _safetensors() -> Any:  # noqa: ANN401  # its stubs have no types
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Reading or writing a safetensors file takes the package safetensors, which is not "
            "installed. Install it: pip install safetensors numpy."
        ) from error
    return safetensors


def _separate(tensors: dict[str, Tensor]) -> None:
    """Copy what overlaps another one in memory, which safetensors refuses to write."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            tensors[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)


def _replace(path: str, write: Callable[[str], None]) -> None:
    """Write beside the old file, and put the new one into its place at once."""
    target = os.path.realpath(path)  # a link stays one
    folder, name = os.path.split(target)
    new = os.path.join(folder, f".{name[:60]}.{uuid.uuid4().hex}")
    try:
        with open(new, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        write(new)
        # safetensors makes a file for its owner alone; not every file system has modes.
        with suppress(PermissionError):
            os.chmod(new, mode)
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, target)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(new)
