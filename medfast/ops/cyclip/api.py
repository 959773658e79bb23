"""The public function cyclip_loss: checks, choice of implementation, documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast.ops import dispatch
from medfast.ops.cyclip import chunked, reference

_OP = "cyclip_loss"


def cyclip_loss(image: Tensor, text: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Return how far a batch is from cyclic consistency, across and within modalities (CyCLIP).

    With image features x and text features y the terms are

        1/B sum_ij (x_i . y_j - y_i . x_j)^2  and  1/B sum_ij (x_i . x_j - y_i . y_j)^2,

    without the weights of 0.25 that the published loss gives them beside InfoNCE. "reference" keeps
    B x B similarities, "torch" products of B x B or D x D, whichever is smaller. "torch" is
    accurate also where the modalities almost agree; where B > D it gives a term far below the
    other to a rounding of that other.

    Args:
        image: Image features [B, D], fp32, bf16, fp16 or fp64; as a rule of unit length.
        text: Text features [B, D], likewise; row i belongs to image i.
        impl: "auto", "torch" or "reference".

    Returns:
        The cross-modal and the in-modal term, two scalars: fp32, or fp64 for fp64 features. NaN
        features make both NaN.

    Raises:
        ValueError: An argument has another shape, dtype or device, or `impl` is unknown.
        RuntimeError: `impl` cannot run here.

    Source:
        Goel et al. 2022, "CyCLIP: Cyclic Contrastive Language-Image Pretraining",
        arXiv 2205.14459.

    Example:
        >>> import torch
        >>> from medfast.ops import cyclip_loss
        >>> image = torch.eye(4)
        >>> [round(term.item(), 4) for term in cyclip_loss(image, image.roll(1, 0))]
        [2.0, 0.0]
    """
    dispatch.check_features(_OP, image=(image, "B D"), text=(text, "B D"))
    loss = {"torch": chunked.cyclip_loss, "reference": reference.cyclip_loss}
    with torch.autocast(image.device.type, enabled=False):
        return loss[dispatch.choose(_OP, impl, image)](image, text)
