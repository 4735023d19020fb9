"""What others read and write: other libraries' checkpoints of an EMA, and safetensors files."""

from __future__ import annotations

import argparse
import json
import os
import stat
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from ema_triton.modules import clean_weights
from ema_triton.pairing import INTEGERS, memory_key, quoted, unsupported

PLAIN = "a module's state dict"
DIFFUSERS = "diffusers' EMAModel"

# The files of weights in a folder that `save_pretrained` of diffusers or transformers wrote. Where
# a model has several, an index stands in their place.
DIFFUSERS_NAME = "diffusion_pytorch_model"
FOLDER_NAMES = (
    f"{DIFFUSERS_NAME}.safetensors",
    "model.safetensors",
    f"{DIFFUSERS_NAME}.bin",
    "pytorch_model.bin",
)
INDEX = ".index.json"


class Wrapper(NamedTuple):
    """A module around the model, which prefixes the model's names in its state dict."""

    source: str
    prefix: str
    others: tuple[str, ...] = ()  # prefixes of all its other names
    counter: str = ""  # the name of its count of updates

    def matches(self, names: Collection[str]) -> bool:
        """Whether these can be the names in its state dict."""
        return any(name.startswith(self.prefix) for name in names) and all(
            name.startswith((self.prefix, *self.others)) for name in names
        )


WRAPPERS = (
    Wrapper(PLAIN, "module."),  # of DistributedDataParallel, DataParallel, timm's ModelEmaV2 or V3
    Wrapper("torch's AveragedModel", "module.", ("n_averaged",), "n_averaged"),
    Wrapper("ema-pytorch's EMA", "ema_model.", ("initted", "step", "online_model."), "step"),
)


class ForeignWeights(NamedTuple):
    """The weights in what another library saved."""

    weights: dict[str, Any]  # by clean name
    source: str
    updates: int | None  # as that library counts them; None: it does not say
    has_all_names: bool = True  # False: it has the parameters only


def extract_weights(
    state: object, own: Mapping[str, Any], parameters: Sequence[Sequence[str]]
) -> ForeignWeights:
    """Recognise what another library saved, and take the weights out of it.

    Recognised are the state dict of a module, in any nesting of DistributedDataParallel,
    torch.compile, torch's AveragedModel, timm's ModelEmaV2 and V3 and ema-pytorch's EMA; timm's
    checkpoint; and the state of diffusers' EMAModel, whose tensors have an order and no names.
    Prefixes are taken off only where the names match better without them. Whether names and shapes
    match in the end, `SavedState.check_matches` checks.

    Args:
        state: What was read from a file.
        own: The EMA's tensors, by clean name.
        parameters: The names of each of the EMA's parameters, in the order of
            `model.parameters()`; a tied one has several.

    Raises:
        ValueError: It is none of these, or the EMA has another number of parameters than
            diffusers' list.

    Examples:
        >>> from torch.optim.swa_utils import AveragedModel
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> averaged = AveragedModel(model)
        >>> averaged.update_parameters(model)
        >>> found = extract_weights(averaged.state_dict(), model.state_dict(), [["weight"]])
        >>> [*found.weights], found.source, found.updates
        (['weight'], "torch's AveragedModel", 1)
    """
    state = check_dict(state)
    if isinstance(state.get("shadow_params"), (list, tuple)):
        return _by_order(state, parameters)
    of_timm = state.get("state_dict_ema")
    found = _by_name(of_timm if isinstance(of_timm, Mapping) else state, own)
    if found is not None:
        return found
    matching = [
        key
        for key, value in state.items()
        if isinstance(value, Mapping)
        and (inner := _by_name(value, own))
        and inner.weights.keys() & own.keys()
    ]
    # Of online and EMA weights, the EMA's are wanted.
    example = min(matching, key=lambda key: "ema" not in str(key).lower(), default="model")
    raise ValueError(
        "The state is not recognised: it is neither a model's weights by name, nor what PyTorch, "
        "timm, ema-pytorch or diffusers save of an EMA. Its keys are "
        f"{quoted([*map(str, state)])}. Hand over the weights in it, e.g. "
        f"load_weights(torch.load(path)[{example!r}])."
    )


def check_dict(state: object) -> Mapping[Any, Any]:
    """Raise ValueError unless it is a dict that is not empty."""
    if not isinstance(state, Mapping) or not state:
        got = "an empty one" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise ValueError(
            f"The state must be a dict with weights, but got {got}. Give what a state_dict() "
            "returned; or to load_weights() also what another library saved of an EMA."
        )
    return state


