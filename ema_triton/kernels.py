"""The device code: one Triton kernel that averages every tensor of a bucket in one launch.

A program takes one row of the chunk table: where the chunk's online elements start (an address),
where its EMA elements start (an offset in the flat bucket), and how many there are.
"""

import triton
import triton.language as tl


@triton.jit
def widen(x, COMPUTE: tl.constexpr):
    """Convert exactly to the arithmetic's dtype."""
    if x.dtype == tl.bfloat16:
        # A bf16 is the high half of an fp32. Written on bits because the interpreter's own
        # conversion is wrong for subnormals; on a GPU both are one instruction.
        high = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return high.to(tl.float32, bitcast=True).to(COMPUTE)
    return x.to(COMPUTE)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Round to nearest-even into the stored dtype; NaN stays NaN, Inf stays Inf."""
    if DTYPE == tl.bfloat16:
        # On bits because the interpreter truncates fp32 -> bf16.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The carry could turn a NaN into an Inf: keep its high half and set the quiet bit.
        rounded = tl.where(x == x, rounded, (bits >> 16) | 0x40)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def lerp(ema, online, momentum):
    """torch.lerp(ema, online, momentum), as ATen's CUDA kernels compute it.

    Below 0.5 it is fma(momentum, online - ema, ema). From 0.5 on it is
    online - (online - ema) * (1 - momentum), contracted to fma(momentum - 1, online - ema, online).
    Momentum 0 and 1 are exact.
    """
    small = momentum < 0.5
    weight = tl.where(small, momentum, momentum - 1)
    return tl.fma(tl.zeros_like(ema) + weight, online - ema, tl.where(small, ema, online))


@triton.jit(do_not_specialize_on_alignment=["momentum_ptr"])
def ema_update(
    table_ptr,
    ema_ptr,
    momentum: tl.float64,
    momentum_ptr,
    ONLINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ema = lerp(ema, online, momentum) for the chunk in row `program_id(0)` of the chunk table.

    table_ptr: int64 [rows, 3]: online address; element offset in the bucket; length * 2 + aligned.
    ema_ptr: the flat bucket, 16-byte aligned.
    momentum: used when momentum_ptr is None; a double, since fp64 buckets need all its digits.
    momentum_ptr: a 0-d tensor or None; read here, so that a captured graph follows its value.
    ONLINE: dtype of the online elements.
    BLOCK: elements handled at a time.
    """
    row = table_ptr + tl.program_id(0).to(tl.int64) * 3
    address = tl.load(row)
    offset = tl.load(row + 1)
    length_and_flag = tl.load(row + 2)
    length = (length_and_flag >> 1).to(tl.int32)

    EMA: tl.constexpr = ema_ptr.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if EMA == tl.float64 or ONLINE == tl.float64 else tl.float32
    # Read once, before the loop: the stores may alias it as far as the compiler knows.
    if momentum_ptr is not None:
        weight = tl.load(momentum_ptr).to(COMPUTE)
    else:
        weight = tl.full((), momentum, COMPUTE)

    # Every tensor starts on a 16-byte boundary of the bucket. Hints go on the pointer: on the
    # integer they are lost.
    ema = tl.multiple_of(ema_ptr + offset, 16)
    if length_and_flag & 1:
        # The bound is written as a multiple of 8 (the flag says that it is one): with a bound of
        # unknown divisibility every access would be scalar.
        online = tl.multiple_of(address.to(tl.pointer_type(ONLINE)), 16)
        bound = (length // 8) * 8
        for start in range(0, bound, BLOCK):
            index = start + tl.arange(0, BLOCK)
            mask = index < bound
            x_ptrs = online + index
            if ONLINE.primitive_bitwidth < EMA.primitive_bitwidth:
                # Both sides four elements wide: otherwise the narrow side is loaded eight wide
                # and goes through shared memory, with barriers, to meet the wide one.
                x_ptrs = tl.max_contiguous(x_ptrs, 4)
            e = widen(tl.load(ema + index, mask=mask), COMPUTE)
            x = widen(tl.load(x_ptrs, mask=mask), COMPUTE)
            tl.store(ema + index, narrow(lerp(e, x, weight), EMA), mask=mask)
    else:
        # Cast again: a hint marks the value itself and would leak into this branch. Smaller steps,
        # since masking each element costs registers that the aligned branch would pay for.
        online = address.to(tl.pointer_type(ONLINE))
        for start in range(0, length, BLOCK // 4):
            index = start + tl.arange(0, BLOCK // 4)
            mask = index < length
            e = widen(tl.load(ema + index, mask=mask), COMPUTE)
            x = widen(tl.load(online + index, mask=mask), COMPUTE)
            tl.store(ema + index, narrow(lerp(e, x, weight), EMA), mask=mask)
