"""What further positives of a pair add to clip_loss: group sums, O(B D), no B x B target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medfast.ops import tiles


def agreement(image: Tensor, text: Tensor, positives: Tensor) -> Tensor:
    """Return `sum_i x_i . (y_i - mean of y_p over the group of i)`, differentiable.

    Times the scale it is what the cross-entropy with a target uniform over each group has over the
    one with the diagonal as the target: `sum_i (l_ii - mean_p l_ip)`.

    Args:
        image: x [B, D].
        text: y [B, D].
        positives: Group ids, int64 [B].

    Returns:
        A scalar in fp32, or fp64 for fp64 features.
    """
    return clip_loss_positives_fwd(image, text, positives)


@torch.library.custom_op("medfast::clip_loss_positives_fwd", mutates_args=())
def clip_loss_positives_fwd(image: Tensor, text: Tensor, positives: Tensor) -> Tensor:
    """Return the sum; see `agreement`."""
    dtype = tiles.summable(image)
    return (image.to(dtype) * _minus_group_mean(text.to(dtype), positives)).sum()


@clip_loss_positives_fwd.register_fake
def _(image: Tensor, text: Tensor, positives: Tensor) -> Tensor:
    return image.new_empty((), dtype=tiles.summable(image))


@torch.library.custom_op("medfast::clip_loss_positives_bwd", mutates_args=())
def clip_loss_positives_bwd(
    d_sum: Tensor, image: Tensor, text: Tensor, positives: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of image and text."""
    d_image, d_text = (
        (_minus_group_mean(other.to(d_sum.dtype), positives) * d_sum).to(other.dtype)
        for other in (text, image)
    )
    return d_image, d_text


@clip_loss_positives_bwd.register_fake
def _(d_sum: Tensor, image: Tensor, text: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    d_image, d_text = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (image, text)
    )
    return d_image, d_text


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor | None, ...]:
    d_image, d_text = clip_loss_positives_bwd(d_sum, *ctx.saved_tensors)
    return d_image, d_text, None


clip_loss_positives_fwd.register_autograd(_backward, setup_context=_setup_context)


def _minus_group_mean(features: Tensor, positives: Tensor) -> Tensor:
    """Return each row minus the mean of the rows of its id; exactly 0 for a row alone."""
    _, group, counts = torch.unique(positives, return_inverse=True, return_counts=True)
    # Sorted segments, not index_add: its order of summation varies from run to run on a GPU.
    sums = torch.segment_reduce(features[group.argsort(stable=True)], "sum", lengths=counts)
    return features - (sums / counts[:, None])[group]
