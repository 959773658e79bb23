"""The global losses over the pairs of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from medfast.distributed.positives import agreement, gathered_agreement
from medfast.distributed.ring import Ring, gathered, gradients_around, share, total
from medfast.ops import dispatch, pairwise
from medfast.ops.clip.autograd import clip_loss_bwd, clip_loss_fwd
from medfast.ops.cyclip import chunked as cyclip
from medfast.ops.cyclip import reference as cyclip_reference
from medfast.ops.siglip.autograd import sigmoid_sum
from medfast.ops.simclr.api import of_sums
from medfast.ops.tiles import summable


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    ring: Ring,
    *,
    positives: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return this rank's part of `medfast.ops.clip_loss` over the pairs of all ranks.

    The mean of the parts over the ranks is the loss of the whole batch, and the mean of their
    gradients, as DistributedDataParallel takes it, is its gradient: what open_clip calls
    `local_loss` and `gather_with_grad`. Ranks may have batches of different sizes. "reference"
    gathers all features on every rank.

    Args:
        image: Image features of this rank [B, D].
        text: Text features of this rank [B, D].
        logit_scale: The inverse temperature, the same on every rank.
        ring: The ranks.
        positives: Group ids of this rank's pairs, int64 [B]; pairs of equal id are positives of one
            another on whatever ranks. None on all ranks stands for the diagonal alone.
        impl: As in `medfast.ops.clip_loss`.

    Raises:
        ValueError: An argument has another shape, dtype or device, or `impl` is unknown.
        RuntimeError: `impl` cannot run here.
    """
    dispatch.check_features("clip_loss", image=(image, "B D"), text=(text, "B D"))
    if positives is not None:
        dispatch.check_ids("clip_loss", "positives", positives, image, "pair")
    image, text = dispatch.autocast(image, text)
    scale = dispatch.as_scalar("clip_loss", "logit_scale", logit_scale, image)
    chosen = dispatch.choose("clip_loss", impl, image)
    with torch.autocast(image.device.type, enabled=False):
        sizes = ring.sizes(image)
        sums = _log_sum_exps(image, text, scale, ring, sizes, chosen)
        loss = pairwise.cross_entropy_of_sums(*sums)
        if positives is not None:
            of_groups = gathered_agreement if chosen == "reference" else agreement
            loss = loss + scale * of_groups(image, text, positives, ring, sizes) / len(image)
        return loss * share(ring, sizes)


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    ring: Ring,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return this rank's part of `medfast.ops.siglip_loss` over the pairs of all ranks.

    Parts and their gradients are as those of `clip_loss`.

    Args:
        image: Image features of this rank [B, D].
        text: Text features of this rank [B, D].
        logit_scale: The inverse temperature, the same on every rank.
        logit_bias: The bias, the same on every rank.
        ring: The ranks.
        impl: As in `medfast.ops.siglip_loss`.

    Raises:
        ValueError: An argument has another shape, dtype or device, or `impl` is unknown.
        RuntimeError: `impl` cannot run here.
    """
    dispatch.check_features("siglip_loss", image=(image, "B D"), text=(text, "B D"))
    image, text = dispatch.autocast(image, text)
    scale = dispatch.as_scalar("siglip_loss", "logit_scale", logit_scale, image)
    bias = dispatch.as_scalar("siglip_loss", "logit_bias", logit_bias, image)
    chosen = dispatch.choose("siglip_loss", impl, image)
    with torch.autocast(image.device.type, enabled=False):
        sizes = ring.sizes(image)
        if chosen == "reference":
            dtype = summable(image)
            texts = gathered(text, ring, sizes).to(dtype)
            logits = scale * image.to(dtype) @ texts.T + bias
            labels = torch.full_like(logits, -1.0)
            labels.diagonal(ring.spans(sizes)[ring.rank].start).fill_(1)
            summed = pairwise.softplus(-labels * logits).sum()
        else:
            summed = ring_sigmoid_sum(image, text, scale, bias, ring, sizes, chosen)
        return summed / len(image) * share(ring, sizes)


def simclr_loss(
    first: Tensor,
    second: Tensor,
    logit_scale: float | Tensor,
    ring: Ring,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return this rank's part of `medfast.ops.simclr_loss` over the images of all ranks.

    Parts and their gradients are as those of `clip_loss`.

    Args:
        first: Features of the first views of this rank [B, D].
        second: Features of the second views of this rank [B, D].
        logit_scale: The inverse temperature, the same on every rank.
        ring: The ranks.
        impl: As in `medfast.ops.simclr_loss`.

    Raises:
        ValueError: An argument has another shape, dtype or device, or `impl` is unknown.
        RuntimeError: `impl` cannot run here.
    """
    dispatch.check_features("simclr_loss", first=(first, "B D"), second=(second, "B D"))
    first, second = dispatch.autocast(first, second)
    scale = dispatch.as_scalar("simclr_loss", "logit_scale", logit_scale, first)
    chosen = dispatch.choose("simclr_loss", impl, first)
    with torch.autocast(first.device.type, enabled=False):
        sizes = ring.sizes(first)
        sums = partial(_log_sum_exps, scale=scale, ring=ring, sizes=sizes, impl=chosen)
        return of_sums(first, second, sums) * share(ring, sizes)


