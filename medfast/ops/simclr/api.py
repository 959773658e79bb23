"""The public function simclr_loss: checks, choice of implementation, documentation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from medfast.ops import dispatch
from medfast.ops.clip.autograd import log_sum_exps
from medfast.ops.pairwise import softplus
from medfast.ops.simclr import reference

_OP = "simclr_loss"

Sums = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def simclr_loss(
    first: Tensor, second: Tensor, logit_scale: float | Tensor = 10.0, *, impl: str = "auto"
) -> Tensor:
    """Return the contrastive loss of two views of each of B images (SimCLR's NT-Xent).

    With the 2B views z, each image's other view p(i), and `l = logit_scale * z @ z.T`, it is

        mean_i (logsumexp_{j != i} l_ij - l_i,p(i)),

    exact also where the partners win by far. The rectangles of logits, first by second, first by
    first and second by second, are tiles of `clip_loss`: never kept beyond the workspace.

    Args:
        first: Features of the first views [B, D], fp32, bf16, fp16 or fp64; as a rule unit.
        second: Features of the second views [B, D], likewise; row i is of the same image.
        logit_scale: The inverse temperature, a number or a tensor of one element.
        impl: "auto", "cpu", "triton", "torch" or "reference".

    Returns:
        The loss, a scalar: fp32, or fp64 for fp64 features. NaN features make it NaN.

    Raises:
        ValueError: An argument has another shape, dtype or device, or `impl` is unknown.
        RuntimeError: `impl` cannot run here.

    Source:
        Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations",
        arXiv 2002.05709; in SLIP by Mu et al. 2022, arXiv 2112.12750, at the temperature 0.1.

    Example:
        >>> import torch
        >>> from medfast.ops import simclr_loss
        >>> views = torch.eye(4)
        >>> round(simclr_loss(views, views, 1.0).item(), 4)
        1.1654
    """
    dispatch.check_features(_OP, first=(first, "B D"), second=(second, "B D"))
    first, second = dispatch.autocast(first, second)
    scale = dispatch.as_scalar(_OP, "logit_scale", logit_scale, first)
    chosen = dispatch.choose(_OP, impl, first)
    with torch.autocast(first.device.type, enabled=False):
        if chosen == "reference":
            return reference.simclr_loss(first, second, scale)
        return of_sums(first, second, partial(log_sum_exps, logit_scale=scale, impl=chosen))


def of_sums(first: Tensor, second: Tensor, sums: Sums) -> Tensor:
    """Return the loss of views [B, D] from what `sums` returns of two sets of rows.

    That is each row's own logit, and its log-sum-exp and its column's without it, all [B].
    """
    # Own entries, left out of the sums, are the partners across and each view within.
    own, from_first, from_second = sums(first, second)
    losses = []
    for views, across in ((first, from_first), (second, from_second)):
        _, within, _ = sums(views, views)
        losses.append(softplus(torch.stack([across, within]).logsumexp(0) - own).mean())
    return (losses[0] + losses[1]) / 2
