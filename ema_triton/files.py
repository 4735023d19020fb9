"""Files of weights: written as safetensors, whole or not at all; read by what is in them."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import pickle
import stat
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

# Where the checksum stands among a safetensors file's metadata; the format has none of its own.
CHECKSUM = "ema_triton.crc32"
# Metadata that other libraries write, and which is never the name of a tied tensor.
FORMAT = "format"
# The bit of a zip file's member that marks a folder; torch.save writes none.
FOLDER = 0x10


class Content(NamedTuple):
    """What a file holds."""

    state: object
    metadata: dict[str, str]  # of a torch.save file: none


def write_weights(
    path: str | os.PathLike[str], weights: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, which replaces an old one only once it is complete.

    Args:
        path: The file; its folder exists.
        weights: Dense tensors by name, on any device and of any strides. Of tied ones the first
            by name is written, and the metadata tells the others, as safetensors' `save_model`
            does.
        metadata: What else the file shall tell.

    Raises:
        ValueError: A tensor is of a kind that safetensors cannot hold, or the metadata would be
            taken for names of tied tensors. Nothing was written.
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "weights.safetensors")
        >>> write_weights(path, {"weight": torch.arange(3)}, {"step": "7"})
        >>> read(path)
        Content(state={'weight': tensor([0, 1, 2])}, metadata={'step': '7'})
    """
    safetensors = _safetensors()
    _check_tensors(weights, safetensors)
    tied = _tied(weights)
    _check_metadata(metadata, weights, tied)
    tensors = {
        name: tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        for name, tensor in weights.items()
        if name not in tied
    }
    _separate(tensors)
    told = {**metadata, **tied}
    told[CHECKSUM] = _checksum(tensors, told)
    _replace(os.fsdecode(path), lambda new: safetensors.torch.save_file(tensors, new, told))


def read(path: str | os.PathLike[str]) -> Content:
    """Read a safetensors or torch.save file onto the CPU, telling them by what is in them.

    Checksums are compared where the file has them: `write_weights` and torch.save write them.

    Args:
        path: The file, of any name.

    Returns:
        A dict of tensors, tied names too, and the metadata; or what was given to torch.save.

    Raises:
        ValueError: It is not such a file, or damaged, or holds more than weights_only allows.
        OSError: It cannot be opened.
        ImportError: It is a safetensors file, and safetensors is not installed.
    """
    name = os.fsdecode(path)
    try:
        file = open(name, "rb")  # noqa: SIM115  # a folder is told apart here, and only here
    except IsADirectoryError as error:
        raise ValueError(
            f"'{name}' is a folder, but weights are read from one file. Give the path of a "
            "safetensors or torch.save file in it."
        ) from error
    with file:
        start = file.read(9)
        file.seek(0)
        if not start:
            raise ValueError(
                f"'{name}' is empty, so there are no weights to load: its writing was probably "
                "interrupted. Give another copy of it."
            )
        # The length of the header in 8 bytes, then the header, which is JSON.
        if start[8:] == b"{":
            return _read_safetensors(name)
        if start.startswith(b"PK\3\4"):
            return Content(_read_zip(name, file), {})
        with _explained(name, "neither a safetensors file nor one of torch.save"):
            return Content(_torch_load(file), {})


def _read_safetensors(path: str) -> Content:
    safetensors = _safetensors()
    with (
        _explained(path, "not a safetensors file, though it begins like one"),
        safetensors.safe_open(path, framework="pt") as file,
    ):
        metadata: dict[str, str] = dict(file.metadata() or {})
        # Copies, as the file is mapped: its tensors would change, or crash, when it does.
        weights: dict[str, Tensor] = {
            key: file.get_tensor(key).clone() for key in sorted(file.keys())
        }
    checksum = metadata.pop(CHECKSUM, None)
    if checksum is not None and checksum != (found := _checksum(weights, metadata)):
        raise ValueError(
            f"'{path}' is damaged: the checksum of its weights is {found}, but it was written with "
            f"{checksum}. Some weight or name is not what it was. Give another copy of the file."
        )
    tied = {
        name: kept
        for name, kept in metadata.items()
        if name != FORMAT and name not in weights and kept in weights
    }
    weights.update({name: weights[kept] for name, kept in tied.items()})
    return Content(weights, {key: metadata[key] for key in metadata if key not in tied})


