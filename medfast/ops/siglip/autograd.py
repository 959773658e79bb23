"""The summed sigmoid loss of a rectangle as torch sees it: schema, shapes, gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medfast.ops import tiles
from medfast.ops.siglip import chunked


def sigmoid_sum(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int = 0,
    impl: str = "torch",
) -> Tensor:
    """Return `sum_ij softplus(-z_ij l_ij)` with `l = logit_scale * rows @ columns.T + logit_bias`.

    z is 1 where j = i + offset and -1 elsewhere. The gradients are computed with the value and
    kept: they take the memory of the features.

    Args:
        rows: [M, D].
        columns: [N, D], of the rows' dtype.
        logit_scale: [].
        logit_bias: [].
        offset: Column that belongs to row 0; outside the rectangle all pairs are negatives.
        impl: "cpu", "triton" or "torch".

    Returns:
        The sum [], in fp32, or fp64 for fp64 features.
    """
    inputs = (rows, columns, logit_scale, logit_bias)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in inputs[:3]]
    return siglip_loss_fwd(*inputs, offset, impl, needs)[0]


@torch.library.custom_op("medfast::siglip_loss_fwd", mutates_args=())
def siglip_loss_fwd(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the sum and its gradients of rows, columns, scale (empty if not needed) and bias."""
    needs_rows, needs_columns, needs_scale = needs
    # One side's product also holds the scale's gradient.
    holds_rows = needs_rows or (needs_scale and not needs_columns)
    inputs = (rows, columns, logit_scale, logit_bias, offset, holds_rows, needs_columns)
    if impl == "triton":
        from medfast.ops.siglip import triton

        loss, *products, d_scale, d_bias = triton.forward(*inputs)
    else:
        loss, *products, d_scale, d_bias = chunked.forward(*inputs, _passes(impl))
    grads = tiles.scaled(products, (rows, columns), logit_scale, needs, d_scale)
    return (loss, *grads, d_bias.to(logit_bias.dtype))


@siglip_loss_fwd.register_fake
def _(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_rows, d_columns, d_scale = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in zip((rows, columns, logit_scale), needs, strict=True)
    )
    loss = rows.new_empty((), dtype=tiles.summable(rows))
    return loss, d_rows, d_columns, d_scale, torch.empty_like(logit_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    # Else torch makes zeros for the gradients that these outputs do not have.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grads = (
        (grad * d_loss).to(grad.dtype) if need else None
        for grad, need in zip(ctx.saved_tensors, ctx.needs_input_grad[:4], strict=True)
    )
    return (*grads, None, None, None)


siglip_loss_fwd.register_autograd(_backward, setup_context=_setup_context)


def _passes(impl: str) -> chunked.Passes:
    if impl == "cpu":
        from medfast.ops.siglip.cpu import CpuPasses

        return CpuPasses()
    return chunked.Passes()
