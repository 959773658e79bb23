# mypy: allow-untyped-defs
"""siglip_loss on a GPU, its gradient included: tile by tile, in Triton.

The gradient of a logit needs nothing but that logit, so the forward forms it: three products of
this size in place of four.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medfast.ops.triton_tiles import (
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
    log1p,
    on_device,
    operand,
    row_chunk,
    side_by_side,
    tile_at,
    tile_place,
    total_of,
)

# Sums that a program stores: of the losses, of the gradient, of the gradient times the products.
_SUMS = 3


def forward(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    needs_rows: bool,
    needs_columns: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Return the sum of all losses and its gradients of rows, columns, scale and bias, in fp32.

    With `t_ij = logit_scale * rows_i . columns_j + logit_bias` and z_ij = 1 for own entries, else
    -1, an entry costs `softplus(-z t)` and the gradient of its logit is `G = -z sigmoid(-z t)`.
    Memory: a chunk of G in the dtype of the features, within the workspace.

    Args:
        rows: [M, D], fp32, bf16 or fp16.
        columns: [N, D], likewise.
        logit_scale: A 0-d tensor on the same device.
        logit_bias: Likewise.
        offset: Row i's own column is i + offset, which need not exist.
        needs_rows: Whether the product of G with the columns is wanted.
        needs_columns: Whether the product of G with the rows is wanted.

    Returns:
        The sum of the losses; `G @ columns` [M, D] and `G.T @ rows` [N, D], which are the gradients
        of rows and columns over the scale, None where not wanted; the sums of
        `G * (rows @ columns.T)` and of G.
    """
    rows, columns = rows.contiguous(), columns.contiguous()
    x, y = operand(rows), operand(columns)
    logit_scale, logit_bias = logit_scale.float(), logit_bias.float()
    M, N, D = len(x), len(y), x.shape[1]
    tile, parameters = launch_parameters(rows)
    needs_gradient = needs_rows or needs_columns
    if needs_gradient:
        height, width = gradient_chunk(rows, columns, tile)
        gradient = rows.new_empty((height, width))
    else:
        sums_per_row_block = _SUMS * triton.cdiv(N, tile.columns)
        height, width = row_chunk(M, tile, 4 * sums_per_row_block), N
        gradient = rows
    boost = gradient_boost(rows.dtype)
    products = Products(rows, columns, needs_rows, needs_columns)
    totals = rows.new_zeros(_SUMS, dtype=torch.float64)
    with on_device(rows):
        for row_start, row_stop in chunks(M, height):
            for column_start, column_stop in chunks(N, width):
                R, C = row_stop - row_start, column_stop - column_start
                programs = triton.cdiv(R, tile.rows) * triton.cdiv(C, tile.columns)
                sums = rows.new_empty((_SUMS, programs), dtype=torch.float32)
                _siglip_loss_kernel[(programs,)](
                    x,
                    y,
                    logit_scale,
                    logit_bias,
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
                    width if needs_gradient else 0,
                    BOOST=boost,
                    NEEDS_GRADIENT=needs_gradient,
                    PARTS=tile.parts,
                    **parameters,
                )
                totals += sums.sum(1, dtype=torch.float64)
                if needs_gradient:
                    products.add(gradient[:R, :C], row_start, column_start)
    loss, g_bias, g_scale = (total.float() for total in totals)
    of_rows, of_columns = products.scaled(1 / boost)
    return loss, of_rows, of_columns, g_scale, g_bias


@triton.jit(do_not_specialize=SIZES)
def _siglip_loss_kernel(
    rows_ptr,
    columns_ptr,
    scale_ptr,
    bias_ptr,
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
    BOOST: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Store a tile's three sums and, where needed, the gradient of its logits times BOOST."""
    row_block, column_block = tile_place(
        row_start, row_stop, column_start, column_stop, BLOCK_M, BLOCK_N
    )
    row, column = row_start + row_block * BLOCK_M, column_start + column_block * BLOCK_N
    product = tile_at(
        rows_ptr, columns_ptr, row, column, M, N, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
    )
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    plain = is_plain(row, column, M, N, offset, BLOCK_M, BLOCK_N)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    parts = side_by_side(product, BLOCK_M, BLOCK_N, PARTS)
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    gradient_ptr += (row - row_start).to(tl.int64) * stride + (column - column_start)
    gradient_ptrs = gradient_ptr + (offs_m[:, None] * stride + offs_n[None, :])
    losses = tl.zeros((BLOCK_M,), tl.float32)
    gradients = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    for k in tl.static_range(PARTS):
        logits = parts[k] * scale + bias
        if plain == 0:
            own = is_own(row, column + k * WIDTH, offset, BLOCK_M, WIDTH)
            inside = exists(row, column + k * WIDTH, M, N, BLOCK_M, WIDTH)
            # At -inf neither the loss nor the gradient is anything but 0.
            logits = tl.where(inside, tl.where(own, -logits, logits), -float("inf"))
        decay = tl.exp2(tl.abs(logits) * -LOG2E)
        losses += tl.sum(tl.maximum(logits, 0.0) + log1p(decay), 1)
        gradient = tl.where(logits >= 0.0, 1.0, decay) / (1.0 + decay)
        if plain == 0:
            own = is_own(row, column + k * WIDTH, offset, BLOCK_M, WIDTH)
            gradient = tl.where(own, -gradient, gradient)
        gradients += tl.sum(gradient, 1)
        weighted += tl.sum(gradient * parts[k], 1)
        if NEEDS_GRADIENT:
            # The chunk has room for whole tiles.
            tl.store(
                gradient_ptrs + k * WIDTH, (gradient * BOOST).to(gradient_ptr.dtype.element_ty)
            )
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(sums_ptr + program, total_of(losses, BLOCK_M))
    tl.store(sums_ptr + programs + program, total_of(gradients, BLOCK_M))
    tl.store(sums_ptr + 2 * programs + program, total_of(weighted, BLOCK_M))
