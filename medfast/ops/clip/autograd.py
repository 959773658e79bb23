"""clip_loss as torch sees it: schema, shapes without data, gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medfast.ops import pairwise
from medfast.ops.clip import chunked
from medfast.ops.clip.chunked import TileOps


@torch.library.custom_op("medfast::clip_loss_fwd", mutates_args=())
def clip_loss_fwd(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    positives: Tensor | None = None,
    impl: str = "torch",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss and what its gradient needs: see `chunked.forward`."""
    with torch.autocast(image.device.type, enabled=False):
        diagonal, rows, columns = chunked.forward(
            image, text, logit_scale, _tile_ops(impl, logit_scale)
        )
        loss = pairwise.cross_entropy_of_sums(diagonal, rows, columns)
        if positives is not None:
            image, text = image.to(loss.dtype), text.to(loss.dtype)
            loss += logit_scale * (image * _minus_group_mean(text, positives)).sum() / len(image)
    return loss, diagonal, rows, columns


@clip_loss_fwd.register_fake
def _(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    positives: Tensor | None = None,
    impl: str = "torch",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(image.dtype, torch.float32)
    diagonal, rows, columns = (image.new_empty(len(image), dtype=dtype) for _ in range(3))
    return image.new_empty((), dtype=dtype), diagonal, rows, columns


@torch.library.custom_op("medfast::clip_loss_bwd", mutates_args=())
def clip_loss_bwd(
    d_loss: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    positives: Tensor | None,
    diagonal: Tensor,
    rows: Tensor,
    columns: Tensor,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of image, text and logit_scale; empty where `needs` is false."""
    needs_image, needs_text, needs_scale = needs
    # One side's product also holds the scale's gradient.
    holds_image = needs_image or (needs_scale and not needs_text)
    with torch.autocast(image.device.type, enabled=False):
        d_image, d_text = chunked.backward(
            image,
            text,
            logit_scale,
            diagonal,
            rows,
            columns,
            holds_image,
            needs_text,
            _tile_ops(impl, logit_scale),
        )
        if positives is not None:
            if d_image is not None:
                d_image.add_(_minus_group_mean(text.to(d_image.dtype), positives), alpha=2)
            if d_text is not None:
                d_text.add_(_minus_group_mean(image.to(d_text.dtype), positives), alpha=2)
        weight = d_loss / (2 * len(image))
        d_scale = logit_scale.new_empty(0)
        if needs_scale:
            held = [(x, d) for x, d in ((image, d_image), (text, d_text)) if d is not None]
            features, gradient = held[0]
            d_scale = ((features * gradient).sum() * weight).to(logit_scale.dtype)
        weight = weight * logit_scale
        return (
            _weighted(d_image if needs_image else None, weight, image),
            _weighted(d_text, weight, text),
            d_scale,
        )


@clip_loss_bwd.register_fake
def _(
    d_loss: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    positives: Tensor | None,
    diagonal: Tensor,
    rows: Tensor,
    columns: Tensor,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    image, text, scale = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in zip((image, text, logit_scale), needs, strict=True)
    )
    return image, text, scale


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, logit_scale, positives, ctx.impl = inputs
    ctx.save_for_backward(image, text, logit_scale, positives, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    grads = clip_loss_bwd(d_loss, *ctx.saved_tensors, ctx.impl, needs)
    kept = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (*kept, None, None)


clip_loss_fwd.register_autograd(_backward, setup_context=_setup_context)


def _tile_ops(impl: str, logit_scale: Tensor) -> TileOps:
    if impl == "cpu":
        from medfast.ops.clip.cpu import CpuTileOps

        return CpuTileOps(logit_scale)
    return TileOps()


def _weighted(gradient: Tensor | None, weight: Tensor, features: Tensor) -> Tensor:
    return features.new_empty(0) if gradient is None else (gradient * weight).to(features.dtype)


def _minus_group_mean(features: Tensor, positives: Tensor) -> Tensor:
    """Return each row minus the mean of the rows of its id; exactly 0 for a row alone."""
    _, group, counts = torch.unique(positives, return_inverse=True, return_counts=True)
    # Sorted segments, not index_add: its order of summation varies from run to run on a GPU.
    sums = torch.segment_reduce(features[group.argsort(stable=True)], "sum", lengths=counts)
    return features - (sums / counts[:, None])[group]
