# mypy: allow-untyped-defs
"""What the Triton kernels share: the product of a tile, its place, launch parameters, chunks.

A kernel's program computes one tile of the logits of M rows against N columns. Letters: D features,
R x C the chunk of the rectangle that one launch covers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from medfast.ops.workspace import workspace_bytes

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Arguments that change from call to call: no kernel is compiled anew for another value.
SIZES = [
    "M",
    "N",
    "offset",
    "row_start",
    "row_stop",
    "column_start",
    "column_stop",
    "row_blocks",
    "column_blocks",
    "flags",
]

# Row blocks that run side by side: programs in flight share the features that they load in L2.
_GROUP = tl.constexpr(16)


@dataclass(frozen=True)
class Tile:
    """The size of a program's tile and how it is compiled."""

    rows: int
    columns: int
    features: int
    warps: int
    stages: int
    # Into how many parts an epilogue with temporaries divides the tile.
    parts: int = 4


# In half precision two programs fit on a multiprocessor of 80 or 90, in registers and in shared
# memory, so that one multiplies while the other is at its exponentials.
_TILES = {
    ("half", 80): Tile(128, 128, 32, warps=4, stages=4),
    ("half", 90): Tile(128, 128, 64, warps=4, stages=3),
    ("half", 100): Tile(128, 128, 64, warps=8, stages=3),
    ("tf32", 80): Tile(128, 128, 32, warps=8, stages=3),
    ("tf32", 90): Tile(128, 128, 32, warps=8, stages=3),
    ("tf32", 100): Tile(128, 128, 32, warps=8, stages=3),
    # Multiplied without tensor cores.
    ("ieee", 80): Tile(64, 64, 16, warps=4, stages=3),
    ("ieee", 90): Tile(64, 64, 16, warps=4, stages=3),
    ("ieee", 100): Tile(64, 64, 16, warps=4, stages=3),
}
# Under the interpreter: small, so that small inputs have many tiles, and not square.
_INTERPRETED = Tile(32, 64, 64, warps=4, stages=1, parts=2)


# Kernels load 16 bytes at a time where rows start at multiples of 16 features.
_ALIGNMENT = 16


def tile_of(precision: str, architecture: int) -> Tile:
    """Return the tile for a precision ("half", "tf32" or "ieee") on an architecture."""
    return _TILES[precision, architecture]


def launch_parameters(features: Tensor) -> tuple[Tile, dict[str, Any]]:
    """Return the tile for `features` [B, D] and the keyword arguments that launch it."""
    precision = precision_of(features)
    device = features.device
    tile = tile_of(precision, architecture_of(device)) if features.is_cuda else _INTERPRETED
    return tile, constants(tile, precision)


