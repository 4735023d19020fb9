"""Files of weights: safetensors is written, and safetensors or torch.save is read."""

from __future__ import annotations

import argparse
import os
import stat
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any

import torch
from torch import Tensor

from ema_triton.pairs import elements

# What the metadata has beside the names of tied tensors.
FORMAT, UPDATE_INDEX = "format", "update_index"


def write_weights(
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
        >>> write_weights(path, {"weight": torch.arange(3)}, 7)
        >>> read(path)
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
            first = written.setdefault(elements(tensor), name) if tensor.numel() else name
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


def read(path: str | os.PathLike[str]) -> object:
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
