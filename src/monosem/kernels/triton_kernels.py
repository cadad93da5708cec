"""The Triton kernels of a step, for CUDA and ROCm; `triton_step` launches them and says what they are for.

B tokens, D = d_model, N latents, K slots a token. Matrices are row-major and contiguous; pointers end in `_ptr`.
Offsets that can pass 2^31 (N * D does at 16M x 768) are int64. No kernel uses atomics and every sum has an order fixed
by compile-time constants alone, so that equal arguments give equal bits. Loops over D take any width in fixed blocks:
a whole row in registers would spill.
"""

from __future__ import annotations

from typing import no_type_check  # on every kernel: triton compiles the source, a checked wrapper has none

import triton
import triton.language as tl

ROUND_UP = 1 + 2.0**-18
"""A norm summed in fp32, made a little larger, bounds the true one."""


@no_type_check
@triton.jit
def row_bounds_kernel(
    rows_ptr,
    low_ptr,
    scale_ptr,
    norm_ptr,
    rounding_ptr,
    D,
    LARGEST: tl.constexpr,
    ROUND: tl.constexpr,
    ROUND_UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: low = round(row / scale), norm >= ||row||, rounding >= ||row - scale low||.

    What rounding cost is measured, not assumed, so the bound holds for any format and rounding mode. Everything is
    summed in units of the row's largest entry: no overflow, no underflow. A row with NaN or Inf has norm NaN.
    scale puts the largest entry at LARGEST (0: scale is 1); with ROUND off only norm is written.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, D, BLOCK):
        inside = start + columns < D
        largest = tl.maximum(largest, tl.abs(tl.load(rows_ptr + row * D + start + columns, mask=inside, other=0.0)))
    unit = tl.max(largest, 0)
    unit = tl.where(unit > 0, unit, 1.0)
    scale = unit * 0 + 1.0
    if LARGEST > 0:
        scale = tl.maximum(unit / LARGEST, 1e-37)
    squares = tl.full((BLOCK,), 0.0, tl.float32)
    lost = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, D, BLOCK):
        inside = start + columns < D
        values = tl.load(rows_ptr + row * D + start + columns, mask=inside, other=0.0)
        squares += (values / unit) * (values / unit)
        if ROUND:
            low = (values / scale).to(low_ptr.dtype.element_ty)
            tl.store(low_ptr + row * D + start + columns, low, mask=inside)
            loss = (values - low.to(tl.float32) * scale) / unit
            lost += tl.where(inside, loss * loss, 0.0)
    tl.store(norm_ptr + row, unit * tl.sqrt(tl.sum(squares, 0)) * ROUND_UP)
    if ROUND:
        tl.store(scale_ptr + row, scale)
        tl.store(rounding_ptr + row, unit * tl.sqrt(tl.sum(lost, 0)) * ROUND_UP)


