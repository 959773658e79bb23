"""The public function siglip_loss: checks, choice of implementation, documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast.ops import dispatch
from medfast.ops.siglip import reference
from medfast.ops.siglip.autograd import sigmoid_sum

_OP = "siglip_loss"


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return the sigmoid loss of a batch of image-text pairs.

    With logits `l = logit_scale * image @ text.T + logit_bias` and z_ij = 1 for pairs, else -1,

        1/B sum_ij softplus(-z_ij l_ij).

    "reference" keeps the B x B logits; the others work in tiles within `MEDFAST_WORKSPACE_MB` and,
    where gradients are wanted, compute them with the value.

    Args:
        image: Image features [B, D], fp32, bf16, fp16 or fp64; as a rule of unit length.
        text: Text features [B, D], likewise; row i belongs to image i.
        logit_scale: The inverse temperature, a number or a tensor of one element.
        logit_bias: The bias, likewise; negative, as most pairs do not match.
        impl: "auto", "cpu", "triton", "torch" or "reference".

    Returns:
        The loss, a scalar: fp32, or fp64 for fp64 features. NaN features make it NaN.

    Raises:
        ValueError: An argument has another shape, dtype or device, or `impl` is unknown.
        RuntimeError: `impl` cannot run here.

    Source:
        Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343.

    Example:
        >>> import torch
        >>> from medfast.ops import siglip_loss
        >>> features = torch.eye(4)
        >>> round(siglip_loss(features, features, 10.0, -5.0).item(), 4)
        0.0269
    """
    dispatch.check_features(_OP, image=(image, "B D"), text=(text, "B D"))
    image, text = dispatch.autocast(image, text)
    scale = dispatch.as_scalar(_OP, "logit_scale", logit_scale, image)
    bias = dispatch.as_scalar(_OP, "logit_bias", logit_bias, image)
    chosen = dispatch.choose(_OP, impl, image)
    with torch.autocast(image.device.type, enabled=False):
        if chosen == "reference":
            return reference.siglip_loss(image, text, scale, bias)
        return sigmoid_sum(image, text, scale, bias, impl=chosen) / len(image)
