"""clip_loss on a GPU with csrc's kernels: the algorithm of `triton`, for bf16 and fp16.

On sm_90 a block keeps the features of its 128 rows in shared memory, up to 512 of them each, while
those of the columns stream through, and its products and exponentials overlap.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from medfast import _CUDA
from medfast.ops.triton_tiles import (
    Products,
    Tile,
    chunks,
    gradient_boost,
    gradient_chunk,
    multiprocessors,
    on_device,
    row_chunk,
)

# The rows and columns that csrc counts in; its warps and stages are its own affair.
_TILE = Tile(rows=128, columns=128, features=64, warps=8, stages=2)
# Copies are of 16 bytes: what rows must be multiples of, and where the first must lie.
_ALIGNMENT = 16
# csrc/cuda/launch.h
_DTYPES = {torch.bfloat16: 1, torch.float16: 2}
# To start a block costs about as much as a tile.
_START = 1


def forward(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's own logit and the log-sum-exps of rows and columns over all others.

    The logits are `logit_scale * rows @ columns.T`, summed in fp32 and never kept. Memory: M + N
    sums per 128 rows or less, in chunks within the workspace.

    Args:
        rows: [M, D], bf16 or fp16.
        columns: [N, D], likewise.
        logit_scale: A 0-d tensor on the same device.
        offset: Row i's own column is i + offset, which need not exist.

    Returns:
        The own logits [M], the log-sum-exps of the rows [M] and of the columns [N], in fp32; -inf
        where there is no own logit or no other.
    """
    rows, columns, scale = operand(rows), operand(columns), logit_scale.float()
    M, N = len(rows), len(columns)
    row_blocks, column_blocks = (-(-length // 128) for length in (M, N))
    features = _features(rows, columns, scale, offset)
    own, row_lse, column_lse = (rows.new_empty(n, dtype=torch.float32) for n in (M, M, N))
    flags = rows.new_empty(row_blocks + column_blocks, dtype=torch.int32)
    with on_device(rows):
        stream = _stream(rows)
        # No more parts than column blocks, so that these sums take this at most.
        size = row_chunk(M, _TILE, 4 * (column_blocks * 128 + N))
        most = parts(-(-min(size, M) // 128), column_blocks, _slots(rows))
        row_partials = rows.new_empty((most, size), dtype=torch.float32)
        column_partials = rows.new_empty((size // 128, N), dtype=torch.float32)
        partials = (row_partials.data_ptr(), size, column_partials.data_ptr())
        for start, stop in chunks(M, size):
            span = _CUDA.ClipLossSpan(start, stop, 0, N, most)
            _CUDA.clip_loss_sums(features, span, *partials, stream)
            _CUDA.clip_loss_ends(
                features,
                span,
                *partials,
                own.data_ptr(),
                row_lse.data_ptr(),
                column_lse.data_ptr(),
                flags.data_ptr(),
                stream,
            )
        _CUDA.clip_loss_online(
            features, flags.data_ptr(), row_lse.data_ptr(), column_lse.data_ptr(), stream
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
        rows: [M, D], bf16 or fp16.
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
    x, y, scale = operand(rows), operand(columns), logit_scale.float()
    M, N = len(x), len(y)
    features = _features(x, y, scale, offset)
    vectors = [v.contiguous() for v in (row_lse, column_lse, d_own, d_rows, d_columns)]
    upstream = _CUDA.ClipLossUpstream(*(v.data_ptr() for v in vectors))
    height, width = gradient_chunk(rows, columns, _TILE)
    gradient = rows.new_empty((height, width))
    normalisers = rows.new_empty(3, dtype=torch.float32)
    products = Products(rows, columns, needs_rows, needs_columns)
    total = rows.new_zeros((), dtype=torch.float64)
    with on_device(rows):
        stream = _stream(rows)
        boost = gradient_boost(rows.dtype)
        _CUDA.clip_loss_range(features, upstream, boost, normalisers.data_ptr(), stream)
        for row_start, row_stop in chunks(M, height):
            for column_start, column_stop in chunks(N, width):
                R, C = row_stop - row_start, column_stop - column_start
                blocks = -(-R // 128), -(-C // 128)
                count = parts(*blocks, _slots(rows))
                sums = rows.new_empty(count * blocks[0], dtype=torch.float64)
                _CUDA.clip_loss_gradient(
                    features,
                    _CUDA.ClipLossSpan(row_start, row_stop, column_start, column_stop, count),
                    upstream,
                    normalisers.data_ptr(),
                    gradient.data_ptr(),
                    width,
                    sums.data_ptr(),
                    stream,
                )
                total += sums.sum()
                products.add(gradient[:R, :C], row_start, column_start)
    return (*products.scaled(normalisers[1]), (total * normalisers[1]).float())


def operand(features: Tensor) -> Tensor:
    """Return features [B, D] as the kernels take them: contiguous, and in whole pieces to copy."""
    missing = -features.shape[1] % (_ALIGNMENT // features.element_size())
    if missing:
        return F.pad(features, (0, missing))
    features = features.contiguous()
    return features.clone() if features.data_ptr() % _ALIGNMENT else features


@functools.lru_cache(maxsize=64)
def parts(row_blocks: int, column_blocks: int, slots: int) -> int:
    """Return how many blocks should share the tiles of 128 rows, to keep `slots` of them busy."""
    # A block of `tiles` tiles takes about as long as these and its start.
    counts = range(1, min(column_blocks, slots) + 1)
    return min(
        counts,
        key=lambda count: -(-row_blocks * count // slots) * (-(-column_blocks // count) + _START),
    )


def _features(rows: Tensor, columns: Tensor, scale: Tensor, offset: int) -> _CUDA.ClipLossFeatures:
    return _CUDA.ClipLossFeatures(
        rows.data_ptr(),
        columns.data_ptr(),
        _DTYPES[rows.dtype],
        scale.data_ptr(),
        len(rows),
        len(columns),
        rows.shape[1],
        offset,
    )


def _slots(features: Tensor) -> int:
    """Return how many blocks the device runs at a time."""
    return multiprocessors(features.device) * _CUDA.clip_loss_blocks_at_a_time()


def _stream(features: Tensor) -> int:
    return torch.cuda.current_stream(features.device).cuda_stream
