"""The tile engine: rows of one set of features against the columns of another, tile by tile.

The global losses and the retrieval ranks are all passes over the logits of a rectangle, M rows by
N columns, that is too large to keep. Row i may have one own column, i + offset: its pair. Letters:
R x C is a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medfast.ops import matmul
from medfast.ops.matmul import matmul_into
from medfast.ops.workspace import workspace_bytes

# On a CPU, tiles that stay in the last level of cache and yet give efficient products.
_CPU_ROWS = 1024
_CPU_COLUMNS = 4096
# A tile of logits and one of its gradient or of temporaries.
_LIVE_TILES = 2


@dataclass(frozen=True)
class Tile:
    """A tile of the rectangle and the features that it comes from."""

    rows: slice
    columns: slice
    row_features: Tensor  # [R, D]
    column_features: Tensor  # [C, D]
    logits: Tensor  # [R, C]

    def own(self, values: Tensor, offset: int) -> Tensor:
        """Return the view of a tile's `values` [R, C] at own entries; often empty."""
        return values.diagonal(self.rows.start + offset - self.columns.start)

    def own_rows(self, offset: int) -> slice:
        """Return the rows, of all M, that `own` is about."""
        start = max(self.rows.start, self.columns.start - offset)
        stop = min(self.rows.stop, self.columns.stop - offset)
        return slice(start, max(start, stop))


def summable(features: Tensor) -> torch.dtype:
    """Return the dtype of sums over `features`: fp32, or fp64 for fp64."""
    return torch.promote_types(features.dtype, torch.float32)


def fits_workspace(rows: Tensor, columns: Tensor) -> bool:
    """Return whether the logits of all pairs may be kept from the forward to the backward."""
    return len(rows) * len(columns) * summable(rows).itemsize <= workspace_bytes()


def tiles(
    rows: Tensor, columns: Tensor, scale: Tensor | float, kept: Tensor | None = None
) -> Iterator[Tile]:
    """Yield all tiles, one band of columns after the other; a tile's memory is used again.

    Args:
        rows: [M, D].
        columns: [N, D].
        scale: Factor of the logits.
        kept: Where the logits go, [M, N]; None for a buffer of one tile.
    """
    yield from _walk(rows, columns, scale, kept, is_known=False)


def kept_tiles(rows: Tensor, columns: Tensor, kept: Tensor) -> Iterator[Tile]:
    """Yield the tiles of what an earlier walk has left in `kept` [M, N], most often logits."""
    yield from _walk(rows, columns, 1.0, kept, is_known=True)


def _walk(
    rows: Tensor, columns: Tensor, scale: Tensor | float, kept: Tensor | None, is_known: bool
) -> Iterator[Tile]:
    row_size, column_size = tile_shape(rows, columns)
    dtype = summable(rows)
    buffer = None if kept is not None else rows.new_empty(row_size * column_size, dtype=dtype)
    for band in blocks(len(columns), column_size):
        y = operand(columns[band])
        for part in blocks(len(rows), row_size):
            x = operand(rows[part])
            if buffer is None:
                assert kept is not None
                logits = kept[part, band]
            else:
                logits = buffer[: len(x) * len(y)].view(len(x), len(y))
            if not is_known:
                multiply(x, y, scale, logits)
            yield Tile(part, band, x, y, logits)


def multiply(x: Tensor, y: Tensor, scale: Tensor | float, out: Tensor) -> None:
    """Write `scale * x @ y.T` to `out`."""
    if x.dtype == out.dtype:
        matmul_into(out, x * scale, y.T)
    else:
        matmul_into(out, x, y.T, alpha=float(scale))


def operand(features: Tensor) -> Tensor:
    """Return features as a product takes them: contiguous, in bf16 only if that is fast."""
    return features.to(operand_dtype(features)).contiguous()


