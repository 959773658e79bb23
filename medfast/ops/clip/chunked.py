"""The log-sum-exps of clip_loss in tiles of plain PyTorch: never keeps more than the workspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medfast.ops import tiles

# Logits are kept in steps as they come: in panels of so many rows and columns.
PANEL = 32


def whole_panels(length: int) -> int:
    """Return `length`, rounded up to whole panels."""
    return -(-length // PANEL) * PANEL


@dataclass(frozen=True)
class KeptLogits:
    """Logits as multiples of `step`: half as much to write and to read as in fp32.

    They serve where the gradient is rounded to bf16 anyway.
    """

    steps: Tensor  # int16, one panel after the other
    step: float


class Passes:
    """What clip_loss does with a tile of logits [R, C]; own entries are -inf."""

    def __init__(self, logit_scale: Tensor) -> None:
        """Take the scale [] of the logits, from which subclasses foresee their size."""

    def in_steps(self, kept: Tensor, rows: Tensor, columns: Tensor) -> KeptLogits | None:
        """Return `kept` with the step that suits these features; None if it has no steps."""
        return None

    def of_features(
        self, rows: Tensor, columns: Tensor, offset: int, kept: Tensor | KeptLogits | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return what `forward` does without logits in other memory; None where that cannot be.

        They are kept where `kept` is given.
        """
        return None

    def log_sum_exps(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-sum-exps of the rows [R] and of the columns [C]."""
        return logits.logsumexp(1), logits.logsumexp(0)

    def gradients_of_features(
        self,
        d_own: Tensor,
        d_rows: Tensor,
        d_columns: Tensor,
        rows: Tensor,
        columns: Tensor,
        offset: int,
        own: Tensor,
        row_lse: Tensor,
        column_lse: Tensor,
        kept: Tensor,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the gradients of rows, columns and scale from kept steps, that of none written.

        They are those of `backward` and `tiles.scaled`, empty where `needs` is false; None where
        this cannot be.
        """
        return None

    def gradient(
        self,
        logits: Tensor,
        row_lse: Tensor,
        column_lse: Tensor,
        d_rows: Tensor,
        d_columns: Tensor,
        out: Tensor,
    ) -> float | None:
        """Write `g_ij = d_rows_i e^(l_ij - row_lse_i) + d_columns_j e^(l_ij - column_lse_j)`.

        Args:
            logits: l [R, C].
            row_lse: [R].
            column_lse: [C].
            d_rows: [R].
            d_columns: [C].
            out: Where g goes, [R, C].

        Returns:
            The sum of `g_ij l_ij` if it is more precise than `out` would give it, else None.
        """
        along_rows = torch.sub(logits, row_lse[:, None]).exp_().mul_(d_rows[:, None])
        along_columns = torch.sub(logits, column_lse).exp_().mul_(d_columns)
        gradient = along_rows.add_(along_columns)
        out.copy_(gradient)
        return tiles.log_scale_total(gradient, logits, out)


def forward(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, offset: int, kept: Tensor, passes: Passes
) -> tuple[Tensor, Tensor, Tensor]:
    """Return own logits [M] and the log-sum-exps of rows [M] and columns [N] without them.

    Args:
        rows: [M, D].
        columns: [N, D].
        logit_scale: [].
        offset: Row i's own column is i + offset; where there is none its own logit is -inf.
        kept: Where the logits stay for the backward, [M, N], or empty; int16 for `KeptLogits`.
        passes: The passes over a tile.
    """
    in_steps = passes.in_steps(kept, rows, columns)
    keeps_all = kept.numel() > 0 and kept.dtype == tiles.summable(rows)
    found = passes.of_features(rows, columns, offset, kept if keeps_all else in_steps)
    if found is not None:
        return found
    own = rows.new_full((len(rows),), -torch.inf, dtype=tiles.summable(rows))
    # Merged once a tile: in fp64 the roundings of the merges do not add up.
    row_lse, column_lse = (
        x.new_full((len(x),), -torch.inf, dtype=torch.float64) for x in (rows, columns)
    )
    for tile in tiles.tiles(rows, columns, logit_scale, kept if keeps_all else None):
        own_logits = tile.own(tile.logits, offset)
        own[tile.own_rows(offset)] = own_logits
        own_logits.fill_(-torch.inf)
        for total, slices, part in zip(
            (row_lse, column_lse),
            (tile.rows, tile.columns),
            passes.log_sum_exps(tile.logits),
            strict=True,
        ):
            torch.logaddexp(total[slices], part.double(), out=total[slices])
    return own, row_lse.to(own.dtype), column_lse.to(own.dtype)


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
    kept: Tensor,
    needs_rows: bool,
    needs_columns: bool,
    passes: Passes,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of rows and columns, over `logit_scale`, in fp32 or fp64.

    The third result is the gradient of `logit_scale` where it is had more precisely than from the
    other two, else None.

    Args:
        d_own: Gradient of the own logits [M].
        d_rows: Gradient of the rows' log-sum-exps [M].
        d_columns: Gradient of the columns' log-sum-exps [N].
        rows: As in `forward`.
        columns: As in `forward`.
        logit_scale: As in `forward`.
        offset: As in `forward`.
        own: From `forward`.
        row_lse: From `forward`.
        column_lse: From `forward`.
        kept: As `forward` left it.
        needs_rows: Whether the first gradient is wanted.
        needs_columns: Whether the second one is.
        passes: The passes over a tile.
    """
    products = tiles.Products(rows, columns, needs_rows, needs_columns)
    d_log_scale = tiles.LogScaleGradient()
    keeps_all = kept.numel() > 0 and kept.dtype == own.dtype
    walk = tiles.kept_tiles if keeps_all else tiles.tiles
    for tile in walk(rows, columns, kept if keeps_all else logit_scale):
        if not keeps_all:
            tile.own(tile.logits, offset).fill_(-torch.inf)
        gradient = products.gradient(tile)
        total = passes.gradient(
            tile.logits,
            row_lse[tile.rows],
            column_lse[tile.columns],
            d_rows[tile.rows],
            d_columns[tile.columns],
            gradient,
        )
        d_log_scale.add(total)
        tile.own(gradient, offset).copy_(d_own[tile.own_rows(offset)])
        products.add(tile, gradient)
    # Where the own column does not exist, own is -inf and its gradient 0.
    d_log_scale.add(0.0, d_own, own.masked_fill(own == -torch.inf, 0))
    return products.of_rows, products.of_columns, d_log_scale.of_scale(logit_scale)
