"""clip_loss in row chunks of plain PyTorch: recomputes the logits, never keeps B x B of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from medfast.ops.matmul import matmul
from medfast.ops.workspace import workspace_bytes

# A tile of logits and the temporary of its exponentials.
_LIVE_TILES = 2
# Enough for efficient products; a CPU gains nothing from larger tiles.
_CPU_ROWS = 512


class TileOps:
    """The passes over one tile of logits."""

    def logsumexp(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-sum-exps of the rows and of the columns."""
        return logits.logsumexp(1), logits.logsumexp(0)

    def softmaxes_(self, logits: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Replace the logits by their softmax along rows plus that along columns.

        Args:
            logits: [R, B], overwritten.
            rows: [R], log-sum-exps of the rows.
            columns: [B], log-sum-exps of the columns, over all tiles.
        """
        along_rows = torch.sub(logits, rows[:, None]).exp_()
        logits.sub_(columns).exp_().add_(along_rows)


def forward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    tile_ops: TileOps,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each pair's logit and the log-sum-exps of its row and column without it, all [B]."""
    image, text = _accumulable(image), _accumulable(text)
    diagonal, rows = image.new_empty(len(image)), image.new_empty(len(image))
    columns = image.new_full((len(image),), -torch.inf)
    for chunk, logits in _tiles(image, text, logit_scale):
        own = logits.diagonal(chunk.start)
        diagonal[chunk] = own
        own.fill_(-torch.inf)
        rows[chunk], partial = tile_ops.logsumexp(logits)
        columns = torch.logaddexp(columns, partial)
    return diagonal, rows, columns


def backward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    diagonal: Tensor,
    rows: Tensor,
    columns: Tensor,
    needs_image: bool,
    needs_text: bool,
    tile_ops: TileOps,
) -> tuple[Tensor | None, Tensor | None]:
    """Return 2 B / logit_scale times the gradients of the loss, in fp32, where they are needed."""
    image, text = _accumulable(image), _accumulable(text)
    d_image = torch.empty_like(image) if needs_image else None
    d_text = torch.zeros_like(text) if needs_text else None
    # softmax - 1 on the diagonal, written as what the others take: nothing cancels.
    d_diagonal = -(torch.sigmoid(rows - diagonal) + torch.sigmoid(columns - diagonal))
    rows, columns = torch.logaddexp(rows, diagonal), torch.logaddexp(columns, diagonal)
    for chunk, logits in _tiles(image, text, logit_scale):
        own = logits.diagonal(chunk.start)
        own.fill_(-torch.inf)
        tile_ops.softmaxes_(logits, rows[chunk], columns)
        own.copy_(d_diagonal[chunk])
        if d_image is not None:
            d_image[chunk] = matmul(logits, text)
        if d_text is not None:
            d_text += matmul(logits.T, image[chunk])
    return d_image, d_text


def _accumulable(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32)).contiguous()


def _tiles(image: Tensor, text: Tensor, logit_scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield row slices and their logits."""
    rows = max(1, workspace_bytes() // (_LIVE_TILES * len(text) * image.element_size()))
    if image.device.type == "cpu":
        rows = min(rows, _CPU_ROWS)
    for start in range(0, len(image), rows):
        chunk = slice(start, start + rows)
        yield chunk, matmul(image[chunk] * logit_scale, text.T)
