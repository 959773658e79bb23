"""The public function sparc_loss: checks, choice of implementation, documentation."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from medfast.ops import dispatch
from medfast.ops.sparc import reference
from medfast.ops.sparc.autograd import fine_grained

_OP = "sparc_loss"


def sparc_loss(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    logit_scale: float | Tensor,
    *,
    patch_mask: Tensor | None = None,
    threshold: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return the fine-grained loss within each pair: words against what they see (SPARC).

    A pair's similarities S_wp = w . v_p are brought to [0, 1] over the patches of each word, set
    to 0 below `threshold` and divided by their sum; with these weights a, c_w = sum_p a_wp v_p is
    what word w sees. With l_ww' = logit_scale cos(c_w, w') the loss is the mean of

        1/2 (logsumexp_w' l_ww' - l_ww) + 1/2 (logsumexp_w' l_w'w - l_ww)

    over the caption's words, and then over the captions. A word that is equally similar to all
    patches, to a relative 1e-6, sees their mean. The gradients are computed with the value; memory
    is bounded by `MEDFAST_WORKSPACE_MB` but in "reference", which keeps B x T x P scores.
    Under autocast the features take its dtype; sums and loss are in fp32.

    Args:
        patches: Patch features [B, P, D], fp32, bf16, fp16 or fp64; not normalised.
        tokens: Token features [B, T, D], likewise; caption i belongs to image i.
        token_mask: bool [B, T], true for the caption's own words: no padding, start or end.
        logit_scale: The inverse temperature, a number or a tensor of one element.
        patch_mask: bool [B, P], true for patches that count; None counts all.
        threshold: Least weight that counts before the division, from 0 to 1; None is one over the
            number of patches that count.
        impl: "auto", "cpu", "triton", "torch" or "reference".

    Returns:
        The loss, a scalar: fp32, or fp64 for fp64 features. NaN features make it NaN.

    Raises:
        ValueError: An argument has another shape, dtype, device or range, a caption has no word,
            an image no patch that counts (on a GPU, where looking would wait for it, either makes
            the loss NaN), or `impl` is unknown.
        RuntimeError: `impl` cannot run here.

    Source:
        Bica et al. 2024, "Improving fine-grained understanding in image-text pre-training",
        arXiv 2401.09865.

    Example:
        >>> import torch
        >>> from medfast.ops import sparc_loss
        >>> patches = tokens = torch.eye(4).reshape(2, 2, 4)
        >>> mask = torch.ones(2, 2, dtype=torch.bool)
        >>> round(sparc_loss(patches, tokens, mask, 1.0).item(), 4)
        0.3133
    """
    dispatch.check_patches_and_tokens(_OP, patches, tokens, token_mask, patch_mask)
    if threshold is not None and not _is_share(threshold):
        raise dispatch.argument_error(
            _OP, "threshold", "a number from 0 to 1, or None", repr(threshold), "Pass a share."
        )
    patches, tokens = dispatch.autocast(patches, tokens)
    scale = dispatch.as_scalar(_OP, "logit_scale", logit_scale, patches)
    chosen = dispatch.choose(_OP, impl, patches)
    with torch.autocast(patches.device.type, enabled=False):
        if chosen == "reference":
            return reference.sparc_loss(
                patches, tokens, token_mask, scale, patch_mask=patch_mask, threshold=threshold
            )
        return fine_grained(patches, tokens, token_mask, patch_mask, scale, threshold, chosen)


def _is_share(value: object) -> bool:
    return isinstance(value, numbers.Real) and 0 <= float(value) <= 1
