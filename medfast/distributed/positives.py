"""What further positives of a pair add to clip_loss, where they may be of other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medfast.distributed.ring import Ring, gathered
from medfast.ops.tiles import summable


def agreement(
    image: Tensor, text: Tensor, positives: Tensor, ring: Ring, sizes: Sequence[int]
) -> Tensor:
    """Return this rank's part of `medfast.ops.clip.positives.agreement`.

    It is `sum_i x_i . (y_i - mean of y_p over the group of i)` over the images of this rank. The
    texts pass by, and in the backward the images times the gradient of their rank's part, and each
    rank sums those of its own groups: O(B D) memory, and one more round of the ring either way,
    which little computing hides.

    Args:
        image: x [B, D].
        text: y [B, D].
        positives: Group ids, int64 [B]; a group may be of several ranks.
        ring: The ranks.
        sizes: Pairs of every rank.

    Returns:
        A scalar in fp32, or fp64 for fp64 features.
    """
    return _Agreement.apply(image, text, positives, ring, sizes)


def gathered_agreement(
    image: Tensor, text: Tensor, positives: Tensor, ring: Ring, sizes: Sequence[int]
) -> Tensor:
    """Return what `agreement` does, by its definition."""
    dtype = summable(image)
    similar = image.to(dtype) @ gathered(text, ring, sizes).to(dtype).T
    same = (positives[:, None] == ring.gather(positives, sizes)).to(dtype)
    own = similar.diagonal(ring.spans(sizes)[ring.rank].start)
    return (own - (similar * same).sum(1) / same.sum(1)).sum()


class _Agreement(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        positives: Tensor,
        ring: Ring,
        sizes: Sequence[int],
    ) -> Tensor:
        text_left = _minus_group_mean(text, positives, ring, sizes)
        ctx.save_for_backward(image, text_left, positives)
        ctx.ring, ctx.sizes, ctx.text_dtype = ring, sizes, text.dtype
        return (image.to(text_left.dtype) * text_left).sum()

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor | None, ...]:
        image, text_left, positives = ctx.saved_tensors
        d_text = _minus_group_mean(image.to(d_sum.dtype) * d_sum, positives, ctx.ring, ctx.sizes)
        d_image = text_left * d_sum
        return d_image.to(image.dtype), d_text.to(ctx.text_dtype), None, None, None


def _minus_group_mean(
    features: Tensor, positives: Tensor, ring: Ring, sizes: Sequence[int]
) -> Tensor:
    """Return each row minus the mean of all ranks' rows of its id; exactly 0 for a row alone."""
    ids, group = torch.unique(positives, return_inverse=True)
    dtype = summable(features)
    # The last of them collects the rows of groups that have none here.
    sums = features.new_zeros(len(ids) + 1, features.shape[1], dtype=dtype)
    counts = torch.zeros(len(ids) + 1, dtype=torch.int64, device=ids.device)
    for _, (block, block_ids) in ring.blocks(sizes, features, positives):
        place = torch.searchsorted(ids, block_ids).clamp_(max=len(ids) - 1)
        place.masked_fill_(ids[place] != block_ids, len(ids))
        found = torch.bincount(place, minlength=len(counts))
        counts += found
        # Sorted segments, not index_add: its order of summation varies from run to run on a GPU.
        rows = block.to(dtype)[place.argsort(stable=True)]
        sums += torch.segment_reduce(rows, "sum", lengths=found)
    return features - (sums / counts[:, None])[group]
