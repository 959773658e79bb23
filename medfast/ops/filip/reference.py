"""The definition of filip_loss: short, keeps everything for every pair of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast.ops import pairwise
from medfast.ops.packing import valid


def filip_loss(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    logit_scale: float | Tensor,
    *,
    patch_mask: Tensor | None = None,
) -> Tensor:
    """Return the loss over all pairs; see `medfast.ops.filip_loss`."""
    image_to_text, text_to_image = filip_scores(patches, tokens, token_mask, patch_mask=patch_mask)
    return pairwise.two_way_cross_entropy(logit_scale * image_to_text, logit_scale * text_to_image)


def filip_scores(
    patches: Tensor, tokens: Tensor, token_mask: Tensor, *, patch_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return how well M images match N captions, [M, N] and [N, M]."""
    patches, words = valid(patches, patch_mask), valid(tokens, token_mask)
    if patch_mask is None:
        patch_mask = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
    # Letters of einsum: image j, patch p; caption i, word t; feature d.
    similarity = torch.einsum("jpd,itd->jipt", patches, words)
    # The maximum takes the first of equals, and so does its gradient.
    best_word = similarity.masked_fill(~token_mask[:, None], -torch.inf).max(3).values
    best_patch = similarity.masked_fill(~patch_mask[:, None, :, None], -torch.inf).max(2).values
    image_to_text = _mean(best_word, patch_mask[:, None])
    text_to_image = _mean(best_patch, token_mask).T
    return image_to_text, text_to_image


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the last dimension of what counts."""
    return values.masked_fill(~mask, 0).sum(-1) / mask.sum(-1)
