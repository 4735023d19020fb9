"""The device code: Triton kernels that take every tensor of a bucket in one launch.

`ema_update` averages, `exchange` swaps the two models' values.
A program takes one row of the chunk table: where the chunk's online elements start (an address),
where its EMA elements start (an offset in the flat bucket), and how many there are.

`precision.py` has the number formats in torch, and says why they are as they are. Conversions to
and from bf16 are written on bits. Reading two from a register takes one instruction for each so,
with `cvt.f32.bf16` three in all. Rounding with `cvt.rn.bf16x2.f32` would halve the instructions of
a bf16 update, but take more registers where it is guarded (on sm_90 38 instead of 32).
"""

import triton
import triton.language as tl

# The fewest rounds of Philox4x32 that pass all of BigCrush (Salmon et al., "Parallel random
# numbers: as easy as 1, 2, 3", SC'11).
PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def widen(x, COMPUTE: tl.constexpr):
    """Convert exactly to the arithmetic's dtype."""
    if x.dtype == tl.bfloat16:
        high = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return high.to(tl.float32, bitcast=True).to(COMPUTE)
    return x.to(COMPUTE)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Round to nearest-even into the stored dtype; NaN stays NaN, Inf stays Inf."""
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The carry could turn a NaN into an Inf: keep its high half and set the quiet bit.
        rounded = tl.where(x == x, rounded, (bits >> 16) | 0x40)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def narrow_stochastic(x, noise, DTYPE: tl.constexpr):
    """Round to one of the two neighbours, such that the mean over all 16-bit `noise` is exact."""
    bits = x.to(tl.uint32, bitcast=True)
    if DTYPE == tl.bfloat16:
        # An Inf has no low half to carry; a NaN could carry into something else.
        rounded = tl.where(x == x, (bits + noise) >> 16, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        # fp16 keeps 13 bits less than fp32, and below its smallest normal number 2**-14 more of
        # them: there, adding 2**-14 brings them to the same place.
        shift = tl.where(tl.abs(x) < 2**-14, 2**-14, 0.0)
        size = (tl.abs(x) + shift).to(tl.uint32, bitcast=True)
        size = tl.minimum(size, 0x7FC00000)  # of a NaN, so that it cannot carry either
        size = (size + (noise & 0x1FFF)) & 0xFFFFE000
        rounded = (size.to(tl.float32, bitcast=True) - shift).to(tl.uint32, bitcast=True)
        return (rounded | (bits & 0x80000000)).to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def noise(seed, update, first, SIZE: tl.constexpr):
    """Uniform 16-bit integers for SIZE elements, `first` (a multiple of 8) and following.

    A function of the seed, the number of the update and an element's index in the bucket. One call
    of Philox gives 128 bits, enough for 8 elements: a call for each would make the update wait for
    arithmetic instead of memory (65 instructions per element on sm_90 instead of 19).
    """
    call = first // 8 + tl.arange(0, SIZE // 8)
    low = call.to(tl.uint32)
    zeros = low * 0
    a, b, c, d = tl.philox(
        seed,
        low,
        (call >> 32).to(tl.uint32),
        zeros + update.to(tl.uint32),
        zeros + (update >> 32).to(tl.uint32),
        n_rounds=PHILOX_ROUNDS,
    )
    # In the order a, b, c, d, the low half of each before its high half.
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.join(words & 0xFFFF, words >> 16).reshape(SIZE)


@triton.jit
def join(weight, residual):
    """The fp32 value that an exact EMA keeps in a weight and its residual."""
    wide = widen(weight, tl.float32)
    if residual.dtype == tl.int16:
        bits = wide.to(tl.int32, bitcast=True) + residual.to(tl.int32)
        value = bits.to(tl.float32, bitcast=True)
        # Beside a weight that was written since, an old residual can make a NaN of it.
        return tl.where(value == value, value, wide)
    else:
        return tl.where(narrow(residual, weight.dtype) == weight, residual, wide)


@triton.jit
def split(value, WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr):
    """The weight and the residual from which `join` makes this value again."""
    if RESIDUAL == tl.int16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value == value, bits, 0x7FC00000)
        weight = ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return weight, bits.to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        return narrow(value, WEIGHT), value


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


@triton.jit
def count(finite, mask, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """How many of each GROUP elements, which one thread has, are not finite."""
    return tl.where(mask & (finite == 0), 1, 0).reshape(SIZE // GROUP, GROUP).sum(1)


@triton.jit
def average(
    ema_ptrs,
    online_ptrs,
    residual_ptrs,
    seed,
    update,
    skipped,
    first,
    mask,
    momentum,
    COPY: tl.constexpr,
    OVERFLOW: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """ema = lerp(ema, online, momentum) for SIZE elements of the bucket, `first` and following.

    Where there is an OVERFLOW, those that would reach it, or be NaN, are skipped. Returns how many
    were, `skipped` included, by GROUP neighbours.
    """
    EMA: tl.constexpr = ema_ptrs.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if EMA == tl.float64 else tl.float32
    ema = tl.load(ema_ptrs, mask=mask)
    online = widen(tl.load(online_ptrs, mask=mask), COMPUTE)
    residual = None
    if residual_ptrs is None:
        old = widen(ema, COMPUTE)
    else:
        residual = tl.load(residual_ptrs, mask=mask)
        old = join(ema, residual)
    value = online if COPY else lerp(old, online, momentum)
    if OVERFLOW is not None:
        finite = tl.abs(value) < OVERFLOW  # not for NaN
        skipped += count(finite, mask, SIZE, GROUP)
        value = tl.where(finite, value, old)
    if residual_ptrs is not None:
        ema, residual = split(value, EMA, residual_ptrs.dtype.element_ty)
        tl.store(residual_ptrs, residual, mask=mask)
    elif seed is not None:
        ema = narrow_stochastic(value, noise(seed, update, first, SIZE), EMA)
    else:
        ema = narrow(value, EMA)
    tl.store(ema_ptrs, ema, mask=mask)
    return skipped


@triton.jit
def chunk(table_ptr, number):
    """A row of the table: online address; offset in the bucket; length; whether aligned."""
    row = table_ptr + number * 4
    address = tl.load(row)
    offset = tl.load(row + 1)
    length_and_flag = tl.load(row + 2)
    return address, offset, (length_and_flag >> 1).to(tl.int32), length_and_flag & 1


@triton.jit(do_not_specialize_on_alignment=["momentum_ptr"])
def ema_update(
    table_ptr,
    ema_ptr,
    residual_ptr,
    random_state_ptr,
    skip_counts_ptr,
    momentum: tl.float64,
    momentum_ptr,
    ONLINE: tl.constexpr,
    COPY: tl.constexpr,
    OVERFLOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ema = lerp(ema, online, momentum) for the chunk in row `program_id(0)` of the chunk table.

    table_ptr: int64 [rows, 4]: online address; element offset in the bucket; length * 2 + aligned;
        number of the chunk's skip count.
    ema_ptr: the flat bucket, 16-byte aligned.
    residual_ptr: what a bucket of exact precision has beside each weight, or None.
    random_state_ptr: int64 [2], seed and number of this update, for a bucket of stochastic
        precision, or None; read here, so that each replay of a captured graph rounds anew.
    skip_counts_ptr: int64, each counting the elements of a chunk that kept their value, because
        the new one was not finite; or None, and then they take it.
    momentum: used when momentum_ptr is None; a double, since fp64 buckets need all its digits.
    momentum_ptr: a 0-d tensor or None; read here, so that a captured graph follows its value.
    ONLINE: dtype of the online elements.
    COPY: whether the EMA becomes the online model, whatever it was: where that is not finite,
        torch.lerp makes NaN of it even with momentum 1.
    OVERFLOW: the least magnitude that counts as not finite; None without skip counts.
    BLOCK: elements handled at a time.
    """
    address, offset, length, aligned = chunk(table_ptr, tl.program_id(0))
    EMA: tl.constexpr = ema_ptr.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if EMA == tl.float64 else tl.float32
    # Read once, before the loop: the stores may alias these as far as the compiler knows.
    if momentum_ptr is not None:
        weight = tl.load(momentum_ptr).to(COMPUTE)
    else:
        weight = tl.full((), momentum, COMPUTE)
    seed = None
    update = None
    if random_state_ptr is not None:
        seed = tl.load(random_state_ptr)
        update = tl.load(random_state_ptr + 1)

    # Every tensor starts on a 16-byte boundary of the bucket. Hints go on the pointer: on the
    # integer they are lost.
    ema = tl.multiple_of(ema_ptr + offset, 16)
    residual = residual_ptr
    if residual_ptr is not None:
        residual = tl.multiple_of(residual_ptr + offset, 16)
    STORED: tl.constexpr = EMA if residual is None else residual.dtype.element_ty
    WIDEST: tl.constexpr = STORED.primitive_bitwidth
    # Neighbours that one thread has, whatever the layout.
    GROUP: tl.constexpr = 2 if EMA == tl.float64 else 4
    if aligned:
        # The bound is written as a multiple of 8 (the flag says that it is one): with a bound of
        # unknown divisibility every access would be scalar.
        online = tl.multiple_of(address.to(tl.pointer_type(ONLINE)), 16)
        bound = (length // 8) * 8
        skipped = tl.zeros((BLOCK // GROUP,), tl.int32)
        for start in range(0, bound, BLOCK):
            index = start + tl.arange(0, BLOCK)
            ema_ptrs = ema + index
            online_ptrs = online + index
            # Where one side is fp32, all are accessed four elements at a time: a narrow one would
            # be accessed eight at a time, and go through shared memory, with barriers, to meet it.
            if EMA.primitive_bitwidth < WIDEST:
                ema_ptrs = tl.max_contiguous(ema_ptrs, 4)
            if ONLINE.primitive_bitwidth < WIDEST:
                online_ptrs = tl.max_contiguous(online_ptrs, 4)
            skipped = average(
                ema_ptrs,
                online_ptrs,
                None if residual is None else residual + index,
                seed,
                update,
                skipped,
                offset + start,
                index < bound,
                weight,
                COPY,
                OVERFLOW,
                BLOCK,
                GROUP,
            )
        if skip_counts_ptr is not None:
            add(skip_counts_ptr, table_ptr, skipped)
    else:
        # Cast again: a hint marks the value itself and would leak into this branch. Smaller steps,
        # since masking each element costs registers that the aligned branch would pay for; with
        # noise no smaller than the 8 elements per thread that one call gives.
        online = address.to(tl.pointer_type(ONLINE))
        SMALL: tl.constexpr = BLOCK // (4 if random_state_ptr is None else 2)
        skipped_here = tl.zeros((SMALL // GROUP,), tl.int32)
        for start in range(0, length, SMALL):
            index = start + tl.arange(0, SMALL)
            skipped_here = average(
                ema + index,
                online + index,
                None if residual is None else residual + index,
                seed,
                update,
                skipped_here,
                offset + start,
                index < length,
                weight,
                COPY,
                OVERFLOW,
                SMALL,
                GROUP,
            )
        if skip_counts_ptr is not None:
            add(skip_counts_ptr, table_ptr, skipped_here)


@triton.jit
def add(skip_counts_ptr, table_ptr, skipped):
    """Add to the skip count of this program's chunk, which no other program writes."""
    total = tl.sum(skipped)
    if total > 0:
        count_ptr = skip_counts_ptr + tl.load(table_ptr + tl.program_id(0) * 4 + 3)
        tl.store(count_ptr, tl.load(count_ptr) + total)


@triton.jit
def exchange(table_ptr, ema_ptr, BLOCK: tl.constexpr):
    """Swap the online and the EMA elements, which have one dtype, of the program's chunk."""
    address, offset, length, aligned = chunk(table_ptr, tl.program_id(0))
    ema = tl.multiple_of(ema_ptr + offset, 16)
    if aligned:
        online = tl.multiple_of(address.to(ema_ptr.dtype), 16)
        bound = (length // 8) * 8
        for start in range(0, bound, BLOCK):
            index = start + tl.arange(0, BLOCK)
            exchange_at(ema + index, online + index, index < bound)
    else:
        online = address.to(ema_ptr.dtype)
        SMALL: tl.constexpr = BLOCK // 4
        for start in range(0, length, SMALL):
            index = start + tl.arange(0, SMALL)
            # One element at a time on both sides: they would meet in shared memory otherwise.
            exchange_at(tl.max_contiguous(ema + index, 1), online + index, index < length)


@triton.jit
def exchange_at(ema_ptrs, online_ptrs, mask):
    """Swap the elements at these addresses."""
    ema = tl.load(ema_ptrs, mask=mask)
    online = tl.load(online_ptrs, mask=mask)
    tl.store(ema_ptrs, online, mask=mask)
    tl.store(online_ptrs, ema, mask=mask)
