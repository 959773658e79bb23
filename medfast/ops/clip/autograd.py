"""The log-sum-exps under clip_loss as torch sees them: schema, shapes without data, gradient.

They are of a rectangle, so that a block of another rank's features, or the second half of a batch
of views, is scored with the same op; what is built from them costs O(M + N).
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from medfast.ops import tiles
from medfast.ops.clip import chunked
from medfast.ops.workspace import lend

# They never keep logits.
_ON_A_GPU = ("cuda", "triton")


def log_sum_exps(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, offset: int = 0, impl: str = "torch"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return own logits and the log-sum-exps without them; all three have gradients.

    With `l = logit_scale * rows @ columns.T`, M x N, and row i's own column i + offset:

        own_i = l_i,i+offset,  r_i = logsumexp_{j != i+offset} l_ij,  c_j likewise over rows.

    Args:
        rows: [M, D].
        columns: [N, D], of the rows' dtype.
        logit_scale: [].
        offset: Column that belongs to row 0; outside the rectangle nothing is left out.
        impl: "cpu", "cuda", "triton" or "torch".

    Returns:
        own [M], -inf where the own column does not exist; r [M]; c [N]; -inf where nothing is left
        to sum. In fp32, or fp64 for fp64 features.
    """
    needs_grad = torch.is_grad_enabled() and (
        rows.requires_grad or columns.requires_grad or logit_scale.requires_grad
    )
    return clip_loss_fwd(rows, columns, logit_scale, offset, impl, needs_grad)[:3]


@torch.library.custom_op("medfast::clip_loss_fwd", mutates_args=())
def clip_loss_fwd(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, offset: int, impl: str, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return own logits, both log-sum-exps and the kept logits [M, N], empty where not kept."""
    if impl in _ON_A_GPU:
        sums = _kernels(impl).forward(rows, columns, logit_scale, offset)
        return (*sums, rows.new_empty(0, 0, dtype=_kept_dtype(rows, impl)))
    shape = _kept_shape(rows, columns, impl, needs_grad)
    kept = lend(math.prod(shape), rows, _kept_dtype(rows, impl)).view(shape)
    sums = chunked.forward(rows, columns, logit_scale, offset, kept, _passes(impl, logit_scale))
    return (*sums, kept)


@clip_loss_fwd.register_fake
def _(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, offset: int, impl: str, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own, row_lse, column_lse = (
        x.new_empty(len(x), dtype=tiles.summable(x)) for x in (rows, rows, columns)
    )
    shape = _kept_shape(rows, columns, impl, needs_grad)
    return own, row_lse, column_lse, own.new_empty(shape, dtype=_kept_dtype(rows, impl))


@torch.library.custom_op("medfast::clip_loss_bwd", mutates_args=())
def clip_loss_bwd(
    d_own: Tensor,
    d_rows: Tensor,
    d_columns: Tensor,
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    offset: int,
    own: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    kept: Tensor,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of rows, columns and logit_scale; empty where `needs` is false."""
    needs_rows, needs_columns, needs_scale = needs
    # One side's product also holds the scale's gradient.
    holds_rows = needs_rows or (needs_scale and not needs_columns)
    d_logits = (d_own, d_rows.contiguous(), d_columns.contiguous())
    inputs = (*d_logits, rows, columns, logit_scale, offset, own, row_lse, column_lse)
    if impl in _ON_A_GPU:
        *products, d_scale = _kernels(impl).backward(*inputs, holds_rows, needs_columns)
    else:
        passes = _passes(impl, logit_scale)
        gradients = passes.gradients_of_features(
            *d_logits, rows, columns, offset, own, row_lse, column_lse, kept, needs
        )
        if gradients is not None:
            return gradients
        *products, d_scale = chunked.backward(*inputs, kept, holds_rows, needs_columns, passes)
    return tiles.scaled(products, (rows, columns), logit_scale, needs, d_scale)


@clip_loss_bwd.register_fake
def _(
    d_own: Tensor,
    d_rows: Tensor,
    d_columns: Tensor,
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    offset: int,
    own: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    kept: Tensor,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_y, d_scale = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in zip((rows, columns, logit_scale), needs, strict=True)
    )
    return d_x, d_y, d_scale


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, columns, logit_scale, ctx.offset, ctx.impl, _ = inputs
    ctx.save_for_backward(rows, columns, logit_scale, *output)
    ctx.mark_non_differentiable(output[3])
    # Else torch makes zeros for the gradient that the kept logits do not have.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    rows, columns, logit_scale, *outputs = ctx.saved_tensors
    d_sums = [
        torch.zeros_like(output) if d_output is None else d_output
        for output, d_output in zip(outputs[:3], d_outputs[:3], strict=True)
    ]
    needs = list(ctx.needs_input_grad[:3])
    grads = clip_loss_bwd(
        *d_sums, rows, columns, logit_scale, ctx.offset, *outputs, ctx.impl, needs
    )
    kept = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (*kept, None, None, None)


clip_loss_fwd.register_autograd(_backward, setup_context=_setup_context)


def _kernels(impl: str) -> ModuleType:
    """Return the module that launches the kernels of "cuda" or "triton"."""
    # The one needs csrc's CUDA module, the other takes its time to import.
    return importlib.import_module(f"medfast.ops.clip.{impl}")


def _passes(impl: str, logit_scale: Tensor) -> chunked.Passes:
    if impl == "cpu":
        from medfast.ops.clip.cpu import CpuPasses

        return CpuPasses(logit_scale)
    return chunked.Passes(logit_scale)


def _kept_shape(rows: Tensor, columns: Tensor, impl: str, needs_grad: bool) -> tuple[int, int]:
    """Return the shape of all logits where the backward wants them and the workspace holds them."""
    if not needs_grad or impl in _ON_A_GPU or not tiles.fits_workspace(rows, columns):
        return 0, 0
    if _kept_dtype(rows, impl) == torch.int16:
        return chunked.whole_panels(len(rows)), chunked.whole_panels(len(columns))
    return len(rows), len(columns)


def _kept_dtype(rows: Tensor, impl: str) -> torch.dtype:
    """Return the dtype of kept logits: that of sums, or int16 for `chunked.KeptLogits`."""
    is_bf16 = tiles.operand_dtype(rows) == torch.bfloat16
    return torch.int16 if impl == "cpu" and is_bf16 else tiles.summable(rows)