@no_type_check
@triton.jit
def sweep_kernel(
    x_ptr,
    encoder_ptr,
    bias_ptr,
    x_scale_ptr,
    encoder_scale_ptr,
    x_rounding_ptr,
    x_norm_ptr,
    encoder_norm_ptr,
    encoder_rounding_ptr,
    bias_slack_ptr,
    threshold_ptr,
    value_ptr,
    index_ptr,
    count_ptr,
    n_rows,
    first,
    last,
    split_latents,
    D,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    WIDEN: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The encoder product of a block of rows with one split of the latents [first, last), fused with the selection.

    a = x . encoder[i] + bias[i], taken in low precision, lies within
        slack = x_rounding * encoder_norm[i] + x_norm * encoder_rounding[i] + bias_slack[i]
    of the fp32 value (Cauchy-Schwarz on what rounding lost). Latents whose upper bound a + slack reaches the row's
    threshold go to the row's own buffer of this split, in order of latent: a and i. `count` is how many there were,
    beyond CAPACITY too, though only CAPACITY are kept. A comparison with NaN keeps nothing.
    WIDEN is for Triton's interpreter, whose dot reads bf16 as integers; widening changes no product.
    Grid (blocks of rows, splits): programs that run together share a split's latents in the L2 cache.
    """
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    local_rows = tl.arange(0, ROWS)
    local_latents = tl.arange(0, LATENTS)
    depth = tl.arange(0, DEPTH)
    rows = first_row + local_rows
    is_row = rows < n_rows
    threshold = tl.load(threshold_ptr + rows, mask=is_row, other=float("inf"))
    x_rounding = tl.load(x_rounding_ptr + rows, mask=is_row, other=0.0)
    x_norm = tl.load(x_norm_ptr + rows, mask=is_row, other=0.0)
    x_block_ptr = x_ptr + first_row.to(tl.int64) * D
    buffer = (rows * tl.num_programs(1) + split) * CAPACITY
    count = tl.full((ROWS,), 0, tl.int32)

    begin = first + split * split_latents
    end = tl.minimum(begin + split_latents, last)
    tile_ptr = encoder_ptr + begin.to(tl.int64) * D
    for tile in range(begin, end, LATENTS):
        latents = tile + local_latents
        is_latent = latents < end
        product = tl.full((ROWS, LATENTS), 0.0, tl.float32)
        for start in range(0, D, DEPTH):
            inside = start + depth < D
            x = tl.load(
                x_block_ptr + local_rows[:, None] * D + (start + depth)[None, :],
                mask=is_row[:, None] & inside[None, :],
                other=0.0,
            )
            encoder = tl.load(
                tile_ptr + local_latents[None, :] * D + (start + depth)[:, None],
                mask=is_latent[None, :] & inside[:, None],
                other=0.0,
            )
            if WIDEN:
                x, encoder = x.to(tl.float32), encoder.to(tl.float32)
            product = tl.dot(x, encoder, product, input_precision=PRECISION)
        if SCALED:
            product *= tl.load(x_scale_ptr + rows, mask=is_row, other=0.0)[:, None]
            product *= tl.load(encoder_scale_ptr + latents, mask=is_latent, other=0.0)[None, :]
        bias = tl.load(bias_ptr + latents, mask=is_latent, other=0.0)
        norm = tl.load(encoder_norm_ptr + latents, mask=is_latent, other=0.0)
        rounding = tl.load(encoder_rounding_ptr + latents, mask=is_latent, other=0.0)
        bias_slack = tl.load(bias_slack_ptr + latents, mask=is_latent, other=0.0)
        slack = x_rounding[:, None] * norm[None, :] + x_norm[:, None] * rounding[None, :]
        slack += bias_slack[None, :]
        value = product + bias[None, :]
        keep = (value + slack >= threshold[:, None]) & is_latent[None, :] & is_row[:, None]  # inf >= inf is true
        kept = keep.to(tl.int32)
        n_kept = tl.sum(kept, 1)
        if tl.max(n_kept, 0) > 0:
            slot = count[:, None] + tl.cumsum(kept, 1) - kept
            keep = keep & (slot < CAPACITY)
            slot += buffer[:, None]
            tl.store(value_ptr + slot, value, mask=keep)
            tl.store(index_ptr + slot, tl.broadcast_to(latents[None, :], (ROWS, LATENTS)), mask=keep)
        count += n_kept
        tile_ptr += LATENTS * D
    tl.store(count_ptr + rows * tl.num_programs(1) + split, count, mask=is_row)


@no_type_check
@triton.jit
def gathered_dots_kernel(
    rows_ptr,
    matrix_ptr,
    bias_ptr,
    index_ptr,
    out_ptr,
    K,
    D,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[b, j] = rows[b] . matrix[index[b, j]] (+ bias[index[b, j]]) in fp32; 0 where the index is negative.

    Grid (B, groups of slots). The order of the sum is the same in every slot: the value is a function of (b, latent).
    """
    row = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    columns = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + row * K + slots, mask=slots < K, other=-1).to(tl.int64)
    wanted = index >= 0
    total = tl.full((GROUP, BLOCK), 0.0, tl.float32)
    for start in range(0, D, BLOCK):
        inside = start + columns < D
        row_block = tl.load(rows_ptr + row * D + start + columns, mask=inside, other=0.0)
        gathered = tl.load(
            matrix_ptr + index[:, None] * D + (start + columns)[None, :],
            mask=wanted[:, None] & inside[None, :],
            other=0.0,
        )
        total += gathered * row_block[None, :]
    dots = tl.sum(total, 1)
    if HAS_BIAS:
        dots += tl.load(bias_ptr + index, mask=wanted, other=0.0)
    tl.store(out_ptr + row * K + slots, dots, mask=slots < K)


