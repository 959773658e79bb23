"""What crosses ranks: the ring on which one side's features travel, and the losses around it.

A rank keeps its own rows of logits. The other side's features come by, block by block, and in the
backward their gradient comes by with them, so that no rank ever holds the features of all. Letters:
B pairs of a rank, N pairs of all ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from medfast.ops import dispatch, pairwise
from medfast.ops.clip.autograd import clip_loss_bwd, clip_loss_fwd
from medfast.ops.siglip.autograd import sigmoid_sum
from medfast.ops.tiles import summable


class Transfer:
    """A block on its way: sent to the next rank, while that of the previous one arrives.

    Args:
        works: What to wait for.
        sent: Kept until it has left.
        received: What arrives.
    """

    def __init__(self, works: Sequence[Any], sent: Tensor, received: Tensor) -> None:
        self._works, self._sent, self._received = works, sent, received

    def wait(self) -> Tensor:
        """Return the block of the previous rank, once it is there."""
        for work in self._works:
            work.wait()
        return self._received


class Ring:
    """The processes of a group, each with a next and a previous one.

    All ranks must make the same calls in the same order.

    Args:
        group: A process group; None is that of all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)

    def sizes(self, rows: Tensor) -> list[int]:
        """Return the number of rows of every rank, which need not be the same."""
        counts = torch.zeros(self.world, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        dist.all_reduce(counts, group=self.group)
        return counts.tolist()

    def spans(self, sizes: Sequence[int]) -> list[slice]:
        """Return the rows of every rank among all N."""
        ends = itertools.accumulate(sizes, initial=0)
        return [slice(start, end) for start, end in itertools.pairwise(ends)]

    def blocks(self, own: Tensor, sizes: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield each rank's number and block, one's own first; the next one comes meanwhile."""
        block = own.contiguous()
        for step in range(self.world):
            owner = (self.rank - step) % self.world
            coming = None
            if step + 1 < self.world:
                coming = self.pass_on(block, sizes[owner - 1])
            yield owner, block
            if coming is not None:
                block = coming.wait()

    def pass_on(self, block: Tensor, size: int) -> Transfer:
        """Send a block to the next rank; `size` rows come from the previous one."""
        received = block.new_empty(size, *block.shape[1:])
        if self.world == 1:
            return Transfer((), block, received.copy_(block))
        after, before = (self._peer(self.rank + step) for step in (1, -1))
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, block, after, self.group),
                dist.P2POp(dist.irecv, received, before, self.group),
            ]
        )
        return Transfer(works, block, received)

    def spread(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the values [N] of all ranks, of which `own` [B] are this one's."""
        values = own.new_zeros(sum(sizes))
        values[self.spans(sizes)[self.rank]] = own
        dist.all_reduce(values, group=self.group)
        return values

    def merged(self, partial: Tensor) -> Tensor:
        """Return the log-sum-exps [N] of all ranks' terms from those of this rank's."""
        most = partial.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, self.group)
        # Where no rank has a term, all is -inf and their difference NaN.
        sums = (partial - most).exp().nan_to_num_(0)
        dist.all_reduce(sums, group=self.group)
        return most + sums.log()

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of the ranks' values, without gradient."""
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total / self.world

    def _peer(self, rank: int) -> int:
        rank %= self.world
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def ring_log_sum_exps(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, ring: Ring, impl: str
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
        impl: "cpu", "triton" or "torch".

    Returns:
        own [B], r [B], c [B].
    """
    return _RingLogSumExps.apply(rows, columns, logit_scale, ring, impl)


class _RingLogSumExps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, logit_scale: Tensor, ring: Ring, impl: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        sizes = ring.sizes(rows)
        spans = ring.spans(sizes)
        row_lse = rows.new_full((len(rows),), -torch.inf, dtype=summable(rows))
        column_lse = row_lse.new_full((sum(sizes),), -torch.inf)
        own = row_lse
        for owner, block in ring.blocks(columns, sizes):
            offset = _offset(ring, owner, block)
            found, r, c, _ = clip_loss_fwd(rows, block, logit_scale, offset, impl, False)
            own = found if owner == ring.rank else own
            row_lse = torch.logaddexp(row_lse, r)
            column_lse[spans[owner]] = c
        column_lse = ring.merged(column_lse)
        ctx.save_for_backward(rows, columns, logit_scale, own, row_lse, column_lse)
        ctx.ring, ctx.impl, ctx.sizes = ring, impl, sizes
        return own, row_lse, column_lse[spans[ring.rank]].clone()

    @staticmethod
    def backward(
        ctx: Any, d_own: Tensor, d_rows: Tensor, d_columns: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, columns, logit_scale, own, row_lse, column_lse = ctx.saved_tensors
        ring, sizes = ctx.ring, ctx.sizes
        spans = ring.spans(sizes)
        # A column's sum is also over rows of other ranks, which need its gradient.
        d_all = ring.spread(d_columns.contiguous(), sizes)

        def block_gradients(owner: int, block: Tensor) -> tuple[Tensor, ...]:
            span = spans[owner]
            return clip_loss_bwd(
                *(d_own if owner == ring.rank else torch.zeros_like(d_own), d_rows, d_all[span]),
                *(rows, block, logit_scale, _offset(ring, owner, block)),
                *(own, row_lse, column_lse[span], own.new_empty(0, 0), ctx.impl, [True] * 3),
            )

        d_x, d_y, d_scale = _backward_around(ring, sizes, columns, block_gradients)
        return d_x.to(rows.dtype), d_y.to(columns.dtype), d_scale, None, None


def ring_sigmoid_sum(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, logit_bias: Tensor, ring: Ring, impl: str
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
        impl: "cpu", "triton" or "torch".
    """
    return _RingSigmoidSum.apply(rows, columns, logit_scale, logit_bias, ring, impl)


class _RingSigmoidSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        ring: Ring,
        impl: str,
    ) -> Tensor:
        sizes = ring.sizes(rows)
        ctx.save_for_backward(rows, columns, logit_scale, logit_bias)
        ctx.ring, ctx.impl, ctx.sizes = ring, impl, sizes
        parts = [
            sigmoid_sum(rows, block, logit_scale, logit_bias, _offset(ring, owner, block), impl)
            for owner, block in ring.blocks(columns, sizes)
        ]
        return torch.stack(parts).sum()

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, logit_scale, logit_bias = ctx.saved_tensors
        ring = ctx.ring

        def block_gradients(owner: int, block: Tensor) -> tuple[Tensor, ...]:
            inputs = (rows, block, logit_scale, logit_bias)
            x, y, scale, bias = leaves = [t.detach().requires_grad_() for t in inputs]
            with torch.enable_grad():
                part = sigmoid_sum(x, y, scale, bias, _offset(ring, owner, block), ctx.impl)
            return torch.autograd.grad(part, leaves, d_sum)

        gradients = _backward_around(ring, ctx.sizes, columns, block_gradients)
        d_x, d_y, *d_scalars = gradients
        return d_x.to(rows.dtype), d_y.to(columns.dtype), *d_scalars, None, None


def _backward_around(
    ring: Ring,
    sizes: Sequence[int],
    columns: Tensor,
    block_gradients: Callable[[int, Tensor], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """Sum the gradients of all blocks; those of columns travel with their block, and home.

    Args:
        ring: The ranks.
        sizes: Rows of every rank.
        columns: This rank's block.
        block_gradients: Returns the gradients of rows, of a block and of scalars.

    Returns:
        The gradients of this rank's rows and columns, in at least fp32, and of the scalars.
    """
    totals: list[Tensor] = []
    travelling: Transfer | None = None
    for owner, block in ring.blocks(columns, sizes):
        d_rows, d_block, *d_scalars = block_gradients(owner, block)
        dtype = torch.promote_types(d_block.dtype, torch.float32)
        found = [d_rows.to(dtype), *d_scalars]
        totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
        d_block = d_block.to(dtype)
        if travelling is not None:
            d_block = d_block + travelling.wait()
        travelling = ring.pass_on(d_block, sizes[owner - 1])
    assert travelling is not None
    return totals[0], travelling.wait(), *totals[1:]


def _offset(ring: Ring, owner: int, block: Tensor) -> int:
    """Return the offset of pairs within a block: none lie in that of another rank."""
    return 0 if owner == ring.rank else len(block)


def clip_loss(
    image: Tensor, text: Tensor, logit_scale: float | Tensor, ring: Ring, *, impl: str = "auto"
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
        impl: As in `medfast.ops.clip_loss`.

    Raises:
        ValueError: An argument has another shape, dtype or device, or `impl` is unknown.
        RuntimeError: `impl` cannot run here.
    """
    dispatch.check_features("clip_loss", image=(image, "B D"), text=(text, "B D"))
    image, text = dispatch.autocast(image, text)
    scale = dispatch.as_scalar("clip_loss", "logit_scale", logit_scale, image)
    chosen = dispatch.choose("clip_loss", impl, image)
    with torch.autocast(image.device.type, enabled=False):
        sizes = ring.sizes(image)
        if chosen == "reference":
            sums = _gathered_log_sum_exps(image, text, scale, ring, sizes)
        else:
            sums = ring_log_sum_exps(image, text, scale, ring, chosen)
        return pairwise.cross_entropy_of_sums(*sums) * _share(ring, sizes)


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
            dtype = torch.promote_types(image.dtype, torch.float32)
            texts = gathered(text, ring, sizes).to(dtype)
            logits = scale * image.to(dtype) @ texts.T + bias
            labels = torch.full_like(logits, -1.0)
            labels.diagonal(ring.spans(sizes)[ring.rank].start).fill_(1)
            total = pairwise.softplus(-labels * logits).sum()
        else:
            total = ring_sigmoid_sum(image, text, scale, bias, ring, chosen)
        return total / len(image) * _share(ring, sizes)


def gathered(own: Tensor, ring: Ring, sizes: Sequence[int]) -> Tensor:
    """Return the rows [N, D] of all ranks; a gradient reaches the rank that it is of.

    Args:
        own: [B, D].
        ring: The ranks.
        sizes: Rows of every rank.
    """
    return _Gathered.apply(own, ring, sizes)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, ring: Ring, sizes: Sequence[int]) -> Tensor:
        ctx.ring, ctx.span = ring, ring.spans(sizes)[ring.rank]
        everything = own.new_zeros(sum(sizes), *own.shape[1:])
        everything[ctx.span] = own
        dist.all_reduce(everything, group=ring.group)
        return everything

    @staticmethod
    def backward(ctx: Any, d_everything: Tensor) -> tuple[Tensor | None, ...]:
        total = d_everything.clone()
        dist.all_reduce(total, group=ctx.ring.group)
        return total[ctx.span], None, None


def _gathered_log_sum_exps(
    image: Tensor, text: Tensor, scale: Tensor, ring: Ring, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `ring_log_sum_exps` does, by its definition."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    images, texts = (gathered(x, ring, sizes).to(dtype) for x in (image, text))
    by_image = scale * image.to(dtype) @ texts.T
    by_text = scale * text.to(dtype) @ images.T
    own = torch.zeros_like(by_image, dtype=torch.bool)
    own.diagonal(ring.spans(sizes)[ring.rank].start).fill_(True)
    rows, columns = (x.masked_fill(own, -torch.inf).logsumexp(1) for x in (by_image, by_text))
    return by_image[own], rows, columns


def _share(ring: Ring, sizes: Sequence[int]) -> float:
    """Return the factor that makes the ranks' means over own pairs count as their pairs do."""
    return sizes[ring.rank] * ring.world / sum(sizes)
