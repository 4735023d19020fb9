"""Checkpoints that are read tensor by tensor, and sums of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ema_triton.checkpoint import interop
from ema_triton.ops.precision import as_real, narrow_once, pieces
from ema_triton.pairing import quoted, unsupported

T = TypeVar("T")

# Elements that are converted at a time: temporaries do not grow with the tensors.
PIECE = 1 << 20


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
        key = next(iter(places))
    if key not in places:
        most = sorted(places, key=lambda place: -len(places[place]))
        raise ValueError(
            f"'{path}' has tensors by name at the keys {quoted(most) or 'none'}, so which are the "
            f"weights is unknown from key={key!r}. Choose one by key= (on the command line --key)."
        )
    return places[key]


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


def add_up(
    readers: Iterable[Callable[[str], Tensor]],
    coefficients: Mapping[str, Sequence[Sequence[float]]],
    results: Sequence[Mapping[str, Tensor]],
) -> None:
    """Write sums of coefficient times tensor, accumulated in fp64 and rounded once.

    Args:
        readers: Of each checkpoint, what reads a tensor by name.
        coefficients: For each name and result, one per checkpoint.
        results: The tensors to write, by name.
    """
    sums = {
        name: [torch.zeros_like(as_real(one[name]), dtype=torch.float64) for one in results]
        for name in coefficients
    }
    for number, read in enumerate(readers):
        for name, of_results in coefficients.items():
            factors = [of_result[number] for of_result in of_results]
            if any(factors):  # 0 times Inf is no number
                value = as_real(read(name))
                for total, factor in zip(sums[name], factors, strict=True):
                    for part, values in pieces(total, value, size=PIECE):
                        part.add_(values, alpha=factor)
    for name, totals in sums.items():
        for total, result in zip(totals, results, strict=True):
            for part, values in pieces(total, as_real(result[name]), size=PIECE):
                values.copy_(narrow_once(part, values.dtype))


def with_progress(items: Sequence[T], what: str) -> Iterable[T]:
    """The same, with tqdm's bar on a terminal, if it is installed."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, desc=what, disable=None)
    return bar
