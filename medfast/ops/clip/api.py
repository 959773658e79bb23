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
    """Return the contrastive loss of a batch of image-text pairs: InfoNCE in both directions.

    With logits l = logit_scale * image @ text.T and the positives p of row i, the loss is the mean
    of `logsumexp_j l_ij - mean_p l_ip` over rows, averaged with the same over columns.

    Memory: a few vectors of B and O(B * D). The B x B logits are recomputed in tiles within
    `MEDFAST_WORKSPACE_MB`; only impl="reference" keeps them.

    Args:
        image: [B, D], one row per pair, usually of length 1.
        text: [B, D], in the dtype of `image`.
        logit_scale: What the products are multiplied by, not its logarithm; a number or a tensor
            of one element.
        positives: [B], int64 group ids. Pairs of one id are positives of one another and share
            the target evenly; None makes each pair its own only positive.
        impl: "auto" (the fastest here), "cpu", "torch" or "reference".

    Returns:
        The loss, a 0-d fp32 tensor (fp64 for fp64 features). Sums are in fp32 whatever the dtype
        of the features, under autocast too.

    Raises:
        ValueError: An argument has a wrong shape, dtype or device, or `impl` is not known.
        RuntimeError: The implementation asked for cannot run here.

    Source: Radford et al. 2021, https://arxiv.org/abs/2103.00020

    Example:
        >>> import torch
        >>> from medfast.ops import clip_loss
        >>> features = torch.eye(4)
        >>> print(f"{clip_loss(features, features, 10.0):.6f}")
        0.000136
        >>> ids = torch.tensor([0, 0, 1, 2])
        >>> print(f"{clip_loss(features, features, 10.0, positives=ids):.4f}")
        2.5001
    """
    dispatch.check_features(_OP, image=(image, "B, D"), text=(text, "B, D"))
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
