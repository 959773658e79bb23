"""The definition of clip_loss: a few lines that keep the B x B logits, for any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast.ops import pairwise


def clip_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, positives: Tensor | None = None
) -> Tensor:
    """Return InfoNCE, the mean of both directions; see `medfast.ops.clip_loss`."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    logits = logit_scale * (image.to(dtype) @ text.to(dtype).T)
    return pairwise.cross_entropy(logits, positives)
