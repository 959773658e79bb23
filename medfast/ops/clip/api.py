"""The public function clip_loss: checks, choice of implementation, documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast.ops import dispatch, pairwise
from medfast.ops.clip import reference
from medfast.ops.clip.autograd import log_sum_exps
from medfast.ops.clip.positives import agreement

_OP = "clip_loss"


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    positives: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return the contrastive loss of a batch of image-text pairs (InfoNCE, both directions).

    With logits `l = logit_scale * image @ text.T` it is

        1/2 mean_i (logsumexp_j l_ij - l_ii) + 1/2 mean_j (logsumexp_i l_ij - l_jj),

    exact also where the diagonal wins by far or the features are not normalised. "reference" keeps
    the B x B logits in any case; the others keep them where `MEDFAST_WORKSPACE_MB` holds them,
    and else compute them again in tiles. Under autocast the features take its dtype; sums, loss
    and the gradient of the scale are in fp32.

    Args:
        image: Image features [B, D], fp32, bf16, fp16 or fp64; as a rule of unit length.
        text: Text features [B, D], likewise; row i belongs to image i.
        logit_scale: The inverse temperature, a number or a tensor of one element.
        positives: Group ids, int64 [B]: rows of equal id are positives of one another, the mean
            over them taken outside the logarithm. None stands for the diagonal alone.
        impl: "auto", "cpu", "triton", "cuda", "torch" or "reference". "cuda" takes bf16 and fp16
            features alone and was not yet run on a GPU: "auto" does not choose it.

    Returns:
        The loss, a scalar: fp32, or fp64 for fp64 features. NaN features make it NaN.

    Raises:
        ValueError: An argument has another shape, dtype or device, or `impl` is unknown.
        RuntimeError: `impl` cannot run here.

    Source:
        Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
        Supervision", arXiv 2103.00020.

    Example:
        >>> import torch
        >>> from medfast.ops import clip_loss
        >>> features = torch.eye(4)
        >>> round(clip_loss(features, features, 1.0).item(), 4)
        0.7437
    """
    dispatch.check_features(_OP, image=(image, "B D"), text=(text, "B D"))
    if positives is not None:
        dispatch.check_ids(_OP, "positives", positives, image, "pair")
    image, text = dispatch.autocast(image, text)
    scale = dispatch.as_scalar(_OP, "logit_scale", logit_scale, image)
    chosen = dispatch.choose(_OP, impl, image)
    with torch.autocast(image.device.type, enabled=False):
        if chosen == "reference":
            return reference.clip_loss(image, text, scale, positives=positives)
        loss = pairwise.cross_entropy_of_sums(*log_sum_exps(image, text, scale, impl=chosen))
        if positives is not None:
            loss = loss + scale * agreement(image, text, positives) / len(image)
        return loss
