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
    """Return the contrastive loss of a batch of image-text pairs (InfoNCE, both directions)."""
    dispatch.check_features(_OP, "B, D", image=image, text=text)
    if image.shape != text.shape:
        raise dispatch.argument_error(
            _OP,
            "image and text",
            "of one shape [B, D]",
            f"{list(image.shape)} and {list(text.shape)}",
            "Pass one text per image, projected to the same width.",
        )
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
