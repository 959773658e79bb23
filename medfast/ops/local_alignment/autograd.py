"""The pair scores of local_alignment_loss as torch sees them: schema, fake shapes, gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medfast.ops.local_alignment import chunked
from medfast.ops.tiles import operand_dtype, summable
from medfast.ops.workspace import lend


def pair_scores(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    temp_attention: Tensor,
    temp_words: Tensor,
    impl: str,
) -> Tensor:
    """Return the scores [N, M] of N captions and M images, with gradients."""
    inputs = (patches, tokens, token_mask, patch_mask, temp_attention, temp_words)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return local_alignment_loss_fwd(*inputs, impl, needs_grad)[0]


@torch.library.custom_op("medfast::local_alignment_loss_fwd", mutates_args=())
def local_alignment_loss_fwd(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    temp_attention: Tensor,
    temp_words: Tensor,
    impl: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return the scores [N, M] of caption i (row) and image j (column), and what is kept."""
    inputs = (patches, tokens, token_mask, patch_mask)
    size = _kept_entries(patches, tokens, impl, needs_grad)
    kept = lend(size, patches, summable(patches))
    if impl == "triton":
        from medfast.ops.local_alignment import triton

        return triton.forward(*inputs, temp_attention, temp_words), kept
    if _is_fused(patches, impl):
        from medfast.ops.local_alignment import fused

        return fused.forward(*inputs, temp_attention, temp_words), kept
    return chunked.forward(*inputs, kept, _passes(impl)(temp_attention, temp_words)), kept


@local_alignment_loss_fwd.register_fake
def _(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    temp_attention: Tensor,
    temp_words: Tensor,
    impl: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    scores = patches.new_empty(len(tokens), len(patches), dtype=summable(patches))
    return scores, scores.new_empty(_kept_entries(patches, tokens, impl, needs_grad))


@torch.library.custom_op("medfast::local_alignment_loss_bwd", mutates_args=())
def local_alignment_loss_bwd(
    d_scores: Tensor,
    scores: Tensor,
    kept: Tensor,
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    temp_attention: Tensor,
    temp_words: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of patches, tokens, temp_attention and temp_words."""
    inputs = (d_scores, scores, patches, tokens, token_mask, patch_mask)
    if impl == "triton":
        from medfast.ops.local_alignment import triton

        grads = triton.backward(*inputs, temp_attention, temp_words)
    elif _is_fused(patches, impl):
        from medfast.ops.local_alignment import fused

        grads = fused.backward(*inputs, temp_attention, temp_words)
    else:
        grads = chunked.backward(*inputs, kept, _passes(impl)(temp_attention, temp_words))
    d_patches, d_tokens, *d_temps = (
        grad.to(x.dtype)
        for grad, x in zip(grads, (patches, tokens, temp_attention, temp_words), strict=True)
    )
    return d_patches, d_tokens, d_temps[0], d_temps[1]


@local_alignment_loss_bwd.register_fake
def _(
    d_scores: Tensor,
    scores: Tensor,
    kept: Tensor,
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    temp_attention: Tensor,
    temp_words: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_patches, d_tokens = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (patches, tokens)
    )
    return d_patches, d_tokens, torch.empty_like(temp_attention), torch.empty_like(temp_words)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.impl, _ = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])
    # Else torch makes zeros for the gradient that what is kept does not have.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_scores: Tensor, _: None) -> tuple[Tensor | None, ...]:
    d_patches, d_tokens, *d_temps = local_alignment_loss_bwd(d_scores, *ctx.saved_tensors, ctx.impl)
    return d_patches, d_tokens, None, None, *d_temps, None, None


local_alignment_loss_fwd.register_autograd(_backward, setup_context=_setup_context)


def _passes(impl: str) -> type[chunked.Passes]:
    if impl == "cpu":
        from medfast.ops.local_alignment.cpu import CpuPasses

        return CpuPasses
    return chunked.Passes


def _is_fused(patches: Tensor, impl: str) -> bool:
    return impl == "cpu" and operand_dtype(patches) == torch.bfloat16


def _kept_entries(patches: Tensor, tokens: Tensor, impl: str, needs_grad: bool) -> int:
    keeps = needs_grad and impl != "triton" and not _is_fused(patches, impl)
    return chunked.kept_entries(patches, tokens) if keeps else 0