@no_type_check
@triton.jit
def decode_kernel(
    index_ptr, value_ptr, matrix_ptr, base_ptr, out_ptr, K, D, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr
):
    """out[b] = sum_j value[b, j] matrix[index[b, j]] (+ base), in the order of the slots. Grid (B, blocks of D)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for slot in range(K):
        index = tl.load(index_ptr + row * K + slot).to(tl.int64)
        value = tl.load(value_ptr + row * K + slot)
        total += value * tl.load(matrix_ptr + index * D + columns, mask=inside, other=0.0)
    if HAS_BASE:
        total += tl.load(base_ptr + columns, mask=inside, other=0.0)
    tl.store(out_ptr + row * D + columns, total, mask=inside)


@no_type_check
@triton.jit
def segment_sums_kernel(
    latent_ptr,
    token_ptr,
    factor_ptr,
    start_ptr,
    rows_ptr,
    out_ptr,
    head_ptr,
    n_pairs,
    D,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First level of out[i] = sum of factor * rows[token] over the pairs of latent i, which lie sorted by latent.

    One program walks CHUNK pairs. The segments that begin in its chunk it sums into `out`, as far as the chunk goes;
    the one that an earlier chunk began it sums into head[chunk], so that a latent active on every token is spread over
    many programs and none writes where another does. start[i] is the first pair of latent i, start[N] = n_pairs.
    Grid (chunks, blocks of D).
    """
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, n_pairs)
    latent = tl.load(latent_ptr + first)
    carried = tl.load(start_ptr + latent) < first
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for pair in range(first, last):
        pair_latent = tl.load(latent_ptr + pair)
        if pair_latent != latent:
            tl.store(head_ptr + chunk * D + columns, total, mask=inside & carried)
            tl.store(out_ptr + latent * D + columns, total, mask=inside & (carried == 0))
            total = tl.full((BLOCK,), 0.0, tl.float32)
            latent = pair_latent
            carried = latent < 0
        token = tl.load(token_ptr + pair)
        total += tl.load(factor_ptr + pair) * tl.load(rows_ptr + token * D + columns, mask=inside, other=0.0)
    tl.store(head_ptr + chunk * D + columns, total, mask=inside & carried)
    tl.store(out_ptr + latent * D + columns, total, mask=inside & (carried == 0))


@no_type_check
@triton.jit
def segment_heads_kernel(latent_ptr, start_ptr, out_ptr, head_ptr, D, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Second level: the first chunk that a segment is carried into adds that segment's heads to `out`, in order."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    first = chunk * CHUNK
    latent = tl.load(latent_ptr + first)
    start = tl.load(start_ptr + latent)
    if (start < first) & (start >= first - CHUNK):
        n_chunks = (tl.load(start_ptr + latent + 1) - first + CHUNK - 1) // CHUNK
        total = tl.load(out_ptr + latent * D + columns, mask=inside, other=0.0)
        for step in range(n_chunks):
            total += tl.load(head_ptr + (chunk + step) * D + columns, mask=inside, other=0.0)
        tl.store(out_ptr + latent * D + columns, total, mask=inside)


@no_type_check
@triton.jit
def weighted_rows_kernel(factor_ptr, matrix_ptr, out_ptr, n_rows, D, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """out[c] = sum of factor[i] * matrix[i] over the rows i of chunk c. Grid (chunks, blocks of D)."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    first = chunk * CHUNK
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for row in range(first, tl.minimum(first + CHUNK, n_rows)):
        total += tl.load(factor_ptr + row) * tl.load(matrix_ptr + row * D + columns, mask=inside, other=0.0)
    tl.store(out_ptr + chunk * D + columns, total, mask=inside)


@no_type_check
@triton.jit
def along_row(weight_ptr, gradient_ptr, base, n_elements, D, BLOCK: tl.constexpr):
    """gradient . weight of one row."""
    columns = tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, D, BLOCK):
        offsets = base + start + columns
        inside = (start + columns < D) & (offsets < n_elements)
        weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0)
        total += weight * tl.load(gradient_ptr + offsets, mask=inside, other=0.0)
    return tl.sum(total, 0)


@no_type_check
@triton.jit
def gradient_squares_kernel(
    weight_ptr, gradient_ptr, square_ptr, n_elements, D, PROJECT: tl.constexpr, BLOCK: tl.constexpr
):
    """square[row] = ||g||^2 of the row's gradient, after projection; clipping needs it before the update."""
    row = tl.program_id(0).to(tl.int64)
    base = row * D
    columns = tl.arange(0, BLOCK)
    along = 0.0
    if PROJECT:
        along = along_row(weight_ptr, gradient_ptr, base, n_elements, D, BLOCK)
    squares = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, D, BLOCK):
        offsets = base + start + columns
        inside = (start + columns < D) & (offsets < n_elements)
        gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0)
        if PROJECT:
            gradient -= along * tl.load(weight_ptr + offsets, mask=inside, other=0.0)
        squares += gradient * gradient
    tl.store(square_ptr + row, tl.sum(squares, 0))


