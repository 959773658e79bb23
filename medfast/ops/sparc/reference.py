"""The definition of sparc_loss: short, everything at once for the whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medfast.ops.packing import valid
from medfast.ops.pairwise import softplus

# A row of similarities whose spread is below this share of its largest value is constant: what is
# left is the rounding of equal products, and must not be blown up to [0, 1].
CONSTANT = 1e-6
# A vector shorter than this is divided by this.
MIN_NORM = 1e-8


def sparc_loss(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    logit_scale: float | Tensor,
    *,
    patch_mask: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    """Return the loss, the mean over captions; see `medfast.ops.sparc_loss`."""
    patches, words = valid(patches, patch_mask), valid(tokens, token_mask)
    if patch_mask is None:
        patch_mask = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
    contexts = align(words @ patches.mT, patch_mask[:, None], threshold) @ patches
    contexts, words = (F.normalize(x, dim=-1, eps=MIN_NORM) for x in (contexts, words))
    # [B, T, T], row: a word's context, column: a word.
    logits = logit_scale * contexts @ words.mT
    own = logits.diagonal(dim1=1, dim2=2).masked_fill(~token_mask, 0)
    is_other = token_mask[:, :, None] & token_mask[:, None]
    is_other &= ~torch.eye(token_mask.shape[1], dtype=torch.bool, device=logits.device)
    others = logits.masked_fill(~is_other, -torch.inf)
    # A word's own logit stays outside the sums, as in `pairwise.cross_entropy`.
    losses = softplus(others.logsumexp(2) - own) + softplus(others.logsumexp(1) - own)
    return (losses.sum(1) / token_mask.sum(1)).mean() / 2


def align(similarity: Tensor, patch_mask: Tensor, threshold: float | None) -> Tensor:
    """Return the weights [..., P] of the patches for each row of similarities [..., P].

    Args:
        similarity: Of a word and the patches.
        patch_mask: bool, broadcast to it.
        threshold: Least share of the row's spread that counts; None is one over the number of
            patches.
    """
    highest = similarity.masked_fill(~patch_mask, -torch.inf).max(-1, keepdim=True).values
    lowest = similarity.masked_fill(~patch_mask, torch.inf).min(-1, keepdim=True).values
    spread = highest - lowest
    is_constant = spread <= CONSTANT * torch.maximum(highest.abs(), lowest.abs())
    shares = (similarity - lowest) / spread.masked_fill(is_constant, 1)
    least = 1 / patch_mask.sum(-1, keepdim=True) if threshold is None else threshold
    shares = shares.masked_fill(~patch_mask | (shares < least), 0)
    shares = torch.where(is_constant, patch_mask.to(shares.dtype), shares)
    return shares / shares.sum(-1, keepdim=True)
