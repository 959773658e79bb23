"""sparc_loss as torch sees it: schema, shapes without data, gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medfast.ops.sparc import chunked
from medfast.ops.tiles import summable


def fine_grained(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    logit_scale: Tensor,
    threshold: float | None,
    impl: str,
) -> Tensor:
    """Return the loss []; the gradients are computed with it and kept: memory of the features."""
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (patches, tokens, logit_scale)]
    return sparc_loss_fwd(
        patches, tokens, token_mask, patch_mask, logit_scale, threshold, impl, needs
    )[0]


@torch.library.custom_op("medfast::sparc_loss_fwd", mutates_args=())
def sparc_loss_fwd(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    logit_scale: Tensor,
    threshold: float | None,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss and its gradients of patches, tokens and scale, empty if not needed.

    The scale's gradient comes with either of the others, needed or not.
    """
    loss, *grads = _forward_of(impl)(
        patches, tokens, token_mask, patch_mask, logit_scale, threshold, any(needs)
    )
    d_patches, d_tokens, d_scale = (
        x.new_empty(0) if grad is None or not need else grad.to(_kept_dtype(x))
        for x, grad, need in zip((patches, tokens, logit_scale), grads, needs, strict=True)
    )
    return loss, d_patches, d_tokens, d_scale


@sparc_loss_fwd.register_fake
def _(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    logit_scale: Tensor,
    threshold: float | None,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_patches, d_tokens, d_scale = (
        x.new_empty(x.shape, dtype=_kept_dtype(x)) if need else x.new_empty(0)
        for x, need in zip((patches, tokens, logit_scale), needs, strict=True)
    )
    return patches.new_empty((), dtype=summable(patches)), d_patches, d_tokens, d_scale


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [inputs[0].dtype, inputs[1].dtype, inputs[4].dtype]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    d_patches, d_tokens, d_scale = (
        (grad * d_loss).to(dtype) if need else None
        for grad, dtype, need in zip(
            ctx.saved_tensors,
            ctx.dtypes,
            (*ctx.needs_input_grad[:2], ctx.needs_input_grad[4]),
            strict=True,
        )
    )
    return d_patches, d_tokens, None, None, d_scale, None, None, None


sparc_loss_fwd.register_autograd(_backward, setup_context=_setup_context)


def _kept_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a gradient waits for that of the loss.

    fp16 holds nothing below 2**-24: small gradients would be lost before a scaled loss lifts them.
    """
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _forward_of(
    impl: str,
) -> Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    if impl == "triton":
        from medfast.ops.sparc import triton

        return triton.forward
    if impl == "cpu":
        from medfast.ops.sparc import cpu

        return cpu.forward
    return chunked.forward
