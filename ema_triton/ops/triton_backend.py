"""Updates and exchanges through the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from ema_triton.ops import kernels
from ema_triton.ops.kernels import ema_update, ema_update_several
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
# Several EMAs at once have more tensors in flight: two of them take 31 to 56 registers, three 32 to
# 70. With noise, a thread of the masked path needs the 8 elements that one call of Philox gives.
SEVERAL_BLOCK = {2: 1024, 4: 1024, 8: 512}
STOCHASTIC_SEVERAL_BLOCK = 2048
# More would take more registers, and save less: 4 + 8 K bytes per fp32 element instead of 12 K.
MOST_TOGETHER = 3
# A swap holds both sides until it stores them: 32 to 40 registers.
EXCHANGE_BLOCK = {2: 2048, 4: 1024, 8: 512}


def update(launch: Launch, momentum: float | Tensor) -> None:
    """ema = lerp(ema, online, momentum) for every tensor of the launch.

    Args:
        launch: Of a plan that is not stale, without `unsupported_reason`.
        momentum: The weight of the online tensors: a float, or a 0-d tensor on their device,
            which the kernel reads, so that a captured CUDA graph follows its value.
    """
    _launch(launch, launch.effective_momentum(momentum), len(launch.chunk_table))


def update_several(launches: Sequence[Launch], momenta: Sequence[float | Tensor]) -> None:
    """`update` for launches of several EMAs that lie alike: each online element is read once.

    Args:
        launches: Of one plan, with the same online tensors and EMA tensors of one kind.
        momenta: Of each. Where one is a tensor, or 1, which copies, that EMA's launch is alone.
    """
    together: list[tuple[Launch, float]] = []
    for launch, momentum in zip(launches, momenta, strict=True):
        effective = launch.effective_momentum(momentum)
        if isinstance(effective, Tensor) or effective == 1:
            update(launch, momentum)
        else:
            together.append((launch, effective))
    for begin in range(0, len(together), MOST_TOGETHER):
        part = together[begin : begin + MOST_TOGETHER]
        if len(part) == 1:
            _launch(*part[0], len(part[0][0].chunk_table))
        else:
            _launch_several(part, len(part[0][0].chunk_table))


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
        _launch(launch, launch.effective_momentum(momentum), 0)


def prepare_several(launches: Sequence[Launch]) -> None:
    """The same for `update_several`, beside `prepare` for each of the launches."""
    for count in range(2, 1 + min(len(launches), MOST_TOGETHER)):
        _launch_several([(launch, 0.0) for launch in launches[:count]], 0)


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


def _launch(launch: Launch, effective: float | Tensor, chunks: int) -> None:
    bucket, kind = launch.bucket, launch.kind
    value, pointer = (effective, None) if isinstance(effective, float) else (0.0, effective)
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
            OVERFLOW=_overflow(launch),
            BLOCK=EXACT_BLOCK if kind.precision == "exact" else BLOCK[kind.dtype.itemsize],
            num_warps=WARPS,
        )


def _launch_several(together: Sequence[tuple[Launch, float]], chunks: int) -> None:
    launches, momenta = zip(*together, strict=True)
    first, kind = launches[0], launches[0].kind
    noisy = kind.precision == "stochastic"
    with torch.accelerator.device_index(kind.device.index):
        ema_update_several[(chunks,)](
            first.chunk_table,
            tuple(launch.bucket.flat for launch in launches),
            _tuple_of([launch.bucket.residual for launch in launches]),
            _tuple_of([launch.bucket.random_state for launch in launches]),
            _tuple_of([launch.skip_counts for launch in launches]),
            *momenta,
            *[0.0] * (MOST_TOGETHER - len(momenta)),
            ONLINE=_online(first),
            OVERFLOW=_overflow(first),
            BLOCK=STOCHASTIC_SEVERAL_BLOCK if noisy else SEVERAL_BLOCK[kind.dtype.itemsize],
            num_warps=WARPS,
        )


def _tuple_of(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...] | None:
    """The tensors as the kernel takes them; None where the launches have none."""
    return None if tensors[0] is None else tuple(tensors)  # type: ignore[arg-type]


def _overflow(launch: Launch) -> float | None:
    if launch.skip_counts is None:
        return None
    return overflow_threshold(launch.kind.dtype, launch.kind.precision)


def _online(launch: Launch) -> tl.dtype:
    return _NARROW.get(launch.online_dtype, tl.float64)