def _by_name(state: Mapping[Any, Any], own: Mapping[str, Any]) -> ForeignWeights | None:
    """Without as many prefixes as makes the names match best; None: it holds no weights."""
    if not all(isinstance(name, str) for name in state):
        return None
    found = best = ForeignWeights(clean_weights(state), PLAIN, None)
    while wrapper := next((w for w in WRAPPERS if w.matches(found.weights)), None):
        if found.source == PLAIN:  # the outermost wrapper that counts updates is the source
            updates = _count(found.weights.get(wrapper.counter))
            found = found._replace(source=wrapper.source, updates=updates)
        inner = {
            name.removeprefix(wrapper.prefix): value
            for name, value in found.weights.items()
            if name.startswith(wrapper.prefix)
        }
        found = found._replace(weights=inner)
        if len(inner.keys() ^ own.keys()) < len(best.weights.keys() ^ own.keys()):
            best = found
    if not best.weights.keys() & own.keys() and (
        any(isinstance(value, Mapping) for value in state.values())
        or not any(isinstance(value, Tensor) for value in state.values())
    ):
        return None
    return best


def _by_order(state: Mapping[Any, Any], parameters: Sequence[Sequence[str]]) -> ForeignWeights:
    """The weights of diffusers' EMAModel, which has no buffers."""
    tensors = state["shadow_params"]
    if len(tensors) != len(parameters):
        raise ValueError(
            f"The state of diffusers' EMAModel has {len(tensors)} tensors without names, but this "
            f"EMA model has {len(parameters)} parameters, so their order does not tell which is "
            "which. Nothing was loaded. Load it into the EMA of a model like the one it was made "
            "of, from all of model.parameters()."
        )
    averaged: dict[str, Any] = {}
    for names, tensor in zip(parameters, tensors, strict=True):
        averaged |= dict.fromkeys(names, tensor)
    updates = _count(state.get("optimization_step"))
    return ForeignWeights(averaged, DIFFUSERS, updates, has_all_names=False)


def _count(value: object) -> int | None:
    if isinstance(value, Tensor):
        if unsupported(value) or value.numel() != 1 or value.dtype not in INTEGERS:
            return None
        value = value.item()
    return value if type(value) is int and value >= 0 else None


def write_safetensors(
    path: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    update_index: int | None = None,
    more: Mapping[str, str] | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write a safetensors file, which replaces an old one only once it is complete.

    One tensor at a time is in the CPU's memory. (safetensors' own writer takes all of them: for
    70 B parameters in bf16 140 GB. The format is a length, a JSON header and the tensors' bytes.)

    Args:
        path: The file; its folder exists.
        weights: Dense tensors by name, on any device and of any strides. A tied one is written
            under the first of its names, and the metadata has the others, as safetensors'
            `save_model` does.
        update_index: The number of updates made, for the metadata.
        more: What else the metadata is to have.
        read: Called for each tensor when it is written, where `weights` has none with values, but
            some of its shape and dtype on the meta device.

    Raises:
        ValueError: A tensor is of a kind that safetensors cannot hold. Nothing was written.
        ImportError: safetensors is not installed.

    Examples:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "weights.safetensors")
        >>> write_safetensors(path, {"weight": torch.arange(3)}, 7)
        >>> read_file(path)
        {'weight': tensor([0, 1, 2])}
    """
    safetensors = import_safetensors()
    metadata = {"format": "pt", "update_index": str(update_index), **(more or {})}
    if update_index is None:
        del metadata["update_index"]
    kinds: dict[str, str] = {}  # as safetensors calls the dtypes
    first_names: dict[object, str] = {}  # by memory
    for name in sorted(weights):
        tensor = weights[name]
        with _writable(name):
            # An empty tensor shows whether its kind can be held.
            empty = tensor.new_empty(0, device=None if read is None else "cpu")
            kind = json.loads(safetensors.torch.save({name: empty})[8:])[name]["dtype"]
            has_memory = tensor.numel() and not tensor.is_meta
            first = first_names.setdefault(memory_key(tensor), name) if has_memory else name
        if first != name and name not in metadata:
            metadata[name] = first
        else:
            kinds[name] = kind
    # As safetensors does: the largest elements come first, so that all are aligned.
    names, end = sorted(kinds, key=lambda name: (-weights[name].itemsize, name)), 0
    header: dict[str, object] = {"__metadata__": metadata}
    for name in names:
        shape, begin = [*weights[name].shape], end
        end += weights[name].nbytes
        header[name] = {"dtype": kinds[name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as new, open(new, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_bytes_of(name, (read or weights.__getitem__)(name)))


def _bytes_of(name: str, tensor: Tensor) -> memoryview:
    with _writable(name):
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        flat = tensor.as_strided((tensor.numel(),), (1,))  # whatever stride a size of 1 had
        return flat.view(torch.uint8).numpy().data


@contextmanager
def _writable(name: str) -> Iterator[None]:
    """Raise ValueError, with the tensor's name, for whatever is raised where it is converted."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"'{name}' cannot be written as safetensors ({type(error).__name__}: {error}). "
            "Nothing was written. Leave it out or convert it, or save the whole with torch.save."
        ) from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """The name of a new file, which replaces the one at `path` once the block has written it."""
    target = os.path.realpath(os.fsdecode(path))  # a link stays one
    with tempfile.TemporaryDirectory(prefix=".", dir=os.path.dirname(target)) as folder:
        new = os.path.join(folder, "weights")
        with open(new, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield new
        # safetensors makes a file for its owner alone; not every file system has modes.
        with suppress(PermissionError):
            os.chmod(new, mode)
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, target)


