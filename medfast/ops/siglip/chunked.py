"""siglip_loss in tiles of plain PyTorch, value and gradient in one walk."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medfast.ops import tiles


class Sums(NamedTuple):
    """Sums over pairs."""

    loss: float | Tensor
    d_bias: float | Tensor
    d_log_scale: float | None  # of derivative times logit, bias not counted; None if not had


class Passes:
    """What siglip_loss does with a tile of logits [R, C]: all negatives, own entries -inf."""

    def negatives(self, logits: Tensor, bias: Tensor, out: Tensor | None) -> Sums:
        """Return the sums for `softplus(l + bias)`; its derivative goes to `out` [R, C]."""
        shifted = logits + bias
        # -logsigmoid is softplus without the threshold at which torch's softplus turns linear.
        loss = -F.logsigmoid(-shifted).sum(dtype=torch.float64)
        derivative = shifted.sigmoid_()
        d_log_scale = None
        if out is not None:
            out.copy_(derivative)
            d_log_scale = tiles.log_scale_total(derivative, logits, out)
        return Sums(loss, derivative.sum(dtype=torch.float64), d_log_scale)


def forward(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    needs_rows: bool,
    needs_columns: bool,
    passes: Passes,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Return the summed loss and its gradients of rows, columns, scale and bias.

    Those of rows and columns are over the scale; that of the scale is None where it is to be had
    from them. The gradient of a logit depends on that logit alone, so it is computed with the
    value: three products where recomputing takes four.

    Args:
        rows: [M, D].
        columns: [N, D].
        logit_scale: [].
        logit_bias: [].
        offset: Row i belongs to column i + offset, if there is one.
        needs_rows: Whether the rows' gradient is wanted.
        needs_columns: Whether the columns' gradient is.
        passes: The pass over a tile.
    """
    products = tiles.Products(rows, columns, needs_rows, needs_columns)
    loss, d_bias = (rows.new_zeros((), dtype=torch.float64) for _ in range(2))
    d_log_scale = tiles.LogScaleGradient()
    for tile in tiles.tiles(rows, columns, logit_scale):
        entries = tile.own(tile.logits, offset)
        own = entries.clone()
        entries.fill_(-torch.inf)
        gradient = products.gradient(tile) if needs_rows or needs_columns else None
        negatives = passes.negatives(tile.logits, logit_bias, gradient)
        d_own = -torch.sigmoid(-(own + logit_bias))
        loss += negatives.loss - F.logsigmoid(own + logit_bias).sum(dtype=torch.float64)
        d_bias += negatives.d_bias + d_own.sum(dtype=torch.float64)
        d_log_scale.add(negatives.d_log_scale, d_own, own)
        if gradient is not None:
            tile.own(gradient, offset).copy_(d_own)
            products.add(tile, gradient)
    dtype = tiles.summable(rows)
    d_scale = d_log_scale.of_scale(logit_scale)
    return loss.to(dtype), products.of_rows, products.of_columns, d_scale, d_bias.to(dtype)
