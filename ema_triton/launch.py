"""Updates and exchanges through the Triton kernels: one launch per bucket."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ema_triton import kernels, reference
from ema_triton.buckets import ALIGNMENT, Bucket
from ema_triton.kernels import ema_update
from ema_triton.plan import Plan
from ema_triton.precision import overflow

# fp64 meets fp64 only: a pair of unequal widths with it would go through shared memory.
_NARROW = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Elements a program handles at a time, by the width of the EMA's elements. With 4 warps that is
# 16 elements per thread, two to four accesses of 128 bits in flight on each side, at 32 to 39
# registers (fp64: 32, in a quarter of the elements).
BLOCK = {2: 2048, 4: 2048, 8: 512}
# An exact EMA has three tensors in flight and not two: 30 to 32 registers; with 2048 up to 42.
EXACT_BLOCK = 1024
WARPS = 4
# A swap has both sides in flight until it stores them crosswise: 32 to 40 registers.
EXCHANGE_BLOCK = {2: 2048, 4: 1024, 8: 512}


def update(plan: Plan, momentum: float | Tensor) -> None:
    """ema = lerp(ema, online, momentum) for every averaged tensor of the plan.

    Args:
        plan: A plan that is not stale. Buckets with an `obstacle` take the reference path.
        momentum: The weight of the online tensors: a float, or a 0-d tensor on their device,
            which the kernel reads, so that a captured CUDA graph follows its value.
    """
    for bucket in plan.buckets:
        if obstacle(bucket) is None:
            bucket.count_update()
            _launch(bucket, momentum, len(bucket.chunk_table))
        else:
            reference.update_bucket(bucket, momentum)


def exchange(bucket: Bucket) -> None:
    """Swap the values of the bucket's EMA tensors and of their online tensors, of one dtype."""
    if obstacle(bucket) is not None:
        reference.exchange(bucket)
        return
    # Triton launches on the current device, whatever device the arguments are on.
    with torch.accelerator.device_index(bucket.key.device.index):
        kernels.exchange[(len(bucket.chunk_table),)](
            bucket.chunk_table,
            bucket.flat,
            BLOCK=EXCHANGE_BLOCK[bucket.key.ema_dtype.itemsize],
            num_warps=WARPS,
        )


def prepare(plan: Plan) -> None:
    """Upload the chunk tables and compile the kernels, so that an update does neither.

    A float, a momentum of 1 and an fp32 tensor take a variant of the kernel each. All are compiled
    here: one that came first in the middle of a training would stall its step, and could not be
    loaded while a CUDA graph is captured. For sm_90 a variant takes 0.1 to 0.2 s (with noise 0.3
    to 0.4 s), and Triton 3.6 another 0.2 s for the tensor's launcher; once per machine, since from
    Triton's cache on disk it takes 2 ms.

    Raises:
        Exception: Whatever Triton raises where it cannot compile, for example without a C compiler.
    """
    for bucket in plan.buckets:
        if obstacle(bucket) is None:
            tensor = torch.zeros((), dtype=torch.float32, device=bucket.key.device)
            for momentum in (0.0, 1.0, tensor):
                # A grid without programs is compiled and loaded, not launched.
                _launch(bucket, momentum, 0)


def obstacle(bucket: Bucket) -> str | None:
    """Why the kernel cannot take this bucket; None if it can."""
    key = bucket.key
    if (device := device_obstacle(key.device)) is not None:
        return device
    if not key.dense:
        return "the online tensors are not dense (there are gaps or overlaps in their memory)"
    if not (key.ema_dtype == key.online_dtype == torch.float64) and not (
        key.ema_dtype in _NARROW and key.online_dtype in _NARROW
    ):
        return f"the kernel does not average {key.online_dtype} into {key.ema_dtype}"
    if bucket.flat.data_ptr() % ALIGNMENT:
        return f"the sharded EMA model's tensor does not begin at a multiple of {ALIGNMENT} bytes"
    return None


def device_obstacle(device: torch.device) -> str | None:
    """Why the kernel cannot run on this device; None if it can."""
    if device.type in ("cuda", "xpu"):
        return None
    return f"the tensors are on {device}, which Triton does not drive"


def _launch(bucket: Bucket, momentum: float | Tensor, chunks: int) -> None:
    key, share = bucket.key, bucket.share(momentum)
    value, pointer = (share, None) if isinstance(share, float) else (0.0, share)
    with torch.accelerator.device_index(key.device.index):  # on which Triton launches
        ema_update[(chunks,)](
            bucket.chunk_table,
            bucket.flat,
            bucket.residual,
            bucket.draws,
            bucket.counters,
            value,
            pointer,
            ONLINE=_online(bucket),
            COPY=value == 1,
            OVERFLOW=overflow(key.ema_dtype, key.precision)
            if bucket.counters is not None
            else None,
            BLOCK=EXACT_BLOCK if key.precision == "exact" else BLOCK[key.ema_dtype.itemsize],
            num_warps=WARPS,
        )


def _online(bucket: Bucket) -> tl.dtype:
    return _NARROW.get(bucket.key.online_dtype, tl.float64)
