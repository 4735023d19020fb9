"""Averages of checkpoints, in place of a decay of the learning rate."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ema_triton.checkpoint.interop import safetensors_dtype
from ema_triton.ops.precision import as_real, narrow_once, pieces
from ema_triton.pairing import FLOATS, REAL_DTYPE, is_averageable, memory_key, quoted
from ema_triton.posthoc.files import Checkpoint, open_checkpoint, write_by_tensor

# The learning rate from x = 0, where its decay begins, to x = 1, where it is 0.
DECAYS: dict[str, Callable[[float], float]] = {
    "equal": lambda x: 1 - x,
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
# Elements that are converted at a time: temporaries do not grow with the tensors.
PIECE = 1 << 20


class Merged(NamedTuple):
    """What was merged: each checkpoint's path, coefficient and sha256 by file; tensors' names."""

    path: str
    merged_from: list[dict[str, object]]
    averaged: list[str]
    copied: list[str]  # integers and booleans, from the last checkpoint


def decay_coefficients(shape: str, count: int) -> list[float]:
    """The coefficients with which an average of checkpoints stands for a decayed learning rate.

    Checkpoint j is θ₀ and the steps up to j, so that in Σ c_j·θ_j a step from j-1 to j counts
    Σ_{i≥j} c_i. That this is decay(j/n), c_j is what the rate loses, decay(j/n) - decay((j+1)/n)
    (WSM, arXiv 2507.17634; Megatron-LM's weighted_merge.py). Those of "linear" are equal.

    Args:
        shape: "equal" or "linear"; "1-sqrt"; "cosine".
        count: The number n of checkpoints.

    Examples:
        >>> [round(c, 3) for c in decay_coefficients("1-sqrt", 4)]
        [0.5, 0.207, 0.159, 0.134]
    """
    if shape not in DECAYS:
        raise ValueError(
            f"Coefficients have a shape, {', '.join(DECAYS)}, or are a number for each checkpoint, "
            f"but got {shape!r}."
        )
    rates = [DECAYS[shape](j / count) for j in range(count + 1)]
    return [rates[j] - rates[j + 1] for j in range(count)]


def merge(
    checkpoints: Sequence[str | os.PathLike[str]],
    coefficients: str | Sequence[float] = "equal",
    *,
    out: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    key: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Merged:
    """Write Σ c_j·θ_j of checkpoints θ_j of one model, accumulated in fp64 and rounded once.

    The safetensors file's metadata has the paths, coefficients and sha256 ("merged_from", JSON).

    The coefficients are an average's: WSM proves c_j ≥ 0, Σ c_j = 1 for any decay, and those of
    LAWA (arXiv 2209.14981) and model soups (arXiv 2203.05482) are equal. With a negative one the
    result leaves the checkpoints' range, and a variance may become negative: it is refused.

    Args:
        checkpoints: The oldest first. Each a file of safetensors or torch.save, a folder of
            torch.distributed.checkpoint (whose .metadata is a pickle: only if you trust it), or a
            folder or index of `save_pretrained`. They must not change meanwhile.
        coefficients: A shape (`decay_coefficients` has the formulas), or a number per checkpoint.
        out: The file; an old one is replaced once the new one is complete.
        dtype: Of all averaged tensors, fp64, fp32, bf16 or fp16, of complex ones' parts; the
            checkpoints' may then differ. None: as in the checkpoints.
        key: Where the weights are in nested checkpoints, e.g. "model" or "ema.weights".
        progress: Called with how many files and tensors are done, and how many there are.

    Raises:
        ValueError: The coefficients are no average's; or the checkpoints cannot be read, averaged
            or written, or differ in names, shapes or dtypes. Then `out` is as it was.
        OSError: A file cannot be read or written.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> paths = [os.path.join(folder, name) for name in ("1.pt", "2.pt")]
        >>> for value, path in enumerate(paths):
        ...     torch.save({"weight": torch.full((2,), float(value))}, path)
        >>> merge(paths, [0.25, 0.75], out=os.path.join(folder, "merged.safetensors")).averaged
        ['weight']
    """
    target = os.path.realpath(os.fsdecode(out))
    if isinstance(checkpoints, (str, bytes, os.PathLike)) or not checkpoints:
        raise ValueError(f"checkpoints must be a list of paths, oldest first, got {checkpoints!r}.")
    factors = _check_coefficients(coefficients, len(checkpoints))
    if dtype not in (None, *FLOATS):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, or None, but got {dtype}.")
    folder = os.path.dirname(target)
    if os.path.isdir(target) or not os.access(folder, os.W_OK):
        raise OSError(f"'{target}' is a folder, or '{folder}' is none that can be written into.")
    opened = [open_checkpoint(path, key) for path in checkpoints]
    files = {file: os.path.realpath(file) for one in opened for file in one.files}
    if target in files.values():
        raise ValueError(f"'{target}' is one of the checkpoints. Write to another file.")
    _check_alike(opened, dtype)

    layout: dict[str, Tensor] = {}
    metadata = {"format": "pt", "merged_from": ""}
    first_names: dict[Hashable, str] = {}
    for name, tensor in sorted(opened[-1].tensors.items()):
        first = first_names.setdefault(tuple(_memory(one, name) for one in opened), name)
        if first != name and name not in metadata:
            metadata[name] = first  # tied; as safetensors' save_model
            continue
        new = tensor.dtype
        if dtype is not None and is_averageable(tensor):
            new = dtype.to_complex() if tensor.is_complex() else dtype
        safetensors_dtype(name, new)
        layout[name] = torch.empty(tensor.shape, dtype=new, device="meta")

    steps = itertools.count(1)

    def advance() -> None:
        if progress is not None:
            progress(next(steps), len(files) + len(layout))

    different: list[str] = []

    def average(name: str) -> Tensor:
        advance()
        return _average(name, opened, factors, layout[name], different)

    hashes = {file: _sha256(file, advance) for file in files}
    merged_from: list[dict[str, object]] = [
        {"path": one.path, "coefficient": factor}
        | {"sha256": {os.path.basename(file): hashes[file] for file in one.files}}
        for one, factor in zip(opened, factors, strict=True)
    ]
    metadata["merged_from"] = json.dumps(merged_from)
    write_by_tensor(out, layout, average, metadata)
    if different:
        warnings.warn(
            f"The checkpoints have different integers in {quoted(different)}, which cannot be "
            "averaged: the last checkpoint's were taken. If they are quantized weights, the merged "
            "model is wrong: merge checkpoints from before the quantization.",
            stacklevel=2,
        )
    averaged = [name for name, tensor in opened[-1].tensors.items() if is_averageable(tensor)]
    copied = [name for name in opened[-1].tensors if name not in {*averaged}]
    return Merged(os.fsdecode(out), merged_from, averaged, copied)


def _check_coefficients(coefficients: str | Sequence[float], count: int) -> list[float]:
    if isinstance(coefficients, str):
        return decay_coefficients(coefficients, count)
    factors = [float(coefficient) for coefficient in coefficients]
    listed, total = _listed(factors), math.fsum(factors)
    if len(factors) != count:
        raise ValueError(
            f"There are {len(factors)} coefficients ({listed}) for {count} checkpoints."
        )
    if not all(math.isfinite(factor) and factor >= 0 for factor in factors):
        raise ValueError(
            f"An average's coefficients are finite and not negative, but got {listed}. With a "
            "negative one the result leaves the checkpoints' range."
        )
    # Coefficients that were computed in fp32, or have seven digits, sum to 1 within this.
    if abs(total - 1) > 1e-6:
        normal = f", e.g. {_listed([factor / total for factor in factors])}" if total else ""
        raise ValueError(
            f"The coefficients {listed} sum to {total:.9g}, not to 1, and would scale the weights. "
            f"Divide each by the sum{normal}."
        )
    return [factor / total for factor in factors]


def _listed(factors: Sequence[float]) -> str:
    return ",".join(f"{factor:.9g}" for factor in factors)


def _check_alike(opened: Sequence[Checkpoint], dtype: torch.dtype | None) -> None:
    """Raise ValueError unless all have tensors of the same names, shapes and kinds."""
    first, *others = opened
    for name, tensor in first.tensors.items():
        if is_averageable(tensor) and tensor.dtype not in REAL_DTYPE:
            raise ValueError(
                f"'{name}' in '{first.path}' is {tensor.dtype}, whose values mean nothing without "
                "their scales, and cannot be averaged. Convert the checkpoints to bf16 first."
            )

    def kinds(one: Checkpoint) -> dict[str, str]:
        return {
            name: f"{'floating' if dtype and tensor.dtype in FLOATS else tensor.dtype}"
            f" {[*tensor.shape]}"
            for name, tensor in one.tensors.items()
        }

    expected = kinds(first)
    for other in others:
        found = kinds(other)
        names = sorted(expected.keys() | found.keys())
        different = [name for name in names if expected.get(name) != found.get(name)]
        if different:
            shown = "; ".join(
                f"'{name}' is {expected.get(name, 'absent')} and {found.get(name, 'absent')}"
                for name in different[:5]
            )
            raise ValueError(
                f"'{first.path}' and '{other.path}' differ in {len(different)} tensors: {shown}. "
                "Only checkpoints of one model can be averaged; of several floating dtypes, if "
                "dtype= (on the command line --dtype) says which the result gets. Nothing was "
                "written."
            )


def _memory(checkpoint: Checkpoint, name: str) -> Hashable:
    """Equal for the names of a tied tensor."""
    tensor = checkpoint.tensors[name]
    return memory_key(tensor) if tensor.numel() and not tensor.is_meta else name


def _average(
    name: str,
    checkpoints: Sequence[Checkpoint],
    factors: Sequence[float],
    layout: Tensor,
    different: list[str],
) -> Tensor:
    """Σ c_j·θ_j of one tensor; the last one if these are integers, noted where they differ."""
    if not is_averageable(layout):
        *others, last = (one.read(name) for one in checkpoints)
        # The count of a BatchNorm is one number.
        if last.numel() > 1 and not all(torch.equal(last, other) for other in others):
            different.append(name)
        return last
    result = torch.empty_like(layout, device="cpu")
    total = torch.zeros_like(as_real(result), dtype=torch.float64)
    for one, factor in zip(checkpoints, factors, strict=True):
        if factor:  # 0 times Inf is no number
            for part, values in pieces(total, as_real(one.read(name)), size=PIECE):
                part.add_(values, alpha=factor)
    for part, values in pieces(total, as_real(result), size=PIECE):
        values.copy_(narrow_once(part, values.dtype))
    return result


def _sha256(path: str, advance: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    advance()
    return digest.hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command `merge`."""
    add = parser.add_argument
    add(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="the oldest first (a shell's * puts step10 before step9; the order is printed): files "
        "of safetensors or torch.save, folders of torch.distributed.checkpoint or save_pretrained",
    )
    add("--out", required=True, metavar="FILE", help="the safetensors file to write or replace")
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--shape",
        choices=DECAYS,
        help="the decay of the learning rate that the average stands for; a linear one is an equal "
        "average (default: equal)",
    )
    either.add_argument(
        "--coefficients",
        metavar="C,C,...",
        type=_numbers,
        help="or a number for each checkpoint, none of them negative, which sum to 1",
    )
    add("--dtype", choices=DTYPES, help="of the result (default: the checkpoints')")
    add("--key", help="where the weights are in nested checkpoints, e.g. model or ema.weights")


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not numbers with commas between: {text!r}") from error


def run(arguments: argparse.Namespace, progress: Callable[[int, int], object]) -> str:
    """Average checkpoints of a model, in place of a decay of the learning rate.

    Writes the sum of coefficient times checkpoint: accumulated in fp64, rounded once, with one
    tensor at a time in memory. Integers, like BatchNorm's counts, are the last checkpoint's. The
    file's metadata has the checkpoints' paths, coefficients and sha256.

    python -m ema_triton merge --shape 1-sqrt step1.pt step2.pt step3.pt --out merged.safetensors
    """
    merged = merge(
        arguments.checkpoints,
        arguments.coefficients or arguments.shape or "equal",
        out=arguments.out,
        dtype=DTYPES.get(arguments.dtype),
        key=arguments.key,
        progress=progress,
    )
    lines = [f"{one['coefficient']:<12.6g}{one['path']}" for one in merged.merged_from]
    lines.append(f"averaged: {len(merged.averaged)} tensors")
    lines.append(f"integers, from the last: {len(merged.copied)}")
    return "\n".join([*lines, f"written: {merged.path}"])