def operand_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype of `operand`."""
    is_on_cpu = features.device.type == "cpu"
    if features.dtype == torch.bfloat16 and is_on_cpu and matmul.multiplies_bf16():
        return features.dtype
    return summable(features)


def blocks(length: int, most: int) -> Iterator[slice]:
    """Yield the fewest slices of at most `most` entries, of about equal size."""
    count = -(-length // most)
    for k in range(count):
        yield slice(k * length // count, (k + 1) * length // count)


def tile_shape(rows: Tensor, columns: Tensor) -> tuple[int, int]:
    """Return the most rows and columns that a tile may have within the workspace."""
    most = max(1, workspace_bytes() // (_LIVE_TILES * summable(rows).itemsize))
    column_size = min(len(columns), most)
    row_size = min(len(rows), max(1, most // column_size))
    if rows.device.type == "cpu":
        column_size = min(column_size, _CPU_COLUMNS)
        row_size = min(len(rows), _CPU_ROWS, max(1, most // column_size))
    return row_size, column_size


class Products:
    """The two products of a gradient with the features, summed tile by tile in at least fp32.

    Args:
        rows: [M, D].
        columns: [N, D].
        needs_rows: Whether the product with the columns' features is wanted.
        needs_columns: Whether the product with the rows' features is wanted.
    """

    def __init__(
        self, rows: Tensor, columns: Tensor, needs_rows: bool, needs_columns: bool
    ) -> None:
        dtype = summable(rows)
        self.of_rows = rows.new_empty(rows.shape, dtype=dtype) if needs_rows else None
        self.of_columns = columns.new_empty(columns.shape, dtype=dtype) if needs_columns else None
        size = math.prod(tile_shape(rows, columns))
        self._gradient = rows.new_empty(size, dtype=operand(rows[:1]).dtype)

    def gradient(self, tile: Tile) -> Tensor:
        """Return memory for a tile's gradient [R, C], in the dtype that products take."""
        return self._gradient[: tile.logits.numel()].view_as(tile.logits)

    def add(self, tile: Tile, gradient: Tensor) -> None:
        """Add a tile's share of both products."""
        if self.of_rows is not None:
            matmul_into(
                self.of_rows[tile.rows],
                gradient,
                tile.column_features,
                accumulate=tile.columns.start > 0,
            )
        if self.of_columns is not None:
            matmul_into(
                self.of_columns[tile.columns],
                gradient.T,
                tile.row_features,
                accumulate=tile.rows.start > 0,
            )


def log_scale_total(gradient: Tensor, logits: Tensor, rounded: Tensor) -> float | None:
    """Return the sum of gradient times logit over a tile, own entries left out.

    None where `rounded`, the gradient as products take it, is as precise: `scaled` then does it.
    """
    if rounded.dtype == gradient.dtype:
        return None
    # At an own entry this is 0 times -inf or, where there are no others, NaN.
    products = (gradient * logits).masked_fill_(logits == -torch.inf, 0)
    return products.sum(dtype=torch.float64).item()


class LogScaleGradient:
    """Sums gradient times logit over pairs, scale times the gradient of the scale.

    It is more precise than Euler's form of `scaled` where a tile's gradient is rounded to bf16.
    """

    def __init__(self) -> None:
        self._total: float | None = 0.0

    def add(
        self, total: float | None, d_own: Tensor | None = None, own: Tensor | None = None
    ) -> None:
        """Add the sum over a tile, None where its pass has none, and that of its own entries."""
        if total is None or self._total is None:
            self._total = None
            return
        self._total += total
        if d_own is not None and own is not None:
            self._total += torch.dot(d_own.double(), own.double()).item()

    def of_scale(self, scale: Tensor) -> Tensor | None:
        """Return the gradient of the scale []; None if a tile had no sum, or the scale is 0."""
        if self._total is None or scale == 0:
            return None
        return scale.new_full((), self._total / scale.item())


def scaled(
    products: Sequence[Tensor | None],
    features: tuple[Tensor, Tensor],
    scale: Tensor,
    needs: list[bool],
    d_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of rows, columns and scale from `Products`; empty where not needed.

    The logits are `scale * rows @ columns.T`, so the gradient of the scale is the sum of either
    side's features times its product (Euler), in the dtype of the product.

    Args:
        products: Of rows [M, D] and columns [N, D], overwritten; at least one where `needs`.
        features: Rows and columns.
        scale: [].
        needs: For rows, columns and scale.
        d_scale: The gradient of the scale where it is known more precisely, else None.
    """
    if not needs[2]:
        d_scale = scale.new_empty(0)
    elif d_scale is None:
        x, product = next((x, p) for x, p in zip(features, products, strict=True) if p is not None)
        d_scale = _dot(x, product)
    d_rows, d_columns = (
        product.mul_(scale).to(x.dtype) if need and product is not None else x.new_empty(0)
        for x, product, need in zip(features, products, needs[:2], strict=True)
    )
    return d_rows, d_columns, d_scale.to(scale.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    # Block by block, so that no temporary is as large as the features.
    return torch.stack([(a[part] * b[part]).sum() for part in blocks(len(a), _CPU_COLUMNS)]).sum()
