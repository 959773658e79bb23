"""The losses of patches and words over the pairs of all ranks: captions travel, images stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from medfast import ops
from medfast.distributed.ring import Ring, gradients_around, share
from medfast.ops import dispatch, pairwise

# From patches [M, P, D], tokens [N, T, D], their mask and scalars to scores, each [M, N].
Score = Callable[..., tuple[Tensor, ...]]


def local_alignment_loss(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    ring: Ring,
    *,
    patch_mask: Tensor | None = None,
    temp_attention: float | Tensor = 4.0,
    temp_words: float | Tensor = 5.0,
    temp_pairs: float | Tensor = 10.0,
    impl: str = "auto",
) -> Tensor:
    """Return this rank's part of `medfast.ops.local_alignment_loss` over the pairs of all ranks.

    Parts and their gradients are as those of `medfast.distributed.clip_loss`. A rank keeps its
    images' scores with all captions, B x N. The other arguments are those of the op.

    Args:
        patches: Of this rank's images [B, P, D].
        tokens: Of this rank's captions [B, T, D]; T may differ between ranks.
        token_mask: bool [B, T].
        ring: The ranks.
        patch_mask: bool [B, P].
        temp_attention: The same on every rank.
        temp_words: The same on every rank.
        temp_pairs: The same on every rank.
        impl: As in the op.
    """
    op = "local_alignment_loss"
    dispatch.check_patches_and_tokens(op, patches, tokens, token_mask, patch_mask)
    temps = (
        dispatch.as_scalar(op, name, value, patches)
        for name, value in (("temp_attention", temp_attention), ("temp_words", temp_words))
    )
    score = partial(_alignment, patch_mask=patch_mask, impl=impl)
    pairs = dispatch.as_scalar(op, "temp_pairs", temp_pairs, patches)
    sizes = ring.sizes(patches)
    (scores,) = ring_scores(score, patches, tokens, token_mask, tuple(temps), ring, sizes)
    scores = pairs * scores
    return _two_way_cross_entropy(scores, scores, ring, sizes)


def filip_loss(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    logit_scale: float | Tensor,
    ring: Ring,
    *,
    patch_mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return this rank's part of `medfast.ops.filip_loss` over the pairs of all ranks.

    As `local_alignment_loss` of this module.

    Args:
        patches: Of this rank's images [B, P, D].
        tokens: Of this rank's captions [B, T, D]; T may differ between ranks.
        token_mask: bool [B, T].
        logit_scale: The inverse temperature, the same on every rank.
        ring: The ranks.
        patch_mask: bool [B, P].
        impl: As in the op.
    """
    dispatch.check_patches_and_tokens("filip_loss", patches, tokens, token_mask, patch_mask)
    scale = dispatch.as_scalar("filip_loss", "logit_scale", logit_scale, patches)
    sizes = ring.sizes(patches)
    score = partial(_late_interaction, patch_mask=patch_mask, impl=impl)
    by_image, by_text = ring_scores(score, patches, tokens, token_mask, (), ring, sizes)
    return _two_way_cross_entropy(scale * by_image, scale * by_text, ring, sizes)