@no_type_check
@triton.jit
def update_rows_kernel(
    weight_ptr,
    gradient_ptr,
    first_ptr,
    second_ptr,
    average_ptr,
    clip_ptr,
    square_ptr,
    n_elements,
    D,
    step_size,
    second_scale,
    average_rate,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPSILON: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    HAS_AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: project, scale by clip, Adam, unit norm, average, in place; square[row] = ||projected gradient||^2.

    w -= step_size m / (sqrt(v) second_scale + EPSILON), with Adam's bias corrections in step_size and second_scale.
    UNIT_NORM: the row is a latent of the decoder, whose gradient loses its component along it. Vectors come as rows of
    any width D: what lies beyond `n_elements` is left alone.
    """
    row = tl.program_id(0).to(tl.int64)
    base = row * D
    columns = tl.arange(0, BLOCK)
    along = 0.0
    if UNIT_NORM:
        along = along_row(weight_ptr, gradient_ptr, base, n_elements, D, BLOCK)
        tl.debug_barrier()
    clip = tl.load(clip_ptr)
    squares = tl.full((BLOCK,), 0.0, tl.float32)
    lengths = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, D, BLOCK):
        offsets = base + start + columns
        inside = (start + columns < D) & (offsets < n_elements)
        weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0)
        gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0)
        if UNIT_NORM:
            gradient -= along * weight
        squares += gradient * gradient
        gradient *= clip
        first = tl.load(first_ptr + offsets, mask=inside, other=0.0)
        second = tl.load(second_ptr + offsets, mask=inside, other=0.0)
        first = BETA1 * first + (1 - BETA1) * gradient
        second = BETA2 * second + (1 - BETA2) * gradient * gradient
        weight -= step_size * tl.div_rn(first, tl.sqrt_rn(second) * second_scale + EPSILON)
        lengths += tl.where(inside, weight * weight, 0.0)
        tl.store(first_ptr + offsets, first, mask=inside)
        tl.store(second_ptr + offsets, second, mask=inside)
        tl.store(weight_ptr + offsets, weight, mask=inside)
    tl.store(square_ptr + row, tl.sum(squares, 0))

    if UNIT_NORM or HAS_AVERAGE:
        tl.debug_barrier()  # the loop below reads what the one above wrote
        length = 1.0
        if UNIT_NORM:
            length = tl.sqrt_rn(tl.sum(lengths, 0))
        for start in range(0, D, BLOCK):
            offsets = base + start + columns
            inside = (start + columns < D) & (offsets < n_elements)
            weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0)
            if UNIT_NORM:
                weight = tl.div_rn(weight, length)
                tl.store(weight_ptr + offsets, weight, mask=inside)
            if HAS_AVERAGE:
                average = tl.load(average_ptr + offsets, mask=inside, other=0.0)
                tl.store(average_ptr + offsets, average + average_rate * (weight - average), mask=inside)
