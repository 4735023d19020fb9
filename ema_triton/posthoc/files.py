"""Checkpoints that are read tensor by tensor, and a safetensors file that is written so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ema_triton.checkpoint import interop
from ema_triton.pairing import unsupported


class Checkpoint(NamedTuple):
    """A checkpoint whose tensors are still in its files; `tensors` tell shapes and dtypes."""

    path: str
    files: list[str]
    tensors: dict[str, Tensor]  # mapped, or on the meta device
    read: Callable[[str], Tensor]


def open_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Open what `interop.read_path` reads, or a folder of torch.distributed.checkpoint.

    `key` says where in a nested checkpoint the weights are, e.g. "model" or "ema.weights".
    """
    path = os.fsdecode(path)
    if os.path.isfile(os.path.join(path, ".metadata")):
        return _open_distributed(path, key)
    tensors = _choose(path, _tensors_in(interop.read_path(path, mapped=True)[0]), key)
    for name, tensor in tensors.items():
        if problem := unsupported(tensor):
            raise ValueError(f"'{name}' in '{path}' {problem.reason}. Save it as a plain tensor.")
    return Checkpoint(path, interop.files_of(path), tensors, tensors.__getitem__)


def _tensors_in(state: object, above: str = "") -> Iterator[tuple[str, str, Tensor]]:
    """Key, name and tensor of all tensors in nested dicts."""
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(value, Tensor):
            yield above, str(name), value.detach()
        else:
            yield from _tensors_in(value, f"{above}.{name}" if above else str(name))


def _choose(
    path: str, found: Iterator[tuple[str, str, Tensor]], key: str | None
) -> dict[str, Tensor]:
    """The tensors at the key; without one, at the only key that has any."""
    places: dict[str, dict[str, Tensor]] = {}
    for place, name, tensor in found:
        places.setdefault(place, {})[name] = tensor
    if key is None and len(places) == 1:
        return next(iter(places.values()))
    if key in places:
        return places[key]
    most = sorted(places, key=lambda place: -len(places[place]))
    listed = ", ".join(f"'{place}' ({len(places[place])})" for place in most[:5]) or "none"
    more = f" and {len(most) - 5} more" if len(most) > 5 else ""
    problem = "tensors at several keys" if key is None else f"no tensors at key '{key}'"
    raise ValueError(
        f"'{path}' has {problem if places else 'no tensors by name'}, so which are the weights is "
        f"unknown. The keys with tensors by name, and how many: {listed}{more}. Choose one by key= "
        "(on the command line --key)."
    )


def _open_distributed(folder: str, key: str | None) -> Checkpoint:
    # These import torch.distributed.tensor, which takes a second.
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader, full_names = FileSystemReader(folder), dict[int, str]()
    with interop.readable(folder):
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, is_coordinator=True)

    def tensors_in() -> Iterator[tuple[str, str, Tensor]]:
        for full_name, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                *above, name = map(str, (metadata.planner_data or {}).get(full_name, [full_name]))
                tensor = torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")
                full_names[id(tensor)] = full_name
                yield ".".join(above), name, tensor

    tensors = _choose(folder, tensors_in(), key)

    def read(name: str) -> Tensor:
        tensor, planner = torch.empty_like(tensors[name], device="cpu"), DefaultLoadPlanner()
        planner.set_up_planner({full_names[id(tensors[name])]: tensor}, metadata, True)
        with interop.readable(folder):
            plan = reader.prepare_local_plan(planner.create_local_plan())
            reader.read_data(planner.finish_plan(plan), planner).wait()
        return tensor

    files = sorted(entry.path for entry in os.scandir(folder) if entry.is_file())
    return Checkpoint(folder, files, tensors, read)


def write_by_tensor(
    path: str | os.PathLike[str],
    layout: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file with one tensor at a time in memory, as `replacing` does.

    safetensors itself writes tensors that are all in memory at once: for 70 B parameters in bf16
    these are 140 GB. The format is a length, a JSON header and the tensors' bytes.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    # As safetensors does: the largest elements come first, so that all are aligned.
    names, end = sorted(layout, key=lambda name: (-layout[name].itemsize, name)), 0
    for name in names:
        begin, end = end, end + layout[name].nbytes
        kind = interop.safetensors_dtype(name, layout[name].dtype)
        shape = [*layout[name].shape]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with interop.replacing(path) as new, open(new, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(read(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