def sparc_loss(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    logit_scale: float | Tensor,
    ring: Ring,
    *,
    patch_mask: Tensor | None = None,
    threshold: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return this rank's part of `medfast.ops.sparc_loss`: each pair stays where it is.

    Args:
        patches: Of this rank's images [B, P, D].
        tokens: Of this rank's captions [B, T, D].
        token_mask: bool [B, T].
        logit_scale: As in the op.
        ring: The ranks.
        patch_mask: bool [B, P].
        threshold: As in the op.
        impl: As in the op.
    """
    loss = ops.sparc_loss(
        patches,
        tokens,
        token_mask,
        logit_scale,
        patch_mask=patch_mask,
        threshold=threshold,
        impl=impl,
    )
    return loss * share(ring, ring.sizes(patches))


def _alignment(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    temp_attention: Tensor,
    temp_words: Tensor,
    *,
    patch_mask: Tensor | None,
    impl: str,
) -> tuple[Tensor, ...]:
    scores = ops.local_alignment_scores(
        patches,
        tokens,
        token_mask,
        patch_mask=patch_mask,
        temp_attention=temp_attention,
        temp_words=temp_words,
        impl=impl,
    )
    return (scores.T,)


def _late_interaction(
    patches: Tensor, tokens: Tensor, token_mask: Tensor, *, patch_mask: Tensor | None, impl: str
) -> tuple[Tensor, ...]:
    image_to_text, text_to_image = ops.filip_scores(
        patches, tokens, token_mask, patch_mask=patch_mask, impl=impl
    )
    return image_to_text, text_to_image.T


def ring_scores(
    score: Score,
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    scalars: Sequence[Tensor],
    ring: Ring,
    sizes: Sequence[int],
) -> tuple[Tensor, ...]:
    """Return the scores of this rank's images with the captions of all ranks, each [B, N].

    They are computed again in the backward, block by block, so that what a block keeps for its
    gradient is never kept for all.

    Args:
        score: What scores images and captions.
        patches: [B, P, D].
        tokens: [B, T, D].
        token_mask: bool [B, T].
        scalars: Further arguments of `score`.
        ring: The ranks.
        sizes: Pairs of every rank.
    """
    longest = torch.tensor(tokens.shape[1], device=tokens.device)
    more = int(ring.all_reduce(longest, dist.ReduceOp.MAX).item()) - tokens.shape[1]
    tokens, token_mask = F.pad(tokens, (0, 0, 0, more)), F.pad(token_mask, (0, more))
    return _RingScores.apply(score, token_mask, ring, sizes, patches, tokens, *scalars)


class _RingScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        score: Score,
        token_mask: Tensor,
        ring: Ring,
        sizes: Sequence[int],
        patches: Tensor,
        tokens: Tensor,
        *scalars: Tensor,
    ) -> tuple[Tensor, ...]:
        found: dict[int, tuple[Tensor, ...]] = {}
        # Not every backend sends bool.
        captions = [tokens, token_mask.to(torch.uint8)]
        for span, last in ring.blocks(sizes, *captions):
            block, mask = last
            found[span.start] = score(patches, block, mask.bool(), *scalars)
        ctx.save_for_backward(patches, *scalars, *captions, *last)
        ctx.score, ctx.ring, ctx.sizes = score, ring, sizes
        return tuple(
            torch.cat(of_all, dim=1)
            for of_all in zip(*(found[start] for start in sorted(found)), strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *d_scores: Tensor) -> tuple[Tensor | None, ...]:
        patches, *others = ctx.saved_tensors
        scalars, captions, last = others[:-4], others[-4:-2], others[-2:]

        def block_gradients(span: slice, block: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            x, y, *temps = leaves = [
                t.detach().requires_grad_() for t in (patches, block, *scalars)
            ]
            with torch.enable_grad():
                scores = ctx.score(x, y, mask.bool(), *temps)
            return torch.autograd.grad(scores, leaves, [d[:, span] for d in d_scores])

        d_x, d_y, *d_temps = gradients_around(ctx.ring, ctx.sizes, captions, last, block_gradients)
        d_x, d_y = (d.to(x.dtype) for d, x in zip((d_x, d_y), (patches, captions[0]), strict=True))
        return None, None, None, None, d_x, d_y, *d_temps


def _two_way_cross_entropy(
    by_image: Tensor, by_text: Tensor, ring: Ring, sizes: Sequence[int]
) -> Tensor:
    """Return this rank's part of the mean of both directions' cross-entropies.

    Args:
        by_image: For which captions compete, [B, N], images of this rank by captions of all.
        by_text: For which images compete, likewise.
        ring: The ranks.
        sizes: Pairs of every rank.
    """
    start = ring.spans(sizes)[ring.rank].start
    own = torch.zeros_like(by_image, dtype=torch.bool)
    own.diagonal(start).fill_(True)
    rows = by_image.masked_fill(own, -torch.inf).logsumexp(1)
    columns = _MergedColumns.apply(by_text.masked_fill(own, -torch.inf), ring, sizes)
    by_image, by_text = (x.diagonal(start) for x in (by_image, by_text))
    losses = pairwise.softplus(rows - by_image) + pairwise.softplus(columns - by_text)
    return losses.mean() / 2 * share(ring, sizes)


class _MergedColumns(torch.autograd.Function):
    """Log-sum-exps over the images of all ranks, for this rank's captions."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, ring: Ring, sizes: Sequence[int]) -> Tensor:
        merged = ring.merged(scores.logsumexp(0))
        ctx.save_for_backward(scores, merged)
        ctx.ring, ctx.sizes = ring, sizes
        return merged[ring.spans(sizes)[ring.rank]].clone()

    @staticmethod
    def backward(ctx: Any, d_columns: Tensor) -> tuple[Tensor | None, ...]:
        scores, merged = ctx.saved_tensors
        d_all = ctx.ring.gather(d_columns, ctx.sizes)
        # Without any other image both are -inf.
        weights = (scores - merged).exp().masked_fill_(merged.isneginf(), 0)
        return weights * d_all, None, None
