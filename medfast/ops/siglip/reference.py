"""The definition of siglip_loss: a few lines that keep the B x B logits, for any device, dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def siglip_loss(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Return the mean over images of the sigmoid losses of all texts; see `ops.siglip_loss`."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    logits = logit_scale * (image.to(dtype) @ text.to(dtype).T) + logit_bias
    label = 2 * torch.eye(len(image), dtype=dtype, device=image.device) - 1
    return -F.logsigmoid(label * logits).sum() / len(image)
