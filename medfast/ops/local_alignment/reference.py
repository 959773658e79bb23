"""The definition of local_alignment_loss: short, keeps everything for every pair of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast.ops import pairwise
from medfast.ops.packing import valid

# As in the publication, where a product of norms below this divides as if it were this.
MIN_NORM = 1e-8


def local_alignment_loss(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    *,
    patch_mask: Tensor | None = None,
    temp_attention: float | Tensor = 4.0,
    temp_words: float | Tensor = 5.0,
    temp_pairs: float | Tensor = 10.0,
) -> Tensor:
    """Return the loss over all pairs; see `medfast.ops.local_alignment_loss`."""
    scores = local_alignment_scores(
        patches,
        tokens,
        token_mask,
        patch_mask=patch_mask,
        temp_attention=temp_attention,
        temp_words=temp_words,
    )
    return pairwise.cross_entropy(temp_pairs * scores)


def local_alignment_scores(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    *,
    patch_mask: Tensor | None = None,
    temp_attention: float | Tensor = 4.0,
    temp_words: float | Tensor = 5.0,
) -> Tensor:
    """Return how well each caption (row) matches each image (column)."""
    patches, words = valid(patches, patch_mask), valid(tokens, token_mask)
    # Letters of einsum: caption i, word t; image j, patch p; feature d.
    similarity = torch.einsum("itd,jpd->ijtp", words, patches)
    images = None if patch_mask is None else patch_mask[None]
    attention = attend(similarity, token_mask[:, None], images, temp_attention)
    context = torch.einsum("ijtp,jpd->ijtd", attention, patches)
    dot = torch.einsum("ijtd,itd->ijt", context, words)
    cosine = dot / (context.norm(dim=-1) * words.norm(dim=-1)[:, None]).clamp_min(MIN_NORM)
    return (temp_words * cosine).masked_fill(~token_mask[:, None], -torch.inf).logsumexp(-1)


def word_patch_attention(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    *,
    patch_mask: Tensor | None = None,
    temp_attention: float | Tensor = 4.0,
) -> Tensor:
    """Return where the words of each caption look in its own image, [B, T, P]."""
    patches, words = valid(patches, patch_mask), valid(tokens, token_mask)
    attention = attend(words @ patches.mT, token_mask, patch_mask, temp_attention)
    return attention.masked_fill(~token_mask[..., None], 0)


def attend(
    similarity: Tensor, words: Tensor, patches: Tensor | None, temp_attention: float | Tensor
) -> Tensor:
    """Return the attention [..., T, P] of valid `words` [..., T] over valid `patches` [..., P]."""
    over_words = similarity.masked_fill(~words[..., None], -torch.inf).softmax(-2)
    sharpened = temp_attention * over_words
    if patches is not None:
        sharpened = sharpened.masked_fill(~patches[..., None, :], -torch.inf)
    return sharpened.softmax(-1)
