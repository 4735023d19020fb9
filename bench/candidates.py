"""What was tried beside the shipped kernel, in one kernel: for `python -m bench tune`."""

import triton
import triton.language as tl

from ema_triton.ops.kernels import chunk, join_residual, lerp, narrow, split_residual, widen


@triton.jit
def candidate(
    table_ptr,
    ema_ptr,
    residual_ptr,
    rows,
    momentum: tl.float64,
    ONLINE: tl.constexpr,
    PERSISTENT: tl.constexpr,
    WIDTH: tl.constexpr,
    ONLINE_HINT: tl.constexpr,
    EMA_HINT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`ema_update` with a float momentum, to nearest or exact, and choices that did not ship.

    rows: how many the table has.
    PERSISTENT: whether a program takes row after row, or the grid has a program for each.
    WIDTH: elements per access at most; 0 for as many as 128 bits hold.
    ONLINE_HINT, EMA_HINT: eviction policies of the loads of either, and of the EMA's stores.
    """
    first = tl.program_id(0)
    # A range of one row, which the compiler unrolls, where the program is not persistent.
    last = rows if PERSISTENT else first + 1
    for row in range(first, last, tl.num_programs(0) if PERSISTENT else 1):
        update_row(
            table_ptr,
            row,
            ema_ptr,
            residual_ptr,
            momentum,
            ONLINE,
            WIDTH,
            ONLINE_HINT,
            EMA_HINT,
            BLOCK,
        )


@triton.jit
def update_row(
    table_ptr,
    row,
    ema_ptr,
    residual_ptr,
    momentum,
    ONLINE: tl.constexpr,
    WIDTH: tl.constexpr,
    ONLINE_HINT: tl.constexpr,
    EMA_HINT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ema = lerp(ema, online, momentum) for the chunk in a row of the table."""
    address, offset, length, aligned = chunk(table_ptr, row)
    weight = tl.full((), momentum, tl.float32)
    ema = tl.multiple_of(ema_ptr + offset, 16)
    residual = residual_ptr
    if residual_ptr is not None:
        residual = tl.multiple_of(residual_ptr + offset, 16)
    if aligned:
        online = tl.multiple_of(address.to(tl.pointer_type(ONLINE)), 16)
        bound = (length // 8) * 8
        for start in range(0, bound, BLOCK):
            index = start + tl.arange(0, BLOCK)
            ema_ptrs = ema + index
            online_ptrs = online + index
            residual_ptrs = None if residual is None else residual + index
            if WIDTH > 0:
                ema_ptrs = tl.max_contiguous(ema_ptrs, WIDTH)
                online_ptrs = tl.max_contiguous(online_ptrs, WIDTH)
                if residual is not None:
                    residual_ptrs = tl.max_contiguous(residual_ptrs, WIDTH)
            update_elements(
                ema_ptrs, online_ptrs, residual_ptrs, index < bound, weight, ONLINE_HINT, EMA_HINT
            )
    else:
        online = address.to(tl.pointer_type(ONLINE))
        for start in range(0, length, BLOCK // 4):
            index = start + tl.arange(0, BLOCK // 4)
            update_elements(
                ema + index,
                online + index,
                None if residual is None else residual + index,
                index < length,
                weight,
                ONLINE_HINT,
                EMA_HINT,
            )


@triton.jit
def update_elements(
    ema_ptrs,
    online_ptrs,
    residual_ptrs,
    mask,
    momentum,
    ONLINE_HINT: tl.constexpr,
    EMA_HINT: tl.constexpr,
):
    """ema = lerp(ema, online, momentum) at these addresses."""
    EMA: tl.constexpr = ema_ptrs.dtype.element_ty
    ema = tl.load(ema_ptrs, mask=mask, eviction_policy=EMA_HINT)
    online = widen(tl.load(online_ptrs, mask=mask, eviction_policy=ONLINE_HINT), tl.float32)
    if residual_ptrs is None:
        value = lerp(widen(ema, tl.float32), online, momentum)
        tl.store(ema_ptrs, narrow(value, EMA), mask=mask, eviction_policy=EMA_HINT)
    else:
        residual = tl.load(residual_ptrs, mask=mask, eviction_policy=EMA_HINT)
        value = lerp(join_residual(ema, residual), online, momentum)
        ema, residual = split_residual(value, EMA, residual_ptrs.dtype.element_ty)
        tl.store(residual_ptrs, residual, mask=mask, eviction_policy=EMA_HINT)
        tl.store(ema_ptrs, ema, mask=mask, eviction_policy=EMA_HINT)
