"""The public function clip_loss: checks, choice of implementation, documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast.ops import dispatch
from medfast.ops.clip import reference
from medfast.ops.clip.autograd import clip_loss_fwd

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
    the B x B logits; "torch" and "cpu" recompute them in tiles within `MEDFAST_WORKSPACE_MB`.

    Args:
        image: Image features [B, D], fp32, bf16, fp16 or fp64; as a rule of unit length.
        text: Text features [B, D], likewise; row i belongs to image i.
        logit_scale: The inverse temperature, a number or a tensor of one element.
        positives: Group ids, int64 [B]: rows of equal id are positives of one another, the mean
            over them taken outside the logarithm. None stands for the diagonal alone.
        impl: "auto", "cpu", "torch" or "reference".

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
        if positives.dtype != torch.int64 or positives.shape != image.shape[:1]:
            raise dispatch.argument_error(
                _OP,
                "positives",
                f"torch.int64 [{len(image)}]",
                f"{positives.dtype} {list(positives.shape)}",
                "Pass one group id per pair.",
            )
        dispatch.check_device(_OP, "positives", positives, image)
    scale = dispatch.as_scalar(_OP, "logit_scale", logit_scale, image)
    chosen = dispatch.choose(_OP, impl, image)
    if chosen == "reference":
        with torch.autocast(image.device.type, enabled=False):
            return reference.clip_loss(image, text, scale, positives=positives)
    return clip_loss_fwd(image, text, scale, positives, chosen)[0]
