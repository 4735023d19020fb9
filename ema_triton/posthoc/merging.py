"""Averages of checkpoints, in place of a decay of the learning rate."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ema_triton.checkpoint.interop import write_safetensors
from ema_triton.pairing import FLOATS, REAL_DTYPE, is_averageable, quoted
from ema_triton.posthoc.files import Checkpoint, add_up, open_checkpoint, with_progress

# The learning rate from x = 0, where its decay begins, to x = 1, where it is 0.
DECAYS: dict[str, Callable[[float], float]] = {
    "equal": lambda x: 1 - x,
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


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
) -> list[dict[str, object]]:
    """Write Σ c_j·θ_j of checkpoints θ_j of one model, accumulated in fp64 and rounded once.

    Integers and booleans are the last checkpoint's. The coefficients are an average's: c_j ≥ 0,
    Σ c_j = 1, as WSM proves for any decay, and as LAWA (arXiv 2209.14981) and model soups (arXiv
    2203.05482) have them. With a negative one a variance may become negative: it is refused.

    Args:
        checkpoints: The oldest first. Each a file of safetensors or torch.save, a folder of
            torch.distributed.checkpoint (whose .metadata is a pickle: only if you trust it), or a
            folder or index of `save_pretrained`. They must not change meanwhile.
        coefficients: A shape (`decay_coefficients` has the formulas), or a number per checkpoint.
        out: The safetensors file; an old one is replaced once the new one is complete.
        dtype: Of averaged real tensors, fp64, fp32, bf16 or fp16; the checkpoints' may then differ.
            None: as in the checkpoints.
        key: Where the weights are in nested checkpoints, e.g. "model" or "ema.weights".

    Returns:
        Each checkpoint's "path", "coefficient" and "sha256" by file, which the file's metadata has
        under "merged_from", too.

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
        >>> merged = merge(paths, [0.25, 0.75], out=os.path.join(folder, "merged.safetensors"))
        >>> [one["coefficient"] for one in merged]
        [0.25, 0.75]
    """
    target = os.path.realpath(os.fsdecode(out))
    if isinstance(checkpoints, (str, bytes, os.PathLike)) or not checkpoints:
        raise ValueError(f"checkpoints must be a list of paths, oldest first, got {checkpoints!r}.")
    factors = _check_coefficients(coefficients, len(checkpoints))
    if dtype not in (None, *FLOATS):
        names = ", ".join(map(str, FLOATS))
        raise ValueError(f"dtype must be one of {names}, or None, but got {dtype}.")
    folder = os.path.dirname(target)
    if os.path.isdir(target) or not os.access(folder, os.W_OK):
        raise OSError(f"'{target}' is a folder, or '{folder}' is none that can be written into.")
    opened = [open_checkpoint(path, key) for path in checkpoints]
    files = {file: os.path.realpath(file) for one in opened for file in one.files}
    if target in files.values():
        raise ValueError(f"'{target}' is one of the checkpoints. Write to another file.")
    _check_alike(opened, dtype)

    layout = {
        name: torch.empty_like(
            tensor, dtype=dtype if tensor.dtype in FLOATS else None, device="meta"
        )
        for name, tensor in opened[-1].tensors.items()
    }
    steps = iter(with_progress([*files, *layout], "merge"))
    hashes = {file: _sha256(file) for file, _ in zip(files, steps, strict=False)}
    merged_from: list[dict[str, object]] = [
        {"path": one.path, "coefficient": factor}
        | {"sha256": {os.path.basename(file): hashes[file] for file in one.files}}
        for one, factor in zip(opened, factors, strict=True)
    ]
    different: list[str] = []

    def average(name: str) -> Tensor:
        next(steps)
        if is_averageable(layout[name]):
            result = torch.empty_like(layout[name], device="cpu")
            add_up((one.read for one in opened), {name: [factors]}, [{name: result}])
            return result
        *others, last = (one.read(name) for one in opened)
        # The count of a BatchNorm is one number.
        if last.numel() > 1 and not all(torch.equal(last, other) for other in others):
            different.append(name)
        return last

    metadata = {"merged_from": json.dumps(merged_from)}
    write_safetensors(out, layout, more=metadata, read=average)
    next(steps, None)  # ends the progress
    if different:
        warnings.warn(
            f"The checkpoints have different integers in {quoted(different)}, which cannot be "
            "averaged: the last checkpoint's were taken. If they are quantized weights, the merged "
            "model is wrong: merge checkpoints from before the quantization.",
            stacklevel=2,
        )
    return merged_from


def _check_coefficients(coefficients: str | Sequence[float], count: int) -> list[float]:
    if isinstance(coefficients, str):
        return decay_coefficients(coefficients, count)
    factors = [float(coefficient) for coefficient in coefficients]
    listed, total = ",".join(f"{factor:.9g}" for factor in factors), math.fsum(factors)
    if len(factors) != count or not all(0 <= factor < math.inf for factor in factors):
        raise ValueError(
            f"An average of {count} checkpoints takes as many coefficients, finite and not "
            f"negative, but got {listed}."
        )
    # Coefficients that were computed in fp32, or have seven digits, sum to 1 within this.
    if abs(total - 1) > 1e-6:
        raise ValueError(
            f"The coefficients {listed} sum to {total:.9g}, not to 1. Divide each by the sum."
        )
    return [factor / total for factor in factors]


def _check_alike(opened: Sequence[Checkpoint], dtype: torch.dtype | None) -> None:
    """Raise ValueError unless all have tensors of the same names, shapes and kinds."""
    first = opened[0]
    for other in opened:
        for name in sorted(first.tensors.keys() | other.tensors.keys()):
            kind, found = (_kind(one.tensors.get(name), dtype) for one in (first, other))
            if kind != found:
                raise ValueError(
                    f"'{name}' is {kind} in '{first.path}', but {found} in '{other.path}'. Only "
                    "checkpoints of one model can be averaged; of several floating dtypes, if "
                    "dtype= (on the command line --dtype) says which the result gets."
                )
            tensor = first.tensors[name]
            if is_averageable(tensor) and tensor.dtype not in REAL_DTYPE:
                raise ValueError(
                    f"'{name}' is {tensor.dtype}, whose values mean nothing without their scales, "
                    "and cannot be averaged. Convert the checkpoints to bf16 first."
                )


def _kind(tensor: Tensor | None, dtype: torch.dtype | None) -> str:
    if tensor is None:
        return "absent"
    floating = dtype is not None and tensor.dtype in FLOATS
    return f"{'floating' if floating else tensor.dtype} {[*tensor.shape]}"


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