def cyclip_loss(
    image: Tensor, text: Tensor, ring: Ring, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the terms of `medfast.ops.cyclip_loss` over the pairs of all ranks.

    Every rank has the same values. Only three matrices of D x D cross ranks; "reference" gathers
    all features. The mean of the ranks' gradients is the gradient.

    Args:
        image: Image features of this rank [B, D].
        text: Text features of this rank [B, D].
        ring: The ranks.
        impl: As in `medfast.ops.cyclip_loss`.

    Raises:
        ValueError: An argument has another shape, dtype or device, or `impl` is unknown.
        RuntimeError: `impl` cannot run here.
    """
    dispatch.check_features("cyclip_loss", image=(image, "B D"), text=(text, "B D"))
    chosen = dispatch.choose("cyclip_loss", impl, image)
    with torch.autocast(image.device.type, enabled=False):
        sizes = ring.sizes(image)
        if chosen == "reference":
            both = (gathered(x, ring, sizes) for x in (image, text))
            return cyclip_reference.cyclip_loss(*both)
        image, text = (x.to(summable(x)) for x in (image, text))
        grams = torch.stack(cyclip.grams(image - text, image + text))
        differences, totals, mixed = total(grams, ring)
        return cyclip.from_grams(differences, totals, mixed, sum(sizes))


def _log_sum_exps(
    rows: Tensor, columns: Tensor, scale: Tensor, ring: Ring, sizes: Sequence[int], impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "reference":
        return gathered_log_sum_exps(rows, columns, scale, ring, sizes)
    return ring_log_sum_exps(rows, columns, scale, ring, sizes, impl)


def ring_log_sum_exps(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, ring: Ring, sizes: Sequence[int], impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return own logits and the log-sum-exps without them, over the pairs of all ranks.

    As `medfast.ops.clip.autograd.log_sum_exps` of all N rows and columns, for the rows and columns
    of this rank. A gradient reaches the features of every rank whose values depend on them; that of
    the scale is the part of this rank's rows, so that the sum over ranks is the whole.

    Args:
        rows: [B, D].
        columns: [B, D], of the rows' dtype; row i and column i are a pair.
        logit_scale: [].
        ring: The ranks.
        sizes: Pairs of every rank.
        impl: "cpu", "triton" or "torch".

    Returns:
        own [B], r [B], c [B].
    """
    return _RingLogSumExps.apply(rows, columns, logit_scale, ring, sizes, impl)


class _RingLogSumExps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        logit_scale: Tensor,
        ring: Ring,
        sizes: Sequence[int],
        impl: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        place = ring.spans(sizes)[ring.rank]
        row_lse = rows.new_full((len(rows),), -torch.inf, dtype=summable(rows))
        merging = ring.merging(sizes, row_lse)
        own = row_lse
        for span, (block,) in ring.blocks(sizes, columns):
            offset = place.start - span.start
            found, r, c, _ = clip_loss_fwd(rows, block, logit_scale, offset, impl, False)
            # -inf where the block does not have the own column.
            own = torch.maximum(own, found)
            row_lse = torch.logaddexp(row_lse, r)
            merging.put(span, c)
        column_lse = merging.result()
        ctx.save_for_backward(rows, columns, block, logit_scale, own, row_lse, column_lse)
        ctx.ring, ctx.impl, ctx.sizes = ring, impl, sizes
        return own, row_lse, column_lse[place].clone()

    @staticmethod
    def backward(
        ctx: Any, d_own: Tensor, d_rows: Tensor, d_columns: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, columns, last, logit_scale, own, row_lse, column_lse = ctx.saved_tensors
        ring, sizes = ctx.ring, ctx.sizes
        place = ring.spans(sizes)[ring.rank]
        # A column's sum is also over rows of other ranks, which need its gradient.
        d_all = ring.gather(d_columns, sizes)
        nothing = torch.zeros_like(d_own)

        def block_gradients(span: slice, block: Tensor) -> tuple[Tensor, ...]:
            has_own = span.start <= place.start < span.stop
            return clip_loss_bwd(
                *(d_own if has_own else nothing, d_rows, d_all[span]),
                *(rows, block, logit_scale, place.start - span.start),
                *(own, row_lse, column_lse[span], own.new_empty(0, 0), ctx.impl, [True] * 3),
            )

        d_x, d_y, d_scale = gradients_around(ring, sizes, [columns], [last], block_gradients)
        return d_x.to(rows.dtype), d_y.to(columns.dtype), d_scale, None, None, None


def ring_sigmoid_sum(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ring: Ring,
    sizes: Sequence[int],
    impl: str,
) -> Tensor:
    """Return the summed sigmoid loss of this rank's rows and the columns of all ranks.

    As `medfast.ops.siglip.autograd.sigmoid_sum` of all N columns, with gradients as of
    `ring_log_sum_exps`.

    Args:
        rows: [B, D].
        columns: [B, D], of the rows' dtype; row i and column i are a pair.
        logit_scale: [].
        logit_bias: [].
        ring: The ranks.
        sizes: Pairs of every rank.
        impl: "cpu", "triton" or "torch".
    """
    return _RingSigmoidSum.apply(rows, columns, logit_scale, logit_bias, ring, sizes, impl)


class _RingSigmoidSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        ring: Ring,
        sizes: Sequence[int],
        impl: str,
    ) -> Tensor:
        start = ring.spans(sizes)[ring.rank].start
        parts = []
        for span, (block,) in ring.blocks(sizes, columns):
            offset = start - span.start
            parts.append(sigmoid_sum(rows, block, logit_scale, logit_bias, offset, impl))
        ctx.save_for_backward(rows, columns, block, logit_scale, logit_bias)
        ctx.ring, ctx.impl, ctx.sizes = ring, impl, sizes
        return torch.stack(parts).sum()

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, last, logit_scale, logit_bias = ctx.saved_tensors
        ring, sizes = ctx.ring, ctx.sizes
        start = ring.spans(sizes)[ring.rank].start

        def block_gradients(span: slice, block: Tensor) -> tuple[Tensor, ...]:
            inputs = (rows, block, logit_scale, logit_bias)
            x, y, scale, bias = leaves = [t.detach().requires_grad_() for t in inputs]
            with torch.enable_grad():
                part = sigmoid_sum(x, y, scale, bias, start - span.start, ctx.impl)
            return torch.autograd.grad(part, leaves, d_sum)

        gradients = gradients_around(ring, sizes, [columns], [last], block_gradients)
        d_x, d_y, *d_scalars = gradients
        return d_x.to(rows.dtype), d_y.to(columns.dtype), *d_scalars, None, None, None


def gathered_log_sum_exps(
    image: Tensor, text: Tensor, scale: Tensor, ring: Ring, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `ring_log_sum_exps` does, by its definition."""
    dtype = summable(image)
    images, texts = (gathered(x, ring, sizes).to(dtype) for x in (image, text))
    by_image = scale * image.to(dtype) @ texts.T
    by_text = scale * text.to(dtype) @ images.T
    own = torch.zeros_like(by_image, dtype=torch.bool)
    own.diagonal(ring.spans(sizes)[ring.rank].start).fill_(True)
    rows, columns = (x.masked_fill(own, -torch.inf).logsumexp(1) for x in (by_image, by_text))
    return by_image[own], rows, columns
