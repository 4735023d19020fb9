"""Updates and exchanges through the Triton kernels."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ema_triton.ops import kernels
from ema_triton.ops.kernels import ema_update
from ema_triton.ops.precision import overflow_threshold
from ema_triton.plan import Launch
from ema_triton.state import ALIGNMENT

# These mix; fp64 would go through shared memory beside them, and is averaged with fp64 only.
_NARROW = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Elements a program handles at a time, by the width of the EMA's elements. With 4 warps that is
# 16 elements per thread, two to four accesses of 128 bits in flight on each side, at 32 to 39
# registers (fp64: 32, with a quarter of the elements).
BLOCK = {2: 2048, 4: 2048, 8: 512}
# An exact EMA has three tensors in flight instead of two: 30 to 32 registers; with 2048 up to 42.
EXACT_BLOCK = 1024
# 8 warps with blocks of 2048 would be up to 6 % faster on an H200 (geometric mean of five models),
# and bf16 into fp32 without the hint of four elements at a time 10 %; but with noise a thread would
# have fewer than the 8 elements that one call of Philox gives, and without the hint there are
# barriers. Persistent programs and cache hints are no faster.
WARPS = 4
# A swap holds both sides until it stores them: 32 to 40 registers.
EXCHANGE_BLOCK = {2: 2048, 4: 1024, 8: 512}


def update(launch: Launch, momentum: float | Tensor) -> None:
    """ema = lerp(ema, online, momentum) for every tensor of the launch.

    Args:
        launch: Of a plan that is not stale, without `unsupported_reason`.
        momentum: The weight of the online tensors: a float, or a 0-d tensor on their device,
            which the kernel reads, so that a captured CUDA graph follows its value.
    """
    _launch(launch, momentum, len(launch.chunk_table))


def exchange(launch: Launch) -> None:
    """Swap the values of the launch's EMA tensors and of their online tensors, of one dtype."""
    with torch.accelerator.device_index(launch.kind.device.index):  # on which Triton launches
        kernels.exchange[(len(launch.chunk_table),)](
            launch.chunk_table,
            launch.bucket.flat,
            BLOCK=EXCHANGE_BLOCK[launch.kind.dtype.itemsize],
            num_warps=WARPS,
        )


def prepare(launch: Launch) -> None:
    """Upload the chunk table and compile the kernels, so that an update does neither.

    A momentum that is a float, a 1 or an fp32 tensor takes a variant of the kernel each. Compiled
    at its first use, a variant would stall a training step, and could not be loaded while a CUDA
    graph is captured. For sm_90 it takes 0.1 to 0.2 s (with random numbers 0.3 to 0.4 s), and
    Triton 3.6 another 0.2 s for the tensor's launcher; once per machine, since loading from
    Triton's cache on disk takes 2 ms.

    Raises:
        Exception: What Triton raises where it cannot compile, for example without a C compiler.
    """
    tensor = torch.zeros((), dtype=torch.float32, device=launch.kind.device)
    for momentum in (0.0, 1.0, tensor):
        # A grid without programs is compiled and loaded, not launched.
        _launch(launch, momentum, 0)


def unsupported_reason(launch: Launch) -> str | None:
    """Why the kernel cannot take this launch; None if it can."""
    ema, online = launch.kind.dtype, launch.online_dtype
    if (reason := unsupported_device(launch.kind.device)) is not None:
        return reason
    if not launch.dense:
        return "the online tensors are not dense (there are gaps or overlaps in their memory)"
    if not (ema == online == torch.float64) and not (ema in _NARROW and online in _NARROW):
        return f"the kernel does not average {online} into {ema}"
    if launch.bucket.flat.data_ptr() % ALIGNMENT:
        return f"the sharded EMA model's tensor does not begin at a multiple of {ALIGNMENT} bytes"
    return None


def unsupported_device(device: torch.device) -> str | None:
    """Why the kernel cannot run on this device; None if it can."""
    if device.type in ("cuda", "xpu"):
        return None
    return f"the tensors are on {device}, which Triton does not drive"


def _launch(launch: Launch, momentum: float | Tensor, chunks: int) -> None:
    bucket, kind, effective = launch.bucket, launch.kind, launch.effective_momentum(momentum)
    value, pointer = (effective, None) if isinstance(effective, float) else (0.0, effective)
    skips = launch.skip_counts is not None
    with torch.accelerator.device_index(kind.device.index):  # on which Triton launches
        ema_update[(chunks,)](
            launch.chunk_table,
            bucket.flat,
            bucket.residual,
            bucket.random_state,
            launch.skip_counts,
            value,
            pointer,
            ONLINE=_online(launch),
            COPY=value == 1,
            OVERFLOW=overflow_threshold(kind.dtype, kind.precision) if skips else None,
            BLOCK=EXACT_BLOCK if kind.precision == "exact" else BLOCK[kind.dtype.itemsize],
            num_warps=WARPS,
        )


def _online(launch: Launch) -> tl.dtype:
    return _NARROW.get(launch.online_dtype, tl.float64)
