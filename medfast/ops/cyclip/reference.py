"""The definition of cyclip_loss: it keeps B x B similarities, for any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def cyclip_loss(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-modal and the in-modal term of CyCLIP; see `medfast.ops.cyclip_loss`."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    image, text = image.to(dtype), text.to(dtype)
    cross_modal = (image @ text.T - text @ image.T).square().mean()
    in_modal = (image @ image.T - text @ text.T).square().mean()
    return len(image) * cross_modal, len(image) * in_modal
