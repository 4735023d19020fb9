"""The device code: Triton kernels that take every tensor of a bucket in one launch.

`ema_update` averages, `exchange` swaps the values of the online and the EMA tensors. A program
takes one row of the chunk table.

`precision.py` has the number formats in torch, and the reasons for them. Conversions to and from
bf16 are written on bits: unpacking two from a register takes one instruction each, three in all
with `cvt.f32.bf16`. Rounding with `cvt.rn.bf16x2.f32` would halve the instructions of a bf16
update, but take more registers where non-finite values are skipped (on sm_90 38 instead of 32).
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
        # fp16 drops the last 13 bits of an fp32, but more of them below its smallest normal number
        # 2**-14. Adding 2**-14 there moves them to the last 13 too.
        shift = tl.where(tl.abs(x) < 2**-14, 2**-14, 0.0)
        size = (tl.abs(x) + shift).to(tl.uint32, bitcast=True)
        size = tl.minimum(size, 0x7FC00000)  # a NaN could carry here too
        size = (size + (noise & 0x1FFF)) & 0xFFFFE000
        rounded = (size.to(tl.float32, bitcast=True) - shift).to(tl.uint32, bitcast=True)
        return (rounded | (bits & 0x80000000)).to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def noise(seed, update, first, SIZE: tl.constexpr):
    """Uniform 16-bit integers for SIZE elements from index `first` on, a multiple of 8.

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
def join_residual(weight, residual):
    """The fp32 value that an exact EMA keeps in a weight and its residual."""
    wide = widen(weight, tl.float32)
    if residual.dtype == tl.int16:
        bits = wide.to(tl.int32, bitcast=True) + residual.to(tl.int32)
        value = bits.to(tl.float32, bitcast=True)
        # The residual is an old one where the weight was written: the sum may then be a NaN.
        return tl.where(value == value, value, wide)
    else:
        return tl.where(narrow(residual, weight.dtype) == weight, residual, wide)