def _read_zip(path: str, file: IO[bytes]) -> object:
    with _explained(path, "not a file of torch.save, though it begins like one"):
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            # With torch.serialization.set_crc32_options(False) they are written as zeros.
            checked = any(member.CRC for member in members)
            # torch.load does not compare them: a flipped bit would be a wrong weight.
            damaged = archive.testzip() if checked else None
            # And what is marked as a folder it does not read: the weight would be anything.
            marked = [member.filename for member in members if member.external_attr & FOLDER]
        file.seek(0)
    if damaged is not None or marked:
        raise ValueError(
            f"'{path}' is damaged: '{damaged or marked[0]}' in it is not what was written, going "
            "by its checksum and kind, so some weight or name is wrong. Give another copy of it."
        )
    names = [member.filename.rpartition("/")[2] for member in members]
    if "data.pkl" not in names or "constants.pkl" in names:
        what = "a TorchScript archive" if "constants.pkl" in names else "a zip file of another kind"
        raise ValueError(
            f"'{path}' is {what}, not a file of torch.save, so no weights can be read from it. "
            "Give a file that torch.save(model.state_dict(), path) or safetensors wrote."
        )
    with _explained(path, "a file of torch.save that cannot be read"):
        try:
            return _torch_load(file)
        except pickle.UnpicklingError as error:
            if not checked:  # it may as well be damaged
                raise
            refused = error
    raise ValueError(
        f"'{path}' holds more than tensors and plain values, and unpickling that could run any "
        "code: torch.load(weights_only=True) refuses it. If you trust the file, hand over its "
        "weights: those in torch.load(path, weights_only=False)."
    ) from refused


def _torch_load(file: IO[bytes]) -> object:
    # timm's checkpoints hold the arguments of its training script, a namespace of plain values.
    # What the user allowed is left out, as it would be forbidden afterwards.
    allowed = {argparse.Namespace}.difference(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([*allowed]):
        # The open file, as torch.load goes by a path's ending; only a path could be mapped.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=False)


@contextmanager
def _explained(path: str, what: str) -> Iterator[None]:
    """Whatever the readers raise, say what it means."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"'{path}' is {what}, or it is damaged or incomplete ({type(error).__name__}), so no "
            "weights can be read from it. Give a file that torch.save(model.state_dict(), path) or "
            "safetensors wrote, or another copy of this one."
        ) from error


def _safetensors() -> Any:  # noqa: ANN401  # its stubs have no types
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Reading or writing a safetensors file takes the package safetensors, which is not "
            "installed. Install it: pip install safetensors numpy."
        ) from error
    return safetensors


def _check_tensors(weights: Mapping[str, Tensor], safetensors: Any) -> None:  # noqa: ANN401
    held: dict[torch.dtype, bool] = {}
    for name, tensor in weights.items():
        kind = None
        if not isinstance(name, str) or name == "__metadata__":
            kind = "has a name that safetensors cannot hold"
        elif not isinstance(tensor, Tensor):
            kind = f"is a {type(tensor).__name__}, not a tensor"
        elif hasattr(tensor, "__tensor_flatten__") or torch.nn.parameter.is_lazy(tensor):
            kind = f"is a {type(tensor).__name__}, which has no values of its own"
        elif tensor.is_meta:
            kind = "is on the meta device, without values"
        elif tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            kind = "is not dense, but sparse, nested or quantized"
        else:
            if tensor.dtype not in held:
                held[tensor.dtype] = _holds(tensor, safetensors)
            if not held[tensor.dtype]:
                kind = f"is {tensor.dtype}, which safetensors {safetensors.__version__} cannot hold"
        if kind:
            raise ValueError(
                f"{name!r} {kind}, so the weights cannot be written as safetensors. Nothing was "
                "written. Leave it out or convert it, or save the whole with torch.save."
            )


def _holds(tensor: Tensor, safetensors: Any) -> bool:  # noqa: ANN401
    """Whether tensors of its dtype can be written and read; tried with one element of it."""
    element = tensor.detach()[(slice(1),) * tensor.dim()].cpu().resolve_conj().resolve_neg()
    try:
        safetensors.torch.load(safetensors.torch.save({"": element.contiguous()}))
    except Exception:
        return False
    return True


def _tied(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are the same as another one, and the name by which that is kept."""
    kept: dict[object, str] = {}
    tied: dict[str, str] = {}
    for name in sorted(weights):
        tensor = weights[name]
        if not tensor.numel():
            continue
        view = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        first = kept.setdefault((tensor.device, tensor.data_ptr(), *view), name)
        if first != name:
            tied[name] = first
    return tied


def _check_metadata(
    metadata: Mapping[str, str], weights: Mapping[str, Tensor], tied: Mapping[str, str]
) -> None:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(
                f"The metadata has {key!r}: {value!r}, but safetensors holds strings only. "
                "Nothing was written. Convert it with str()."
            )
        if key == CHECKSUM or key in tied or (key != FORMAT and value in weights):
            raise ValueError(
                f"The metadata has '{key}': '{value}', which would be taken for the checksum, or "
                "for the name of a tied tensor. Nothing was written. Give it another key or value."
            )
    for name in tied.keys() & {CHECKSUM, FORMAT}:
        raise ValueError(
            f"'{name}' is tied to '{tied[name]}', and the metadata, where names of tied tensors "
            "stand, has something else by that name. Nothing was written. Leave it out."
        )


def _separate(tensors: dict[str, Tensor]) -> None:
    """Copy what overlaps another one in memory, which safetensors refuses to write."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            tensors[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Over all that the file holds: a flipped bit in a name is as wrong as one in a weight."""
    kinds = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
    crc = zlib.crc32(json.dumps([kinds, {**metadata}], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]  # contiguous, on the CPU
        if tensor.numel():
            crc = zlib.crc32((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()), crc)
    return f"{crc:08x}"


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
