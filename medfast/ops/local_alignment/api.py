"""The public functions of local alignment: checks, choice of implementation, documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast.ops import dispatch, pairwise
from medfast.ops.local_alignment import reference
from medfast.ops.local_alignment.autograd import local_alignment_loss_fwd

_OP = "local_alignment_loss"


def local_alignment_loss(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    *,
    patch_mask: Tensor | None = None,
    temp_attention: float | Tensor = 4.0,
    temp_words: float | Tensor = 5.0,
    temp_pairs: float | Tensor = 10.0,
    impl: str = "auto",
) -> Tensor:
    """Return the loss of aligning every report's words with every image's patches."""
    _check(_OP, patches, tokens, token_mask, patch_mask)
    attention, words, pairs = (
        dispatch.as_scalar(_OP, name, value, patches)
        for name, value in (
            ("temp_attention", temp_attention),
            ("temp_words", temp_words),
            ("temp_pairs", temp_pairs),
        )
    )
    if dispatch.choose(_OP, impl, patches) == "reference":
        with torch.autocast(patches.device.type, enabled=False):
            return reference.local_alignment_loss(
                patches,
                tokens,
                token_mask,
                patch_mask=patch_mask,
                temp_attention=attention,
                temp_words=words,
                temp_pairs=pairs,
            )
    scores = local_alignment_loss_fwd(patches, tokens, token_mask, patch_mask, attention, words)
    return pairwise.cross_entropy(pairs * scores)


def word_patch_attention(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    *,
    patch_mask: Tensor | None = None,
    temp_attention: float | Tensor = 4.0,
) -> Tensor:
    """Return the attention of each caption's words over the patches of its own image."""
    op = "word_patch_attention"
    _check(op, patches, tokens, token_mask, patch_mask)
    with torch.autocast(patches.device.type, enabled=False):
        return reference.word_patch_attention(
            patches,
            tokens,
            token_mask,
            patch_mask=patch_mask,
            temp_attention=dispatch.as_scalar(op, "temp_attention", temp_attention, patches),
        )


def _check(
    op: str, patches: Tensor, tokens: Tensor, token_mask: Tensor, patch_mask: Tensor | None
) -> None:
    dispatch.check_features(op, "B, P, D", patches=patches)
    dispatch.check_features(op, "B, T, D", tokens=tokens)
    dispatch.check_mask(op, "token_mask", token_mask, tokens)
    if patch_mask is not None:
        dispatch.check_mask(op, "patch_mask", patch_mask, patches)