def read_path(path: str | os.PathLike[str], *, mapped: bool = False) -> tuple[object, int | None]:
    """Read a file, or a folder that `save_pretrained` of diffusers or transformers wrote.

    Args:
        path: A file of `read_file`, an index of several, or a folder with one of these.
        mapped: As in `read_file`.

    Returns:
        What is in it; and how many updates the `config.json` beside it counts, if diffusers'
        `EMAModel` wrote it.

    Raises:
        ValueError: There are no weights in the folder, or what is there cannot be read.
        OSError: A file cannot be opened.
        ImportError: It is a safetensors file, and safetensors is not installed.
    """
    file = _find(path)
    updates = None
    if os.path.basename(file).startswith(DIFFUSERS_NAME):
        with (
            suppress(OSError, ValueError, AttributeError),
            open(os.path.join(os.path.dirname(file), "config.json"), encoding="utf-8") as config,
        ):
            updates = _count(json.load(config).get("optimization_step"))
    state = _read_parts(file, mapped) if file.endswith(INDEX) else read_file(file, mapped=mapped)
    return state, updates


def files_of(path: str | os.PathLike[str]) -> list[str]:
    """The files in which `read_path` finds the tensors."""
    file = _find(path)
    return _parts_of(file) if file.endswith(INDEX) else [file]


def _find(path: str | os.PathLike[str]) -> str:
    folder = os.fsdecode(path)
    if not os.path.isdir(folder):
        return folder
    for name in FOLDER_NAMES:
        for found in (os.path.join(folder, name), os.path.join(folder, name + INDEX)):
            if os.path.isfile(found):
                return found
    raise ValueError(
        f"The folder '{folder}' is none that save_pretrained wrote: there is no "
        f"{', '.join(FOLDER_NAMES[:-1])} or {FOLDER_NAMES[-1]} in it, nor an index of their parts, "
        f"but {quoted(sorted(os.listdir(folder))) or 'nothing'}. Give the folder with one of them "
        "(diffusers' scripts write unet_ema into each checkpoint), or a file of weights."
    )


def _parts_of(index: str) -> list[str]:
    """The files that an index names, which are beside it."""
    try:
        with open(index, encoding="utf-8") as file:
            parts = sorted({*json.load(file)["weight_map"].values()})
        if not parts or any(os.path.basename(part) != part for part in parts):
            raise ValueError(f"weight_map has {parts}")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"'{index}' is damaged ({type(error).__name__}: {error}): it names no files beside it "
            "that have the weights. Give another copy of the folder, or a dict of its weights."
        ) from error
    return [os.path.join(os.path.dirname(index), part) for part in parts]


def _read_parts(index: str, mapped: bool) -> dict[Any, Any]:
    weights: dict[Any, Any] = {}
    for part in _parts_of(index):
        name = os.path.basename(part)
        try:
            weights |= check_dict(read_file(part, mapped=mapped))
        except ValueError as error:
            raise ValueError(f"Of '{index}', '{name}' has no weights. {error}") from error
    return weights


def read_file(path: str | os.PathLike[str], *, mapped: bool = False) -> object:
    """Read a safetensors or torch.save file onto the CPU, recognised by its first bytes.

    Args:
        path: The file, of any name.
        mapped: Whether the tensors stay in the file, which must not change while they are used,
            and each is read where it is used. (torch.save's format before 1.6 is read at once.)

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
        with readable(name):
            return _read_safetensors(name, mapped) if is_safetensors else _read_torch(file, mapped)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Raise ValueError for whatever is raised where this file or folder is read."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"No weights can be read from '{name}' ({type(error).__name__}): it is damaged or "
            "incomplete, or no file of safetensors or torch.save, or it holds more than "
            "tensors and plain values, which torch.load(weights_only=True) refuses. Give "
            "another copy of the file, or a dict of its weights."
        ) from error


def _read_safetensors(path: str, mapped: bool) -> dict[str, Tensor]:
    with import_safetensors().safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if not mapped:  # else tensors would change, or crash, when the file does
            weights = {name: tensor.clone() for name, tensor in weights.items()}
        for name, first in (file.metadata() or {}).items():
            if name not in ("format", "update_index") and first in weights:
                weights.setdefault(name, weights[first])
    return weights


def _read_torch(file: IO[bytes], mapped: bool) -> object:
    # timm's checkpoints hold the arguments of its training script, a namespace of plain values.
    # If the user has allowed it already, the context must not: leaving it would forbid it.
    allowed = {argparse.Namespace}.difference(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([*allowed]):
        if mapped and zipfile.is_zipfile(file):
            return torch.load(file.name, map_location="cpu", weights_only=True, mmap=True)
        file.seek(0)
        # The open file, as torch.load goes by a path's ending; only a path can be mapped.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=False)


def import_safetensors() -> Any:  # noqa: ANN401  # its stubs have no types
    """The package safetensors; an ImportError that says what to do."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Reading or writing a safetensors file takes the package safetensors, which is not "
            "installed. Install it: pip install safetensors numpy."
        ) from error
    return safetensors
