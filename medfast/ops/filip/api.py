"""The public functions of FILIP: checks, choice of implementation, documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast.ops import dispatch, pairwise
from medfast.ops.filip import reference
from medfast.ops.filip.autograd import late_interaction

_OP = "filip_loss"


def filip_loss(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    logit_scale: float | Tensor,
    *,
    patch_mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return the contrastive loss of late interaction between patches and words (FILIP).

    Image j and caption i match each other as well as their best parts do,

        image to text: mean_p max_w v_jp . w_i,    text to image: mean_w max_p w_i . v_jp,

    over all patches and words that count, and the loss is the cross-entropy of `logit_scale` times
    each with the matching pairs, the mean of the two. Of equal parts the first counts.
    "reference" keeps the B x B x T x P products; the others work in tiles within
    `MEDFAST_WORKSPACE_MB` and keep, for the backward, the place of each maximum: B x B x (T + P)
    bytes. Under autocast the features take its dtype; sums and loss are in fp32.

    Args:
        patches: Patch features [B, P, D], fp32, bf16, fp16 or fp64; as a rule of unit length.
        tokens: Token features [B, T, D], likewise; caption i belongs to image i.
        token_mask: bool [B, T], true for the caption's own words: no padding, start or end.
        logit_scale: The inverse temperature, a number or a tensor of one element.
        patch_mask: bool [B, P], true for patches that count; None counts all.
        impl: "auto", "cpu", "triton", "torch" or "reference".

    Returns:
        The loss, a scalar: fp32, or fp64 for fp64 features. NaN features make it NaN.

    Raises:
        ValueError: An argument has another shape, dtype or device, a caption has no word, an
            image no patch that counts (on a GPU, where looking would wait for it, either makes
            the loss NaN), or `impl` is unknown.
        RuntimeError: `impl` cannot run here.

    Source:
        Yao et al. 2022, "FILIP: Fine-grained Interactive Language-Image Pre-Training",
        arXiv 2111.07783.

    Example:
        >>> import torch
        >>> from medfast.ops import filip_loss
        >>> patches = tokens = torch.eye(4).reshape(2, 2, 4)
        >>> mask = torch.ones(2, 2, dtype=torch.bool)
        >>> round(filip_loss(patches, tokens, mask, 1.0).item(), 4)
        0.3133
    """
    dispatch.check_patches_and_tokens(_OP, patches, tokens, token_mask, patch_mask)
    scale = dispatch.as_scalar(_OP, "logit_scale", logit_scale, patches)
    image_to_text, text_to_image = _scores(patches, tokens, token_mask, patch_mask, impl)
    return pairwise.two_way_cross_entropy(scale * image_to_text, scale * text_to_image)


def filip_scores(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    *,
    patch_mask: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return how well M images match N captions, as `filip_loss` scores them, with gradients.

    Args:
        patches: [M, P, D], as in `filip_loss`.
        tokens: [N, T, D], as in `filip_loss`.
        token_mask: bool [N, T], as in `filip_loss`.
        patch_mask: bool [M, P], as in `filip_loss`.
        impl: As in `filip_loss`.

    Returns:
        Image to text [M, N] and text to image [N, M], in fp32, or fp64 for fp64 features.

    Raises:
        ValueError: As in `filip_loss`.
        RuntimeError: As in `filip_loss`.
    """
    op = "filip_scores"
    dispatch.check_patches_and_tokens(op, patches, tokens, token_mask, patch_mask, paired=False)
    return _scores(patches, tokens, token_mask, patch_mask, impl)


def _scores(
    patches: Tensor, tokens: Tensor, token_mask: Tensor, patch_mask: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    patches, tokens = dispatch.autocast(patches, tokens)
    chosen = dispatch.choose(_OP, impl, patches)
    with torch.autocast(patches.device.type, enabled=False):
        if chosen == "reference":
            return reference.filip_scores(patches, tokens, token_mask, patch_mask=patch_mask)
        return late_interaction(patches, tokens, token_mask, patch_mask, impl=chosen)
