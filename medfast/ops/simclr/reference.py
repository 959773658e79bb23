"""The definition of simclr_loss: a few lines that keep the 2B x 2B logits, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast.ops.pairwise import softplus


def simclr_loss(first: Tensor, second: Tensor, logit_scale: Tensor) -> Tensor:
    """Return NT-Xent; see `medfast.ops.simclr_loss`."""
    dtype = torch.promote_types(first.dtype, torch.float32)
    views = torch.cat([first, second]).to(dtype)
    logits = logit_scale * (views @ views.T)
    partner = torch.arange(len(views), device=views.device).roll(len(first))
    own = logits.gather(1, partner[:, None])
    # Its own view, and the one it should find: outside the sum the loss is exact where it wins.
    left_out = torch.eye(len(views), dtype=torch.bool, device=views.device)
    left_out = left_out | left_out.roll(len(first), 1)
    others = logits.masked_fill(left_out, -torch.inf).logsumexp(1)
    return softplus(others - own[:, 0]).mean()
