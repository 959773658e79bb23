"""The pair scores of local_alignment_loss as torch sees them: schema, fake shapes, gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medfast.ops.local_alignment import chunked


@torch.library.custom_op("medfast::local_alignment_loss_fwd", mutates_args=())
def local_alignment_loss_fwd(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    temp_attention: Tensor,
    temp_words: Tensor,
) -> Tensor:
    """Return the scores [B, B] of caption i (row) and image j (column): see `chunked.forward`."""
    with torch.autocast(patches.device.type, enabled=False):
        return chunked.forward(patches, tokens, token_mask, patch_mask, temp_attention, temp_words)


@local_alignment_loss_fwd.register_fake
def _(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    temp_attention: Tensor,
    temp_words: Tensor,
) -> Tensor:
    dtype = torch.promote_types(patches.dtype, torch.float32)
    return patches.new_empty(len(patches), len(patches), dtype=dtype)


@torch.library.custom_op("medfast::local_alignment_loss_bwd", mutates_args=())
def local_alignment_loss_bwd(
    d_scores: Tensor,
    scores: Tensor,
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    temp_attention: Tensor,
    temp_words: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of patches, tokens, temp_attention and temp_words."""
    inputs = (patches, tokens, temp_attention, temp_words)
    with torch.autocast(patches.device.type, enabled=False):
        grads = chunked.backward(
            d_scores, scores, patches, tokens, token_mask, patch_mask, temp_attention, temp_words
        )
    d_patches, d_tokens, *d_temps = (
        grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)
    )
    return d_patches, d_tokens, d_temps[0], d_temps[1]


@local_alignment_loss_bwd.register_fake
def _(
    d_scores: Tensor,
    scores: Tensor,
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    temp_attention: Tensor,
    temp_words: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_patches, d_tokens = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (patches, tokens)
    )
    return d_patches, d_tokens, torch.empty_like(temp_attention), torch.empty_like(temp_words)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs)


def _backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor | None, ...]:
    d_patches, d_tokens, *d_temps = local_alignment_loss_bwd(d_scores, *ctx.saved_tensors)
    return d_patches, d_tokens, None, None, *d_temps


local_alignment_loss_fwd.register_autograd(_backward, setup_context=_setup_context)
