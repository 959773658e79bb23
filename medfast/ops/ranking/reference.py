"""The definition of retrieval_rank: a few lines that keep the N x M scores."""

from __future__ import annotations

import torch
from torch import Tensor


def retrieval_rank(query: Tensor, gallery: Tensor, target: Tensor) -> Tensor:
    """Return how many of the others score at least as high; see `medfast.ops.retrieval_rank`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(dtype) @ gallery.to(dtype).T
    own = scores.gather(1, target[:, None])
    # NaN is not below anything, so it counts against the query; the target itself does not count.
    not_below = ~(scores < own)
    return not_below.scatter(1, target[:, None], False).sum(1)


def paired_ranks(query: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ranks of both directions; see `medfast.ops.paired_ranks`."""
    target = torch.arange(len(query), device=query.device)
    return retrieval_rank(query, gallery, target), retrieval_rank(gallery, query, target)
