# mypy: allow-untyped-defs
"""clip_loss on a GPU: log-sum-exps and the gradient of the logits, tile by tile, in Triton.

One exponential per logit serves its row and its column: that of the logit minus one constant. Where
the constant does not suit the batch, a flag on the device says so and the exact path runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medfast.ops.triton_tiles import (
    LN2,
    LOG2E,
    SIZES,
    Products,
    chunks,
    exists,
    gradient_boost,
    gradient_chunk,
    is_own,
    is_plain,
    launch_parameters,
    on_device,
    operand,
    row_chunk,
    side_by_side,
    tile_at,
    tile_place,
    total_of,
)

# Above this scale one shift cannot serve every row: sums may fall below what fp32 holds.
_MAX_SCALE = tl.constexpr(150.0)
# The shift leaves exponentials of e^60 at most, so sums of any batch stay far from overflow.
_HEADROOM = tl.constexpr(60.0)
# A GPU takes exponentials below 2^-126 for 0: in a sum of n terms above n 2^-102 that is less than
# 2^-24 of it, a rounding.
_SMALLEST_PER_TERM = tl.constexpr(2.0**-102)
_LARGEST = tl.constexpr(2.0**120)
# Gradients are divided by their largest, so that what multiplies them fits any dtype; below this
# they count as zero.
_LEAST_GRADIENT = tl.constexpr(2.0**-110)

# Partial sums, and flags, that a program loads at a time.
_PARTIALS = 16
_FLAGS = 1024
# Numbers that the single program of the range kernel loads at a time.
_VECTOR = 2048


def forward(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's own logit and the log-sum-exps of rows and columns over all others.

    The logits are `logit_scale * rows @ columns.T`, summed in fp32 and never kept. Memory: M + N
    sums per 128 columns and rows, in chunks within the workspace.

    Args:
        rows: [M, D], fp32, bf16 or fp16.
        columns: [N, D], likewise.
        logit_scale: A 0-d tensor on the same device.
        offset: Row i's own column is i + offset, which need not exist.

    Returns:
        The own logits [M], the log-sum-exps of the rows [M] and of the columns [N], in fp32; -inf
        where there is no own logit or no other.
    """
    rows, columns, logit_scale = operand(rows), operand(columns), logit_scale.float()
    M, N, D = len(rows), len(columns), rows.shape[1]
    tile, parameters = launch_parameters(rows)
    row_blocks, column_blocks = triton.cdiv(M, tile.rows), triton.cdiv(N, tile.columns)
    size = row_chunk(M, tile, 4 * (column_blocks * tile.rows + N))
    new = rows.new_empty
    row_partials = new((column_blocks, size), dtype=torch.float32)
    column_partials = new((size // tile.rows, N), dtype=torch.float32)
    own, row_lse, column_lse = (new(length, dtype=torch.float32) for length in (M, M, N))
    # One flag per program that finishes sums, so that none has to wait for another.
    column_programs = triton.cdiv(N, tile.rows)
    flags = new(row_blocks + column_programs, dtype=torch.int32)
    with on_device(rows):
        for start, stop in chunks(M, size):
            blocks = triton.cdiv(stop - start, tile.rows)
            _clip_loss_lse_kernel[(blocks * column_blocks,)](
                rows,
                columns,
                logit_scale,
                row_partials,
                column_partials,
                M,
                N,
                D,
                offset,
                start,
                stop,
                size,
                **parameters,
            )
            _clip_loss_sum_kernel[(blocks + column_programs,)](
                rows,
                columns,
                logit_scale,
                row_partials,
                column_partials,
                own,
                row_lse,
                column_lse,
                flags,
                M,
                N,
                D,
                offset,
                start,
                stop,
                size,
                column_blocks,
                blocks,
                BLOCK=tile.rows,
                BLOCK_D=tile.features,
                BLOCK_P=_PARTIALS,
            )
        for x, y, lse, shift in (
            (rows, columns, row_lse, offset),
            (columns, rows, column_lse, -offset),
        ):
            _clip_loss_online_lse_kernel[(triton.cdiv(len(x), tile.rows),)](
                x,
                y,
                logit_scale,
                flags,
                lse,
                len(x),
                len(y),
                D,
                shift,
                len(flags),
                BLOCK_F=_FLAGS,
                **parameters,
            )
    return own, row_lse, column_lse


def backward(
    d_own: Tensor,
    d_rows: Tensor,
    d_columns: Tensor,
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    offset: int,
    own: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    needs_rows: bool,
    needs_columns: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of rows and columns, over `logit_scale`, and of `logit_scale`, in fp32.

    They are products of the features with the gradient G of the logits, which is
    `d_rows_i exp(l_ij - row_lse_i) + d_columns_j exp(l_ij - column_lse_j)`, and d_own_i for own
    entries. Memory: a chunk of G in the dtype of the features, within the workspace.

    Args:
        d_own: Gradients of the own logits [M], fp32.
        d_rows: Gradients of the rows' log-sum-exps [M], fp32.
        d_columns: Gradients of the columns' log-sum-exps [N], fp32.
        rows: [M, D], fp32, bf16 or fp16.
        columns: [N, D], likewise.
        logit_scale: A 0-d tensor on the same device.
        offset: Row i's own column is i + offset.
        own: From `forward`; not needed here.
        row_lse: Log-sum-exps of the rows [M], at least over the columns here.
        column_lse: Log-sum-exps of the columns [N], at least over the rows here.
        needs_rows: Whether the gradient of the rows is wanted.
        needs_columns: Whether that of the columns is.

    Returns:
        `G @ columns` [M, D] and `G.T @ rows` [N, D], None where not wanted, and
        `sum(G * (rows @ columns.T))`, of a G that was not rounded; None if neither is wanted.
    """
    if not (needs_rows or needs_columns):
        return None, None, None
    rows, columns = rows.contiguous(), columns.contiguous()
    x, y = operand(rows), operand(columns)
    M, N, D = len(x), len(y), x.shape[1]
    tile, parameters = launch_parameters(rows)
    logit_scale = logit_scale.float()
    vectors = [v.contiguous() for v in (row_lse, column_lse, d_own, d_rows, d_columns)]
    height, width = gradient_chunk(rows, columns, tile)
    gradient = rows.new_empty((height, width))
    normalisers = rows.new_empty(3, dtype=torch.float32)
    products = Products(rows, columns, needs_rows, needs_columns)
    total = rows.new_zeros((), dtype=torch.float64)
    with on_device(rows):
        _clip_loss_range_kernel[(1,)](
            logit_scale,
            *vectors,
            normalisers,
            M,
            N,
            BOOST=gradient_boost(rows.dtype),
            BLOCK=_VECTOR,
            num_warps=8,
        )
        for row_start, row_stop in chunks(M, height):
            for column_start, column_stop in chunks(N, width):
                R, C = row_stop - row_start, column_stop - column_start
                programs = triton.cdiv(R, tile.rows) * triton.cdiv(C, tile.columns)
                sums = rows.new_empty(programs, dtype=torch.float32)
                _clip_loss_gradient_kernel[(programs,)](
                    x,
                    y,
                    logit_scale,
                    *vectors,
                    normalisers,
                    sums,
                    gradient,
                    M,
                    N,
                    D,
                    offset,
                    row_start,
                    row_stop,
                    column_start,
                    column_stop,
                    width,
                    PARTS=tile.parts,
                    **parameters,
                )
                total += sums.sum(dtype=torch.float64)
                products.add(gradient[:R, :C], row_start, column_start)
    return (*products.scaled(normalisers[1]), (total * normalisers[1]).float())


@triton.jit(do_not_specialize=SIZES)
def _clip_loss_lse_kernel(
    rows_ptr,
    columns_ptr,
    scale_ptr,
    row_partials_ptr,
    column_partials_ptr,
    M,
    N,
    D,
    offset,
    row_start,
    row_stop,
    stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store a tile's sums of exponentials: of its rows and of its columns, own entries left out."""
    row_block, column_block = tile_place(row_start, row_stop, 0, N, BLOCK_M, BLOCK_N)
    row, column = row_start + row_block * BLOCK_M, column_block * BLOCK_N
    product = tile_at(
        rows_ptr, columns_ptr, row, column, M, N, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
    )
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr)
    # In powers of two, which the hardware takes.
    logits = product * (scale * LOG2E) - _shift(scale) * LOG2E
    if is_plain(row, column, M, N, offset, BLOCK_M, BLOCK_N) == 0:
        logits = _without_own(logits, row, column, M, N, offset, BLOCK_M, BLOCK_N)
    exponentials = tl.exp2(logits)
    tl.store(
        row_partials_ptr + column_block.to(tl.int64) * stride + (row - row_start) + offs_m,
        tl.sum(exponentials, 1),
        mask=row + offs_m < M,
    )
    tl.store(
        column_partials_ptr + row_block.to(tl.int64) * N + column + offs_n,
        tl.sum(exponentials, 0),
        mask=column + offs_n < N,
    )


@triton.jit(do_not_specialize=SIZES)
def _clip_loss_sum_kernel(
    rows_ptr,
    columns_ptr,
    scale_ptr,
    row_partials_ptr,
    column_partials_ptr,
    own_ptr,
    row_lse_ptr,
    column_lse_ptr,
    flags_ptr,
    M,
    N,
    D,
    offset,
    row_start,
    row_stop,
    stride,
    column_blocks,
    row_blocks,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Turn the partial sums of a chunk of rows into log-sum-exps, and find the own logits.

    The first programs have BLOCK rows each, the others BLOCK columns. Columns' sums grow from chunk
    to chunk and become log-sum-exps after the last.
    """
    program = tl.program_id(0)
    scale = tl.load(scale_ptr)
    offs = tl.arange(0, BLOCK)
    if program < row_blocks:
        local = program * BLOCK + offs
        row = row_start + local
        mask_row = row < row_stop
        sums = _sum_of_partials(
            row_partials_ptr + local, column_blocks, stride, mask_row, BLOCK, BLOCK_P
        )
        flag = row_start // BLOCK + program
        _store_lse(row_lse_ptr + row, flags_ptr + flag, sums, mask_row, scale, M, N)
        own = row + offset
        has_own = mask_row & (own >= 0) & (own < N)
        logits = _own_products(rows_ptr, columns_ptr, row, own, has_own, D, BLOCK, BLOCK_D) * scale
        tl.store(own_ptr + row, tl.where(has_own, logits, -float("inf")), mask=mask_row)
    else:
        strip = program - row_blocks
        column = strip * BLOCK + offs
        mask_column = column < N
        sums = _sum_of_partials(
            column_partials_ptr + column, row_blocks, N, mask_column, BLOCK, BLOCK_P
        )
        # Before the last chunk these are sums, not yet their logarithms.
        sums += tl.load(column_lse_ptr + column, mask=mask_column & (row_start > 0), other=0.0)
        if row_stop == M:
            flag = tl.cdiv(M, BLOCK) + strip
            _store_lse(column_lse_ptr + column, flags_ptr + flag, sums, mask_column, scale, M, N)
        else:
            tl.store(column_lse_ptr + column, sums, mask=mask_column)


@triton.jit(do_not_specialize=SIZES)
def _clip_loss_online_lse_kernel(
    rows_ptr,
    columns_ptr,
    scale_ptr,
    flags_ptr,
    lse_ptr,
    M,
    N,
    D,
    offset,
    flags,
    BLOCK_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Where a flag is set: store the log-sum-exps of BLOCK_M rows, found with a running maximum."""
    if _any(flags_ptr, flags, BLOCK_F):
        row = tl.program_id(0) * BLOCK_M
        scale = tl.load(scale_ptr)
        highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        sums = tl.zeros((BLOCK_M,), tl.float32)
        for block in range(0, tl.cdiv(N, BLOCK_N)):
            column = block * BLOCK_N
            product = tile_at(
                rows_ptr, columns_ptr, row, column, M, N, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
            )
            logits = product * (scale * LOG2E)
            if is_plain(row, column, M, N, offset, BLOCK_M, BLOCK_N) == 0:
                logits = _without_own(logits, row, column, M, N, offset, BLOCK_M, BLOCK_N)
            before = highest
            highest = tl.maximum(highest, tl.max(logits, 1))
            shift = _finite(highest)
            sums = sums * tl.exp2(before - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        offs_m = row + tl.arange(0, BLOCK_M)
        tl.store(lse_ptr + offs_m, (_finite(highest) + tl.log2(sums)) * LN2, mask=offs_m < M)


@triton.jit(do_not_specialize=SIZES)
def _clip_loss_range_kernel(
    scale_ptr,
    row_lse_ptr,
    column_lse_ptr,
    d_own_ptr,
    d_rows_ptr,
    d_columns_ptr,
    normalisers_ptr,
    M,
    N,
    BOOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the factor that normalises the gradient, its inverse, and whether one shift suits.

    A single program: it reads M + N numbers a few times.
    """
    offs = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    misfits = tl.zeros((BLOCK,), tl.int32)
    scale = tl.load(scale_ptr)
    shift = _shift(scale)
    for start in range(0, tl.maximum(M, N), BLOCK):
        mask_m, mask_n = start + offs < M, start + offs < N
        largest = tl.maximum(largest, _magnitudes(d_own_ptr + start + offs, mask_m))
        largest = tl.maximum(largest, _magnitudes(d_rows_ptr + start + offs, mask_m))
        largest = tl.maximum(largest, _magnitudes(d_columns_ptr + start + offs, mask_n))
        row_lse = tl.load(row_lse_ptr + start + offs, mask=mask_m, other=0.0) - shift
        column_lse = tl.load(column_lse_ptr + start + offs, mask=mask_n, other=0.0) - shift
        misfits |= (mask_m & (_suits(tl.exp2(row_lse * LOG2E), M, N) == 0)).to(tl.int32)
        misfits |= (mask_n & (_suits(tl.exp2(column_lse * LOG2E), M, N) == 0)).to(tl.int32)
    normaliser = tl.maximum(tl.max(largest, 0), _LEAST_GRADIENT) / BOOST
    tl.store(normalisers_ptr, 1.0 / normaliser)
    tl.store(normalisers_ptr + 1, normaliser)
    does_not_suit = (tl.max(misfits, 0) > 0) | ((tl.abs(scale) <= _MAX_SCALE) == 0)
    tl.store(normalisers_ptr + 2, tl.where(does_not_suit, 1.0, 0.0))


@triton.jit(do_not_specialize=SIZES)
def _clip_loss_gradient_kernel(
    rows_ptr,
    columns_ptr,
    scale_ptr,
    row_lse_ptr,
    column_lse_ptr,
    d_own_ptr,
    d_rows_ptr,
    d_columns_ptr,
    normalisers_ptr,
    sums_ptr,
    gradient_ptr,
    M,
    N,
    D,
    offset,
    row_start,
    row_stop,
    column_start,
    column_stop,
    stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Store the normalised gradient of a tile's logits, and its sum with the products."""
    row_block, column_block = tile_place(
        row_start, row_stop, column_start, column_stop, BLOCK_M, BLOCK_N
    )
    row, column = row_start + row_block * BLOCK_M, column_start + column_block * BLOCK_N
    product = tile_at(
        rows_ptr, columns_ptr, row, column, M, N, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
    )
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    parts = side_by_side(product, BLOCK_M, BLOCK_N, PARTS)
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    factor = tl.load(normalisers_ptr)
    is_exact = tl.load(normalisers_ptr + 2) != 0.0
    scale = tl.load(scale_ptr)
    shift = _shift(scale) * LOG2E
    row_lse = tl.load(row_lse_ptr + offs_m, mask=mask_m, other=0.0) * LOG2E
    d_rows = tl.load(d_rows_ptr + offs_m, mask=mask_m, other=0.0) * factor
    row_weights = d_rows * tl.exp2(shift - row_lse)
    plain = is_plain(row, column, M, N, offset, BLOCK_M, BLOCK_N)
    # The chunk has room for whole tiles.
    gradient_ptr += (row - row_start).to(tl.int64) * stride + (column - column_start)
    local_m, local_n = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    gradient_ptrs = gradient_ptr + (local_m[:, None] * stride + local_n[None, :])
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for k in tl.static_range(PARTS):
        start = column + k * WIDTH
        offs_n = start + tl.arange(0, WIDTH)
        mask_n = offs_n < N
        column_lse = tl.load(column_lse_ptr + offs_n, mask=mask_n, other=0.0) * LOG2E
        d_columns = tl.load(d_columns_ptr + offs_n, mask=mask_n, other=0.0) * factor
        if is_exact:
            logits = parts[k] * (scale * LOG2E)
            gradient = tl.exp2(logits - row_lse[:, None]) * d_rows[:, None]
            gradient += tl.exp2(logits - column_lse[None, :]) * d_columns[None, :]
        else:
            weights = row_weights[:, None] + (d_columns * tl.exp2(shift - column_lse))[None, :]
            gradient = tl.exp2(parts[k] * (scale * LOG2E) - shift) * weights
        if plain == 0:
            # In fp32, before rounding: what a pair that wins by far leaves to the others is tiny.
            d_own = tl.load(d_own_ptr + offs_m, mask=mask_m, other=0.0) * factor
            own = is_own(row, start, offset, BLOCK_M, WIDTH)
            gradient = tl.where(own, d_own[:, None], gradient)
            inside = exists(row, start, M, N, BLOCK_M, WIDTH)
            gradient = tl.where(inside, gradient, 0.0)
        sums += tl.sum(gradient * parts[k], 1)
        tl.store(gradient_ptrs + k * WIDTH, gradient.to(gradient_ptr.dtype.element_ty))
    tl.store(sums_ptr + tl.program_id(0), total_of(sums, BLOCK_M))


@triton.jit
def _shift(scale):
    """Return the constant that is subtracted from every logit."""
    return tl.maximum(tl.abs(scale) - _HEADROOM, 0.0)


@triton.jit
def _without_own(logits, row, column, M, N, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a tile's logits with -inf for own entries and beyond the rectangle."""
    own = is_own(row, column, offset, BLOCK_M, BLOCK_N)
    is_other = exists(row, column, M, N, BLOCK_M, BLOCK_N) & (own == 0)
    return tl.where(is_other, logits, -float("inf"))


@triton.jit
def _finite(highest):
    """Return a maximum, or 0 where there is none yet: -inf - -inf is no number."""
    return tl.where(highest == -float("inf"), 0.0, highest)


@triton.jit
def _sum_of_partials(ptrs, count, stride, mask, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return the sums of `count` partial sums that lie `stride` apart, in a fixed order."""
    sums = tl.zeros((BLOCK,), tl.float32)
    offs = tl.arange(0, BLOCK_P)
    for start in range(0, count, BLOCK_P):
        ptrs_p = ptrs[None, :] + (start + offs)[:, None].to(tl.int64) * stride
        mask_p = (start + offs < count)[:, None] & mask[None, :]
        sums += tl.sum(tl.load(ptrs_p, mask=mask_p, other=0.0), 0)
    return sums


@triton.jit
def _store_lse(lse_ptrs, flag_ptr, sums, mask, scale, M, N):
    """Store log-sum-exps, and whether any of their sums is not what one shift gives exactly."""
    tl.store(lse_ptrs, tl.log(sums) + _shift(scale), mask=mask)
    misfits = (mask & (_suits(sums, M, N) == 0)).to(tl.int32)
    does_not_suit = (tl.max(misfits, 0) > 0) | ((tl.abs(scale) <= _MAX_SCALE) == 0)
    tl.store(flag_ptr, does_not_suit.to(tl.int32))


@triton.jit
def _suits(sums, M, N):
    """Return whether sums lie where one shift is exact; false for NaN."""
    return (sums >= tl.maximum(M, N) * _SMALLEST_PER_TERM) & (sums <= _LARGEST)


@triton.jit
def _own_products(
    rows_ptr, columns_ptr, row, own, mask, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Return the product of each row with its own column; 0 where the mask is false."""
    offs_d = tl.arange(0, BLOCK_D)
    x_ptrs = rows_ptr + row[:, None].to(tl.int64) * D + offs_d[None, :]
    y_ptrs = columns_ptr + own[:, None].to(tl.int64) * D + offs_d[None, :]
    products = tl.zeros((BLOCK,), tl.float32)
    for d in range(0, D, BLOCK_D):
        mask_d = mask[:, None] & (offs_d[None, :] < D - d)
        x = tl.load(x_ptrs + d, mask=mask_d, other=0.0).to(tl.float32)
        y = tl.load(y_ptrs + d, mask=mask_d, other=0.0).to(tl.float32)
        products += tl.sum(x * y, 1)
    return products


@triton.jit
def _magnitudes(ptrs, mask):
    return tl.abs(tl.load(ptrs, mask=mask, other=0.0))


@triton.jit
def _any(flags_ptr, count, BLOCK_F: tl.constexpr):
    """Return whether any of `count` flags is set."""
    found = tl.zeros((BLOCK_F,), tl.int32)
    offs = tl.arange(0, BLOCK_F)
    for start in range(0, count, BLOCK_F):
        found |= tl.load(flags_ptr + start + offs, mask=start + offs < count, other=0)
    return tl.max(found, 0) > 0
