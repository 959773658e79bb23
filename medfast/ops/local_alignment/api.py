"""The public functions of local alignment: checks, choice of implementation, documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast.ops import dispatch, pairwise
from medfast.ops.local_alignment import reference
from medfast.ops.local_alignment.autograd import pair_scores

_OP = "local_alignment_loss"
# Triton's tiles hold all words of a caption.
_MOST_TRITON_WORDS = 1024


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
    """Return the loss of aligning every report's words with every image's patches (GLoRIA).

    For report i and image j, S = W_i V_j^T; a softmax over the words, times `temp_attention`, then
    a softmax over the patches give the attention A, and c_w = sum_p A_wp v_p is what word w sees:

        Z_ij = log sum_w exp(temp_words cos(c_w, w)),

    and the loss is the cross-entropy of `temp_pairs * Z` with the matching pairs, the mean of both
    directions. "reference" keeps B x B x T x P scores; the others work in tiles within
    `MEDFAST_WORKSPACE_MB` and keep B x B. Under autocast the features take its dtype; sums and loss
    are in fp32.

    Args:
        patches: Patch features [B, P, D], fp32, bf16, fp16 or fp64; not normalised.
        tokens: Token features [B, T, D], likewise; caption i belongs to image i.
        token_mask: bool [B, T], true for the caption's own words: no padding, start or end.
        patch_mask: bool [B, P], true for patches that count; None counts all.
        temp_attention: Sharpness of the attention, a number or a tensor of one element.
        temp_words: Sharpness of the sum over words, likewise.
        temp_pairs: Sharpness of the cross-entropy over pairs, likewise.
        impl: "auto", "cpu", "triton", "torch" or "reference".

    Returns:
        The loss, a scalar: fp32, or fp64 for fp64 features. NaN features make it NaN.

    Raises:
        ValueError: An argument has another shape, dtype or device, a caption has no word, an
            image no patch that counts (on a GPU, where looking would wait for it, either makes
            the loss NaN), or `impl` is unknown.
        RuntimeError: `impl` cannot run here.

    Source:
        Huang et al. 2021, "GLoRIA: A Multimodal Global-Local Representation Learning Framework
        for Label-efficient Medical Image Recognition".

    Example:
        >>> import torch
        >>> from medfast.ops import local_alignment_loss
        >>> patches = tokens = torch.eye(4).reshape(2, 2, 4)
        >>> mask = torch.ones(2, 2, dtype=torch.bool)
        >>> round(local_alignment_loss(patches, tokens, mask, temp_pairs=1.0).item(), 4)
        0.0071
    """
    dispatch.check_patches_and_tokens(_OP, patches, tokens, token_mask, patch_mask)
    pairs = dispatch.as_scalar(_OP, "temp_pairs", temp_pairs, patches)
    return pairwise.cross_entropy(
        pairs
        * _scores(_OP, patches, tokens, token_mask, patch_mask, temp_attention, temp_words, impl)
    )


def local_alignment_scores(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    *,
    patch_mask: Tensor | None = None,
    temp_attention: float | Tensor = 4.0,
    temp_words: float | Tensor = 5.0,
    impl: str = "auto",
) -> Tensor:
    """Return how well N captions match M images, Z of `local_alignment_loss`, with gradients.

    Args:
        patches: [M, P, D], as in `local_alignment_loss`.
        tokens: [N, T, D], as in `local_alignment_loss`.
        token_mask: bool [N, T], as in `local_alignment_loss`.
        patch_mask: bool [M, P], as in `local_alignment_loss`.
        temp_attention: As in `local_alignment_loss`.
        temp_words: As in `local_alignment_loss`.
        impl: As in `local_alignment_loss`.

    Returns:
        Z [N, M], in fp32, or fp64 for fp64 features.

    Raises:
        ValueError: As in `local_alignment_loss`.
        RuntimeError: As in `local_alignment_loss`.
    """
    op = "local_alignment_scores"
    dispatch.check_patches_and_tokens(op, patches, tokens, token_mask, patch_mask, paired=False)
    return _scores(op, patches, tokens, token_mask, patch_mask, temp_attention, temp_words, impl)


def word_patch_attention(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    *,
    patch_mask: Tensor | None = None,
    temp_attention: float | Tensor = 4.0,
) -> Tensor:
    """Return where the words of caption k look in image k, as `local_alignment_loss` has it.

    Any pairs may be chosen: `word_patch_attention(patches[images], tokens[captions], ...)`.

    Args:
        patches: As in `local_alignment_loss`.
        tokens: As in `local_alignment_loss`.
        token_mask: As in `local_alignment_loss`.
        patch_mask: As in `local_alignment_loss`.
        temp_attention: As in `local_alignment_loss`.

    Returns:
        Weights [B, T, P] in at least fp32: each word's sum to 1, those of masked words are 0.

    Raises:
        ValueError: As in `local_alignment_loss`.
    """
    op = "word_patch_attention"
    dispatch.check_patches_and_tokens(op, patches, tokens, token_mask, patch_mask)
    with torch.autocast(patches.device.type, enabled=False):
        return reference.word_patch_attention(
            patches,
            tokens,
            token_mask,
            patch_mask=patch_mask,
            temp_attention=dispatch.as_scalar(op, "temp_attention", temp_attention, patches),
        )


def _scores(
    op: str,
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    temp_attention: float | Tensor,
    temp_words: float | Tensor,
    impl: str,
) -> Tensor:
    patches, tokens = dispatch.autocast(patches, tokens)
    attention = dispatch.as_scalar(op, "temp_attention", temp_attention, patches)
    words = dispatch.as_scalar(op, "temp_words", temp_words, patches)
    chosen = _choose(op, impl, patches, tokens.shape[1])
    with torch.autocast(patches.device.type, enabled=False):
        if chosen == "reference":
            return reference.local_alignment_scores(
                patches,
                tokens,
                token_mask,
                patch_mask=patch_mask,
                temp_attention=attention,
                temp_words=words,
            )
        return pair_scores(patches, tokens, token_mask, patch_mask, attention, words, chosen)


def _choose(op: str, impl: str, patches: Tensor, words: int) -> str:
    chosen = dispatch.choose(_OP, impl, patches)
    if chosen != "triton" or words <= _MOST_TRITON_WORDS:
        return chosen
    if impl == "auto":
        return "torch"
    raise RuntimeError(
        f"{op}: impl='triton' cannot run here: the captions have up to {words} words, its tiles "
        f"room for {_MOST_TRITON_WORDS}. Use impl='torch' or impl='auto'."
    )