def constants(tile: Tile, precision: str) -> dict[str, Any]:
    """Return the compile-time arguments of every kernel that multiplies tiles."""
    return {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_D": tile.features,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def precision_of(features: Tensor) -> str:
    """Return how the features are multiplied: "half", "tf32" or "ieee"."""
    if features.dtype != torch.float32:
        return "half"
    # As torch.mm, and whichever way the user set it: get_float32_matmul_precision raises after
    # this setting was used.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@functools.cache
def architecture_of(device: torch.device) -> int:
    """Return 80, 90 or 100, whose tables of tiles suit the device."""
    major, _ = torch.cuda.get_device_capability(device)
    # 12 is newer than 10 but has the instructions and the shared memory of 8.
    return major * 10 if major in (9, 10) else 80


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many of them the GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def operand(features: Tensor) -> Tensor:
    """Return features [B, D] as the kernels take them: contiguous, D padded to a multiple of 16."""
    missing = -features.shape[1] % _ALIGNMENT
    return F.pad(features, (0, missing)) if missing else features.contiguous()


def on_device(features: Tensor) -> AbstractContextManager[Any]:
    """Make the device of the features current: that is where Triton launches."""
    return torch.cuda.device(features.device) if features.is_cuda else nullcontext()


def chunks(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the starts and stops of slices of at most `size` entries."""
    for start in range(0, length, size):
        yield start, min(start + size, length)


def row_chunk(M: int, tile: Tile, bytes_per_row_block: int) -> int:
    """Return how many rows a launch may cover, in whole tiles, within the workspace."""
    blocks = max(1, workspace_bytes() // bytes_per_row_block)
    return min(blocks, triton.cdiv(M, tile.rows)) * tile.rows


def gradient_chunk(rows: Tensor, columns: Tensor, tile: Tile) -> tuple[int, int]:
    """Return how many rows and columns of a gradient to keep at a time, in whole tiles.

    They fit the workspace, or are a single tile, and suit the products that follow: a library
    multiplies in tiles of 128 x 256, and rows that fill a GPU's multiprocessors a whole number of
    times leave none idle. All columns at once is best, since every further band of columns is a
    further pass over the rows' product, and every chunk of rows one over the columns'.
    """
    budget = workspace_bytes() // rows.element_size()
    M = triton.cdiv(len(rows), tile.rows) * tile.rows
    N = triton.cdiv(len(columns), tile.columns) * tile.columns
    unit = tile.rows
    if rows.is_cuda:
        count, across = multiprocessors(rows.device), triton.cdiv(rows.shape[1], 256)
        unit = 128 * count // math.gcd(count, across)
    most = budget // N
    if most >= M:
        return M, N
    if most >= unit:
        return most // unit * unit, N
    side = max(tile.rows, math.isqrt(budget) // tile.rows * tile.rows)
    height = min(M, unit, side)
    width = max(tile.columns, budget // height // tile.columns * tile.columns)
    # Bands of about equal width.
    bands = triton.cdiv(N, width)
    return height, triton.cdiv(triton.cdiv(N, bands), tile.columns) * tile.columns


class Products:
    """The products of a gradient with the features, in fp32, summed over its chunks.

    Args:
        rows: [M, D].
        columns: [N, D].
        needs_rows: Whether the product with the columns' features, [M, D], is wanted.
        needs_columns: Whether the product with the rows' features, [N, D], is wanted.
    """

    def __init__(
        self, rows: Tensor, columns: Tensor, needs_rows: bool, needs_columns: bool
    ) -> None:
        self._rows, self._columns = rows, columns
        self.of_rows = torch.empty_like(rows, dtype=torch.float32) if needs_rows else None
        self.of_columns = torch.empty_like(columns, dtype=torch.float32) if needs_columns else None

    def add(self, gradient: Tensor, row_start: int, column_start: int) -> None:
        """Add the share of a chunk of the gradient, [R, C] in the dtype of the features."""
        r = slice(row_start, row_start + gradient.shape[0])
        c = slice(column_start, column_start + gradient.shape[1])
        if self.of_rows is not None:
            _product_into(self.of_rows[r], gradient, self._columns[c], column_start > 0)
        if self.of_columns is not None:
            _product_into(self.of_columns[c], gradient.T, self._rows[r], row_start > 0)

    def scaled(self, factor: Tensor | float) -> tuple[Tensor | None, Tensor | None]:
        """Multiply both by a factor, in place, and return them."""
        for product in (self.of_rows, self.of_columns):
            if product is not None and (isinstance(factor, Tensor) or factor != 1):
                product.mul_(factor)
        return self.of_rows, self.of_columns


def _product_into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """Write `a @ b` to `out`, in fp32, or add it."""
    if a.dtype == torch.float32 or not a.is_cuda:
        a, b = a.float(), b.float()
        if accumulate:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def gradient_boost(dtype: torch.dtype) -> float:
    """Return the power of two that brings gradients of at most about 1 into a dtype's range.

    fp16 holds nothing below 2**-24, where those of large batches lie; bf16 reaches as far as fp32.
    """
    return 2.0**12 if dtype == torch.float16 else 1.0


@triton.jit
def tile_product(
    x_ptr,
    y_ptr,
    offs_x,
    offs_y,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return `x @ y.T` in fp32 of the rows `offs_x` of x and `offs_y` of y, which must exist.

    Every entry is summed in the same order, wherever in a tile it lies.
    """
    offs_d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + (offs_x[:, None] * D + offs_d[None, :])
    y_ptrs = y_ptr + (offs_y[:, None] * D + offs_d[None, :])
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_D):
        mask_d = offs_d[None, :] < D - d
        x = tl.load(x_ptrs, mask=mask_d, other=0.0)
        y = tl.load(y_ptrs, mask=mask_d, other=0.0)
        product = tl.dot(x, tl.trans(y), product, input_precision=PRECISION)
        x_ptrs += BLOCK_D
        y_ptrs += BLOCK_D
    return product


@triton.jit
def tile_at(
    rows_ptr,
    columns_ptr,
    row,
    column,
    M,
    N,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the products of the tile whose first entry is at `row` and `column`.

    Beyond the last row and column it repeats them: loads without a mask, and entries to be ignored.
    """
    # The start of a tile is int64: M * D passes 2**31 at four million rows of 512.
    return tile_product(
        rows_ptr + row.to(tl.int64) * D,
        columns_ptr + column.to(tl.int64) * D,
        tl.minimum(tl.arange(0, BLOCK_M), M - 1 - row),
        tl.minimum(tl.arange(0, BLOCK_N), N - 1 - column),
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
    )


@triton.jit
def tile_place(
    row_start,
    row_stop,
    column_start,
    column_stop,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return the block of rows and the block of columns, within the chunk, of this program."""
    row_blocks = tl.cdiv(row_stop - row_start, BLOCK_M)
    column_blocks = tl.cdiv(column_stop - column_start, BLOCK_N)
    index = tl.program_id(0)
    first = index // (_GROUP * column_blocks) * _GROUP
    within = index % (_GROUP * column_blocks)
    height = tl.minimum(row_blocks - first, _GROUP)
    return first + within % height, within // height


@triton.jit
def is_own(row, column, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return which entries of the tile whose first entry is at `row`, `column` are own ones."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    return (row + offset + offs_m)[:, None] == (column + offs_n)[None, :]


@triton.jit
def exists(row, column, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return which entries of that tile lie within the rectangle."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    return (row + offs_m < M)[:, None] & (column + offs_n < N)[None, :]


@triton.jit
def is_plain(row, column, M, N, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return whether that tile has no own entry and does not reach beyond the rectangle.

    Nearly all do, and need no masks.
    """
    is_inside = (row + BLOCK_M <= M) & (column + BLOCK_N <= N)
    is_off = (row + offset >= column + BLOCK_N) | (row + offset + BLOCK_M <= column)
    return is_inside & is_off


@triton.jit
def side_by_side(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Return a tile's PARTS equal parts, from left to right.

    What takes more than a temporary per entry works on one after the other: the temporaries of a
    whole tile exceed the registers.
    """
    if PARTS == 1:
        return (tile,)
    else:
        halves = tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        parts = side_by_side(left, BLOCK_M, BLOCK_N // 2, PARTS // 2)
        return parts + side_by_side(right, BLOCK_M, BLOCK_N // 2, PARTS // 2)


@triton.jit
def total_of(sums, BLOCK_M: tl.constexpr):
    """Return the total of a tile's sums over its rows."""
    # Reshaped since Triton 3.6 fails to compile a sum of sums for sm_100.
    return tl.sum(tl.reshape(sums, (BLOCK_M // 32, 32)))


@triton.jit
def log1p(x):
    """Return log(1 + x) for x in [0, 1], relatively as exact as fp32, however small x is.

    A minimax polynomial: log(1 + x) itself rounds to 0 below 2^-24, where the losses of the many
    pairs that do not belong together lie.
    """
    p = x * 0.005232691299170256 - 0.029505226761102676
    p = p * x + 0.07822593301534653
    p = p * x - 0.13663244247436523
    p = p * x + 0.19106006622314453
    p = p * x - 0.2484298199415207
    p = p * x + 0.3331909775733948
    p = p * x - 0.4999949336051941
    p = p * x + 0.9999999403953552
    return p * x
