"""Retrieval ranks by counting, in tiles of plain PyTorch: no sort, no N x M scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medfast.ops import tiles

# Products narrower than this may sum in another order than wide ones; then a duplicate of the
# target would not tie with it.
_LEAST = 64
# Queries whose own scores are computed by one product.
_OWN_ROWS = 1024


class Passes:
    """What retrieval_rank does with a tile of scores [R, C]; own entries are -inf."""

    def count(
        self,
        scores: Tensor,
        row_thresholds: Tensor,
        row_counts: Tensor,
        column_thresholds: Tensor | None = None,
        column_counts: Tensor | None = None,
    ) -> None:
        """Add to the counts [R] and [C] how many scores are not below the thresholds."""
        row_counts += (scores < row_thresholds[:, None]).logical_not_().sum(1)
        if column_thresholds is not None and column_counts is not None:
            column_counts += (scores < column_thresholds).logical_not_().sum(0)


def ranks(query: Tensor, gallery: Tensor, target: Tensor, passes: Passes) -> Tensor:
    """Return the rank of each query's target, int64 [N].

    Args:
        query: [N, D].
        gallery: [M, D].
        target: Rows of the gallery, int64 [N].
        passes: The pass over a tile.
    """
    (N, M), (query, gallery) = (len(query), len(gallery)), (_padded(query), _padded(gallery))
    target = F.pad(target, (0, len(query) - N))
    thresholds = _own_scores(query, gallery, target)
    counts = torch.zeros_like(target)
    for tile in tiles.tiles(query, gallery, 1.0):
        place = target[tile.rows] - tile.columns.start
        here = ((place >= 0) & (place < tile.logits.shape[1])).nonzero()[:, 0]
        tile.logits[here, place[here]] = -torch.inf
        tile.logits[:, M:].fill_(-torch.inf)
        passes.count(tile.logits, thresholds[tile.rows], counts[tile.rows])
    return _finished(counts, thresholds, M)[:N]


def paired_ranks(query: Tensor, gallery: Tensor, passes: Passes) -> tuple[Tensor, Tensor]:
    """Return the ranks of row i for row i in both directions, each int64 [N], from one walk.

    Args:
        query: [N, D].
        gallery: [N, D].
        passes: The pass over a tile.
    """
    N, (query, gallery) = len(query), (_padded(query), _padded(gallery))
    target = torch.arange(len(query), device=query.device)
    thresholds = _own_scores(query, gallery, target)
    row_counts, column_counts = torch.zeros_like(target), torch.zeros_like(target)
    for tile in tiles.tiles(query, gallery, 1.0):
        tile.own(tile.logits, 0).fill_(-torch.inf)
        # Padding is no candidate for a row, nor a query for a column.
        tile.logits[:, N:].fill_(-torch.inf)
        tile.logits[N:].fill_(-torch.inf)
        passes.count(
            tile.logits,
            thresholds[tile.rows],
            row_counts[tile.rows],
            thresholds[tile.columns],
            column_counts[tile.columns],
        )
    by_row, by_column = (_finished(c, thresholds, N)[:N] for c in (row_counts, column_counts))
    return by_row, by_column


def _padded(features: Tensor) -> Tensor:
    return F.pad(features, (0, 0, 0, max(0, _LEAST - len(features))))


def _own_scores(query: Tensor, gallery: Tensor, target: Tensor) -> Tensor:
    """Return each query's score of its target [N], by products of the tiles' kind."""
    scores = query.new_empty(len(query), dtype=tiles.summable(query))
    for part in tiles.blocks(len(query), _OWN_ROWS):
        x, y = tiles.operand(query[part]), tiles.operand(gallery[target[part]])
        product = scores.new_empty(len(x), len(x))
        tiles.multiply(x, y, 1.0, product)
        scores[part] = product.diagonal()
    return scores


def _finished(counts: Tensor, thresholds: Tensor, candidates: int) -> Tensor:
    """Return the ranks; a target that scores NaN or -inf is last, and is not its own rival."""
    return torch.where(thresholds.isnan(), candidates - 1, counts.clamp(max=candidates - 1))
