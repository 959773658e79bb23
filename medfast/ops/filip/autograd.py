"""The scores of filip_loss as torch sees them: schema, shapes without data, gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medfast.ops.filip import chunked
from medfast.ops.tiles import summable


def late_interaction(
    patches: Tensor, tokens: Tensor, token_mask: Tensor, patch_mask: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    """Return the scores of M images and N captions, [M, N] and [N, M], both with gradients."""
    needs_grad = torch.is_grad_enabled() and (patches.requires_grad or tokens.requires_grad)
    return filip_loss_fwd(patches, tokens, token_mask, patch_mask, impl, needs_grad)[:2]


@torch.library.custom_op("medfast::filip_loss_fwd", mutates_args=())
def filip_loss_fwd(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    impl: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return both scores and where the maxima are, empty without `needs_grad`.

    That is, for caption i and image j, each word's best patch [N, M, T] and each patch's best word
    [N, M, P]; words are numbered among the caption's words that count. Entries of words and patches
    that do not count mean nothing.
    """
    inputs = (patches, tokens, token_mask, patch_mask, needs_grad)
    if impl == "triton":
        from medfast.ops.filip import triton

        return triton.forward(*inputs)
    if impl == "cpu":
        from medfast.ops.filip import cpu

        return cpu.forward(*inputs)
    return chunked.forward(*inputs, chunked.Passes())


@filip_loss_fwd.register_fake
def _(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    impl: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, N = len(patches), len(tokens)
    scores = patches.new_empty(M, N, dtype=summable(patches))
    return (scores, scores.new_empty(N, M), *chunked.places(patches, tokens, needs_grad))


@torch.library.custom_op("medfast::filip_loss_bwd", mutates_args=())
def filip_loss_bwd(
    d_image_to_text: Tensor,
    d_text_to_image: Tensor,
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    best_patch: Tensor,
    best_word: Tensor,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of patches and tokens; empty where `needs` is false."""
    grads = _backward_of(impl)(
        d_image_to_text.contiguous(),
        d_text_to_image.contiguous(),
        patches,
        tokens,
        token_mask,
        patch_mask,
        best_patch,
        best_word,
        *needs,
    )
    d_patches, d_tokens = (
        x.new_empty(0) if grad is None else grad.to(x.dtype)
        for x, grad in zip((patches, tokens), grads, strict=True)
    )
    return d_patches, d_tokens


@filip_loss_bwd.register_fake
def _(
    d_image_to_text: Tensor,
    d_text_to_image: Tensor,
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    best_patch: Tensor,
    best_word: Tensor,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    d_patches, d_tokens = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in zip((patches, tokens), needs, strict=True)
    )
    return d_patches, d_tokens


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.impl, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    patches, tokens, *rest = ctx.saved_tensors
    M, N = len(patches), len(tokens)
    d_scores = [
        patches.new_zeros(shape, dtype=summable(patches)) if d_output is None else d_output
        for shape, d_output in zip(((M, N), (N, M)), d_outputs[:2], strict=True)
    ]
    needs = list(ctx.needs_input_grad[:2])
    grads = filip_loss_bwd(*d_scores, patches, tokens, *rest, ctx.impl, needs)
    kept = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (*kept, None, None, None, None)


filip_loss_fwd.register_autograd(_backward, setup_context=_setup_context)


def _backward_of(impl: str) -> Callable[..., tuple[Tensor | None, Tensor | None]]:
    if impl == "triton":
        from medfast.ops.filip import triton

        return triton.backward
    if impl == "cpu":
        from medfast.ops.filip import cpu

        return cpu.backward
    return chunked.backward
