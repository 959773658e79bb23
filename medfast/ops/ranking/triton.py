# mypy: allow-untyped-defs
"""retrieval_rank on a GPU: scores against the target's, counted tile by tile, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medfast.ops.triton_tiles import (
    SIZES,
    chunks,
    exists,
    launch_parameters,
    on_device,
    operand,
    row_chunk,
    tile_at,
    tile_place,
    tile_product,
)


def ranks(query: Tensor, gallery: Tensor, target: Tensor) -> Tensor:
    """Return how many other gallery rows score at least as high as each query's target.

    Scores are dot products, summed in fp32 and never kept; those of equal gallery rows are equal
    bit for bit. One that is NaN counts as higher, and so does every one where the target's is NaN.
    Memory: N counts per 128 gallery rows, in chunks within the workspace.

    Args:
        query: [N, D], fp32, bf16 or fp16.
        gallery: [M, D], likewise.
        target: The gallery row that belongs to each query, int64 [N].

    Returns:
        The ranks, int64 [N]; 0 is best, and M for a target that is no gallery row.
    """
    return _ranks(query, gallery, target, both=False)[0]


def paired_ranks(query: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ranks of pairs in both directions, from one pass over the scores.

    Args:
        query: [N, D], fp32, bf16 or fp16; row i belongs to gallery row i.
        gallery: [N, D], likewise.

    Returns:
        The ranks of each query's and of each gallery row's partner, both int64 [N]; see `ranks`.
    """
    target = torch.arange(len(query), device=query.device)
    of_queries, of_gallery = _ranks(query, gallery, target, both=True)
    return of_queries, of_gallery


def _ranks(query: Tensor, gallery: Tensor, target: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    query, gallery, target = operand(query), operand(gallery), target.contiguous()
    M, N, D = len(query), len(gallery), query.shape[1]
    tile, parameters = launch_parameters(query)
    column_blocks = triton.cdiv(N, tile.columns)
    size = row_chunk(M, tile, 4 * (column_blocks * tile.rows + (N if both else 0)))
    thresholds = query.new_empty(M, dtype=torch.float32)
    row_counts = query.new_empty((column_blocks, size), dtype=torch.int32)
    column_counts = query.new_empty((size // tile.rows, N) if both else 0, dtype=torch.int32)
    of_rows = query.new_empty(M, dtype=torch.int64)
    of_columns = query.new_zeros(N if both else 0, dtype=torch.int64)
    with on_device(query):
        _retrieval_target_kernel[(triton.cdiv(M, tile.rows),)](
            query, gallery, target, thresholds, M, N, D, **parameters
        )
        for start, stop in chunks(M, size):
            blocks = triton.cdiv(stop - start, tile.rows)
            _retrieval_rank_kernel[(blocks * column_blocks,)](
                query,
                gallery,
                target,
                thresholds,
                row_counts,
                column_counts,
                M,
                N,
                D,
                start,
                stop,
                size,
                BOTH=both,
                **parameters,
            )
            of_rows[start:stop] = row_counts[:, : stop - start].sum(0)
            if both:
                of_columns += column_counts[:blocks].sum(0)
    return of_rows, of_columns


@triton.jit(do_not_specialize=SIZES)
def _retrieval_target_kernel(
    query_ptr,
    gallery_ptr,
    target_ptr,
    thresholds_ptr,
    M,
    N,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the target's score of BLOCK_M queries: the diagonal of a product as the others are."""
    row = tl.program_id(0) * BLOCK_M
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_n = (offs_n < BLOCK_M) & (row + offs_n < M)
    target = tl.load(target_ptr + row + offs_n, mask=mask_n, other=0)
    is_row = (target >= 0) & (target < N)
    product = tile_product(
        query_ptr + row.to(tl.int64) * D,
        gallery_ptr,
        tl.minimum(offs_m, M - 1 - row),
        tl.where(is_row, target, 0),
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
    )
    product = tl.where(is_row[None, :], product, float("nan"))
    scores = tl.sum(tl.where(offs_m[:, None] == offs_n[None, :], product, 0.0), 0)
    tl.store(thresholds_ptr + row + offs_n, scores, mask=mask_n)


@triton.jit(do_not_specialize=SIZES)
def _retrieval_rank_kernel(
    query_ptr,
    gallery_ptr,
    target_ptr,
    thresholds_ptr,
    row_counts_ptr,
    column_counts_ptr,
    M,
    N,
    D,
    row_start,
    row_stop,
    stride,
    BOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store how many scores of a tile are not below its rows' thresholds, nor its columns'."""
    row_block, column_block = tile_place(row_start, row_stop, 0, N, BLOCK_M, BLOCK_N)
    row, column = row_start + row_block * BLOCK_M, column_block * BLOCK_N
    scores = tile_at(
        query_ptr, gallery_ptr, row, column, M, N, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
    )
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    target = tl.load(target_ptr + offs_m, mask=mask_m, other=0)
    # 64 bits would double the registers of a comparison.
    target = tl.where((target >= 0) & (target < N), target, -1).to(tl.int32)
    is_other = exists(row, column, M, N, BLOCK_M, BLOCK_N) & (target[:, None] != offs_n[None, :])
    thresholds = tl.load(thresholds_ptr + offs_m, mask=mask_m, other=0.0)
    # Not "at least": what NaN is compared with is neither.
    counted = is_other & ((scores < thresholds[:, None]) == 0)
    tl.store(
        row_counts_ptr + column_block.to(tl.int64) * stride + (offs_m - row_start),
        tl.sum(counted.to(tl.int32), 1),
        mask=mask_m,
    )
    if BOTH:
        thresholds = tl.load(thresholds_ptr + offs_n, mask=mask_n, other=0.0)
        counted = is_other & ((scores < thresholds[None, :]) == 0)
        tl.store(
            column_counts_ptr + row_block.to(tl.int64) * N + offs_n,
            tl.sum(counted.to(tl.int32), 0),
            mask=mask_n,
        )
