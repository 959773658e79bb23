"""The cross-entropy of matching pairs, exact also where the matches win by far."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, positives: Tensor | None = None) -> Tensor:
    """Return the mean of the row-wise and the column-wise cross-entropy of `logits`.

    Row i costs `mean_p (logsumexp_j l_ij - l_ip)` over its positives p: those of the same id, or
    only p = i. Written with the diagonal d_i = l_ii outside the sum,

        softplus(logsumexp_{j != i} l_ij - d_i) + mean_p (d_i - l_ip),

    it does not round to 0, nor its gradient, when the diagonal dwarfs the rest.

    Args:
        logits: [B, B], row i and column i are a pair.
        positives: [B], equal ids mark positives of one another; None stands for B different ids.

    Returns:
        The loss, a 0-d tensor in the dtype of `logits`.
    """
    diagonal, others = logits.diagonal(), _others(logits)
    loss = cross_entropy_of_sums(diagonal, others.logsumexp(1), others.logsumexp(0))
    if positives is not None:
        same = (positives[:, None] == positives).to(logits.dtype)
        target = same / same.sum(1, keepdim=True)
        # The target is symmetric, so rows and columns add the same.
        loss = loss + (target * (diagonal[:, None] - logits)).sum() / len(logits)
    return loss


def row_cross_entropy(logits: Tensor) -> Tensor:
    """Return the mean of the row-wise cross-entropy of `logits` [B, B] with the diagonal, exactly.

    It is one direction of `cross_entropy`, for scores that are not the same both ways.
    """
    return softplus(_others(logits).logsumexp(1) - logits.diagonal()).mean()


def two_way_cross_entropy(scores: Tensor, scores_back: Tensor) -> Tensor:
    """Return the mean of `row_cross_entropy` of the scores of either direction."""
    return (row_cross_entropy(scores) + row_cross_entropy(scores_back)) / 2


def cross_entropy_of_sums(diagonal: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the loss from each pair's own logit and its log-sum-exps over the others, all [B]."""
    return (softplus(rows - diagonal) + softplus(columns - diagonal)).mean() / 2


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + e^x) without the threshold at which torch's softplus turns linear."""
    return -F.logsigmoid(-x)


def _others(logits: Tensor) -> Tensor:
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return logits.masked_fill(own, -torch.inf)
