"""The public functions of local alignment: checks, choice of implementation, documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast.ops import dispatch, pairwise
from medfast.ops.local_alignment import reference
from medfast.ops.local_alignment.autograd import local_alignment_loss_fwd


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
    """Return the loss of matching the words of every report with the patches of every image.

    For report i and image j, every word w attends to the patches v_p:
    S = W_i V_j^T, A = softmax_p(temp_attention * softmax_w(S)), c_w = sum_p A_wp v_p. The pair
    scores Z_ij = log sum_w exp(temp_words * cos(c_w, w)), and the loss is the cross-entropy of
    temp_pairs * Z, the mean of both directions.

    Memory: O(B * B) scores beside the gradients. The [words, B, P] attention is recomputed in
    tiles within `MEDFAST_WORKSPACE_MB`; only impl="reference" keeps it.

    Args:
        patches: [B, P, D], the local image features, not normalised.
        tokens: [B, T, D], the word features, not normalised, in the dtype of `patches`.
        token_mask: [B, T], True for words. The others never count, whatever they hold.
        patch_mask: [B, P], True for the patches that count; None for all.
        temp_attention: Sharpens the attention over patches. All three temperatures are numbers or
            tensors of one element, and get gradients.
        temp_words: Sharpens the choice of words in a pair's score.
        temp_pairs: Sharpens the choice of pairs.
        impl: "auto" (the fastest here), "torch" or "reference".

    Returns:
        The loss, a 0-d fp32 tensor (fp64 for fp64 features). Sums are in fp32 whatever the dtype
        of the features, under autocast too.

    Raises:
        ValueError: An argument has a wrong shape, dtype or device, a caption has no valid word,
            an image no valid patch, or `impl` is not known.
        RuntimeError: The implementation asked for cannot run here.

    Source: Huang et al. 2021, GLoRIA (ICCV); published as the sum of both directions.

    Example:
        >>> import torch
        >>> from medfast.ops import local_alignment_loss
        >>> patches = torch.eye(4).reshape(2, 2, 4)
        >>> tokens = 3 * patches
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> print(f"{local_alignment_loss(patches, tokens, mask, temp_pairs=1.0):.4f}")
        0.0000
    """
    op = "local_alignment_loss"
    _check(op, patches, tokens, token_mask, patch_mask)
    attention = dispatch.as_scalar(op, "temp_attention", temp_attention, patches)
    words = dispatch.as_scalar(op, "temp_words", temp_words, patches)
    pairs = dispatch.as_scalar(op, "temp_pairs", temp_pairs, patches)
    if dispatch.choose(op, impl, patches) == "reference":
        _check_some_valid(op, token_mask, patch_mask)
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
    """Return where in its own image each word of a report looks: A of `local_alignment_loss`.

    Args:
        patches: [B, P, D], the local image features.
        tokens: [B, T, D], the word features, in the dtype of `patches`.
        token_mask: [B, T], True for words.
        patch_mask: [B, P], True for the patches that count; None for all.
        temp_attention: Sharpens the attention; a number or a tensor of one element.

    Returns:
        [B, T, P], at least fp32. The row of a word sums to 1, that of padding is 0.

    Raises:
        ValueError: As `local_alignment_loss`.

    Example:
        >>> import torch
        >>> from medfast.ops import word_patch_attention
        >>> patches = torch.eye(4).reshape(2, 2, 4)
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> word_patch_attention(patches, 3 * patches, mask).argmax(2).tolist()
        [[0, 1], [0, 0]]
    """
    op = "word_patch_attention"
    _check(op, patches, tokens, token_mask, patch_mask)
    attention = dispatch.as_scalar(op, "temp_attention", temp_attention, patches)
    _check_some_valid(op, token_mask, patch_mask)
    with torch.autocast(patches.device.type, enabled=False):
        return reference.word_patch_attention(
            patches, tokens, token_mask, patch_mask=patch_mask, temp_attention=attention
        )


def _check(
    op: str, patches: Tensor, tokens: Tensor, token_mask: Tensor, patch_mask: Tensor | None
) -> None:
    dispatch.check_features(op, patches=(patches, "B, P, D"), tokens=(tokens, "B, T, D"))
    dispatch.check_mask(op, "token_mask", token_mask, tokens)
    if patch_mask is not None:
        dispatch.check_mask(op, "patch_mask", patch_mask, patches)


def _check_some_valid(op: str, token_mask: Tensor, patch_mask: Tensor | None) -> None:
    # A compiled graph cannot stop at what its tensors hold: there, the result is NaN.
    if not torch.compiler.is_compiling():
        dispatch.check_some_valid(op, token_mask, patch_mask)
