"""A bank of earlier captions' features, in which each caption finds its nearest neighbour."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from medfast.distributed import Ring
from medfast.ops import tiles


class FeatureBank(nn.Module):
    """The newest features that were pushed, first in, first out.

    Its buffers are part of a checkpoint. Nothing in it waits for a GPU.

    Args:
        size: Entries that it holds.
        dim: Width of a feature.
    """

    features: Tensor
    pushed: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(size, dim))
        # In all; the newest of them are kept.
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, features: Tensor, ring: Ring | None = None) -> None:
        """Keep features [B, D] in place of the oldest, with a ring those of all ranks in order."""
        sizes = [len(features)] if ring is None else ring.sizes(features)
        N, size = sum(sizes), len(self.features)
        blocks: Iterable[tuple[slice, list[Tensor]]] = [(slice(0, N), [features])]
        for span, (block,) in blocks if ring is None else ring.blocks(sizes, features):
            # More than fit are there only to be overtaken.
            first = max(span.start, N - size)
            newest = block[first - span.start :].to(self.features.dtype)
            numbers = first + torch.arange(len(newest), device=newest.device)
            self.features[(self.pushed + numbers) % size] = newest
        self.pushed += N

    @torch.no_grad()
    def nearest(self, query: Tensor) -> Tensor:
        """Return the entry most like each query [N, D] by inner product; itself while empty.

        It takes tiles of similarities within the workspace.
        """
        rows = query.to(self.features.dtype)
        best = rows.new_full((len(rows),), -torch.inf, dtype=tiles.summable(rows))
        place = torch.zeros(len(query), dtype=torch.int64, device=query.device)
        number = torch.arange(len(self.features), device=query.device)
        for tile in tiles.tiles(rows, self.features, 1.0):
            free = number[tile.columns] >= self.pushed
            value, column = tile.logits.masked_fill(free, -torch.inf).max(1)
            is_better = value > best[tile.rows]
            best[tile.rows] = torch.where(is_better, value, best[tile.rows])
            column = column + tile.columns.start
            place[tile.rows] = torch.where(is_better, column, place[tile.rows])
        return torch.where(self.pushed == 0, query, self.features[place].to(query.dtype))