@triton.jit
def split_residual(value, WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr):
    """The weight and the residual that `join_residual` makes this value of."""
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
def average_block(
    ema,
    online,
    ema_ptrs,
    residual,
    residual_ptrs,
    mask,
    skipped,
    seed,
    update,
    first,
    momentum,
    COPY: tl.constexpr,
    OVERFLOW: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Average SIZE elements that are loaded, and store them; what each thread has skipped so far.

    first: the index of the first element in the bucket. Others: see `average`.
    """
    old = widen(ema, momentum.dtype) if residual is None else join_residual(ema, residual)
    value = online if COPY else lerp(old, online, momentum)
    if OVERFLOW is not None:
        finite = tl.abs(value) < OVERFLOW  # not for NaN
        skips = tl.where(mask & (finite == 0), 1, 0)
        skipped += skips.reshape(skipped.shape[0], SIZE // skipped.shape[0]).sum(1)
        value = tl.where(finite, value, old)
    if residual is not None:
        new, residual = split_residual(value, ema.dtype, residual.dtype)
        tl.store(residual_ptrs, residual, mask=mask)
    elif seed is not None:
        new = narrow_stochastic(value, noise(seed, update, first, SIZE), ema.dtype)
    else:
        new = narrow(value, ema.dtype)
    tl.store(ema_ptrs, new, mask=mask)
    return skipped


@triton.jit
def pointers(base, index, STORED: tl.constexpr):
    """base + index, accessed four elements at a time if narrower than STORED, as that is then.

    Eight at a time they would go through shared memory, with barriers, to the other's layout.
    """
    if base.dtype.element_ty.primitive_bitwidth < STORED.primitive_bitwidth:
        return tl.max_contiguous(base + index, 4)
    return base + index


@triton.jit
def add_count(table_ptr, skip_counts_ptr, skipped):
    """Add what the program's threads have skipped to the count of its chunk."""
    total = tl.sum(skipped)
    if total > 0:  # not atomic: no other program writes this count
        count_ptr = skip_counts_ptr + tl.load(table_ptr + tl.program_id(0) * 4 + 3)
        tl.store(count_ptr, tl.load(count_ptr) + total)


@triton.jit
def average(
    table_ptr,
    ema_ptr,
    online_ptr,
    residual_ptr,
    skip_counts_ptr,
    seed,
    update,
    offset,
    length,
    momentum,
    COPY: tl.constexpr,
    OVERFLOW: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The update of the program's chunk, SIZE elements at a time.

    The arguments are those of `ema_update`, with pointers to the chunk's first elements; `seed` and
    `update` are None unless rounding is stochastic.
    """
    EMA: tl.constexpr = ema_ptr.dtype.element_ty
    STORED: tl.constexpr = EMA if residual_ptr is None else residual_ptr.dtype.element_ty
    # Neighbours that one thread holds in any layout. It counts what it skips, across its steps.
    GROUP: tl.constexpr = 2 if EMA == tl.float64 else 4
    skipped = tl.zeros((SIZE // GROUP,), tl.int32)
    for start in range(0, length, SIZE):
        index = start + tl.arange(0, SIZE)
        ema_ptrs = pointers(ema_ptr, index, STORED)
        online_ptrs = pointers(online_ptr, index, STORED)
        residual_ptrs = None if residual_ptr is None else residual_ptr + index
        first = offset + start
        mask = index < length
        ema = tl.load(ema_ptrs, mask=mask)
        online = widen(tl.load(online_ptrs, mask=mask), momentum.dtype)
        residual = None if residual_ptr is None else tl.load(residual_ptrs, mask=mask)
        skipped = average_block(
            ema,
            online,
            ema_ptrs,
            residual,
            residual_ptrs,
            mask,
            skipped,
            seed,
            update,
            first,
            momentum,
            COPY,
            OVERFLOW,
            SIZE,
        )
    if skip_counts_ptr is not None:
        add_count(table_ptr, skip_counts_ptr, skipped)


@triton.jit
def average_several(
    table_ptr,
    ema_ptrs,
    online_ptr,
    residual_ptrs,
    skip_counts_ptrs,
    seeds,
    updates,
    offset,
    length,
    momenta,
    OVERFLOW: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The same for several EMAs of one dtype: each online element is read once.

    All is loaded before anything is stored: a load behind a store would wait for it.
    """
    EMA: tl.constexpr = ema_ptrs[0].dtype.element_ty
    STORED: tl.constexpr = EMA if residual_ptrs is None else residual_ptrs[0].dtype.element_ty
    GROUP: tl.constexpr = 2 if EMA == tl.float64 else 4
    skipped = tl.tuple([])
    for _ in tl.static_range(len(ema_ptrs)):
        skipped = skipped + (tl.zeros((SIZE // GROUP,), tl.int32),)
    for start in range(0, length, SIZE):
        index = start + tl.arange(0, SIZE)
        first = offset + start
        mask = index < length
        online = widen(tl.load(pointers(online_ptr, index, STORED), mask=mask), momenta[0].dtype)
        emas = tl.tuple([])
        residuals = tl.tuple([])
        for i in tl.static_range(len(ema_ptrs)):
            emas = emas + (tl.load(pointers(ema_ptrs[i], index, STORED), mask=mask),)
            if residual_ptrs is not None:
                residuals = residuals + (tl.load(residual_ptrs[i] + index, mask=mask),)
        counts = tl.tuple([])
        for i in tl.static_range(len(ema_ptrs)):
            counts = counts + (
                average_block(
                    emas[i],
                    online,
                    pointers(ema_ptrs[i], index, STORED),
                    None if residual_ptrs is None else residuals[i],
                    None if residual_ptrs is None else residual_ptrs[i] + index,
                    mask,
                    skipped[i],
                    None if seeds is None else seeds[i],
                    None if updates is None else updates[i],
                    first,
                    momenta[i],
                    False,
                    OVERFLOW,
                    SIZE,
                ),
            )
        skipped = counts
    if skip_counts_ptrs is not None:
        for i in tl.static_range(len(ema_ptrs)):
            add_count(table_ptr, skip_counts_ptrs[i], skipped[i])


@triton.jit
def chunk(table_ptr, number):
    """A row of the table: online address, offset in the bucket, length, whether aligned."""
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

    table_ptr: int64 [rows, 4]: address of the chunk's online elements; offset of its EMA elements
        in the bucket; length * 2 + aligned; number of its skip count.
    ema_ptr: the flat bucket, 16-byte aligned.
    residual_ptr: the residuals of a bucket of exact precision, or None.
    random_state_ptr: int64 [2], seed and number of this update, for a bucket of stochastic
        precision, or None; read here, so that each replay of a captured graph rounds anew.
    skip_counts_ptr: int64, for each chunk how many new values were not finite and skipped; None
        to store such values.
    momentum: used when momentum_ptr is None; a double, since fp64 buckets need all its digits.
    momentum_ptr: a 0-d tensor or None; read here, so that a captured graph follows its value.
    ONLINE: dtype of the online elements.
    COPY: whether the EMA becomes the online value. (lerp with momentum 1 would make it NaN where
        either is not finite.)
    OVERFLOW: the least magnitude that is not finite when stored; None without skip counts.
    BLOCK: elements handled at a time.
    """
    address, offset, length, aligned = chunk(table_ptr, tl.program_id(0))
    COMPUTE: tl.constexpr = tl.float64 if ema_ptr.dtype.element_ty == tl.float64 else tl.float32
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
    if aligned:
        # The flag says that the length is a multiple of 8, this product says it to the compiler:
        # with a bound of unknown divisibility every access would be scalar.
        online = tl.multiple_of(address.to(tl.pointer_type(ONLINE)), 16)
        bound = (length // 8) * 8
        average(
            table_ptr,
            ema,
            online,
            residual,
            skip_counts_ptr,
            seed,
            update,
            offset,
            bound,
            weight,
            COPY,
            OVERFLOW,
            BLOCK,
        )
    else:
        # Cast again: a hint marks the value itself and would leak into this branch. Smaller steps,
        # since masking each element costs registers that the aligned branch would pay for; with
        # noise no smaller than the 8 elements per thread that one call gives.
        online = address.to(tl.pointer_type(ONLINE))
        SMALL: tl.constexpr = BLOCK // (4 if random_state_ptr is None else 2)
        average(
            table_ptr,
            ema,
            online,
            residual,
            skip_counts_ptr,
            seed,
            update,
            offset,
            length,
            weight,
            COPY,
            OVERFLOW,
            SMALL,
        )


@triton.jit
def ema_update_several(
    table_ptr,
    ema_ptrs,
    residual_ptrs,
    random_state_ptrs,
    skip_counts_ptrs,
    momentum_0: tl.float64,
    momentum_1: tl.float64,
    momentum_2: tl.float64,
    ONLINE: tl.constexpr,
    OVERFLOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`ema_update` for two or three EMAs of the same online tensors, which lie alike.

    ema_ptrs, residual_ptrs, random_state_ptrs, skip_counts_ptrs: a tuple with one for each EMA, or
        None where `ema_update` takes None.
    momentum_0 and so on: of each EMA. (In a tuple they would be fp32.)
    Others: as for `ema_update`, which also copies.
    """
    address, offset, length, aligned = chunk(table_ptr, tl.program_id(0))
    COMPUTE: tl.constexpr = tl.float64 if ema_ptrs[0].dtype.element_ty == tl.float64 else tl.float32
    given = (momentum_0, momentum_1, momentum_2)
    momenta = tl.tuple([])
    emas = tl.tuple([])
    residuals = tl.tuple([])
    seeds = tl.tuple([])
    updates = tl.tuple([])
    for i in tl.static_range(len(ema_ptrs)):
        momenta = momenta + (tl.full((), given[i], COMPUTE),)
        emas = emas + (tl.multiple_of(ema_ptrs[i] + offset, 16),)
        if residual_ptrs is not None:
            residuals = residuals + (tl.multiple_of(residual_ptrs[i] + offset, 16),)
        if random_state_ptrs is not None:
            seeds = seeds + (tl.load(random_state_ptrs[i]),)
            updates = updates + (tl.load(random_state_ptrs[i] + 1),)
    if aligned:
        online = tl.multiple_of(address.to(tl.pointer_type(ONLINE)), 16)
        average_several(
            table_ptr,
            emas,
            online,
            None if residual_ptrs is None else residuals,
            skip_counts_ptrs,
            None if random_state_ptrs is None else seeds,
            None if random_state_ptrs is None else updates,
            offset,
            (length // 8) * 8,
            momenta,
            OVERFLOW,
            BLOCK,
        )
    else:
        SMALL: tl.constexpr = 256 if random_state_ptrs is None else BLOCK // 2
        average_several(
            table_ptr,
            emas,
            address.to(tl.pointer_type(ONLINE)),
            None if residual_ptrs is None else residuals,
            skip_counts_ptrs,
            None if random_state_ptrs is None else seeds,
            None if random_state_ptrs is None else updates,
            offset,
            length,
            momenta,
            OVERFLOW,
            SMALL,
        )


@triton.jit
def exchange(table_ptr, ema_ptr, BLOCK: tl.constexpr):
    """Swap the online and the EMA elements of the program's chunk, which have one dtype."""
    address, offset, length, aligned = chunk(table_ptr, tl.program_id(0))
    ema = tl.multiple_of(ema_ptr + offset, 16)
    if aligned:
        online = tl.multiple_of(address.to(ema_ptr.dtype), 16)
        exchange_chunk(ema, online, (length // 8) * 8, BLOCK, BLOCK)
    else:
        # One element at a time on both sides, as the online ones may need: two layouts would
        # exchange through shared memory.
        exchange_chunk(ema, address.to(ema_ptr.dtype), length, BLOCK // 4, 1)


@triton.jit
def exchange_chunk(ema_ptr, online_ptr, length, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Swap SIZE elements at a time, with accesses to the EMA of at most WIDTH elements."""
    for start in range(0, length, SIZE):
        index = start + tl.arange(0, SIZE)
        ema_ptrs = tl.max_contiguous(ema_ptr + index, WIDTH)
        online_ptrs = online_ptr + index
        mask = index < length
        ema = tl.load(ema_ptrs, mask=mask)
        online = tl.load(online_ptrs, mask=mask)
        tl.store(ema_ptrs, online, mask=mask)
        tl.store(online_ptrs, ema, mask=mask)
