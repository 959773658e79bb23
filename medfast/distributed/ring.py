"""The ring on which blocks travel from rank to rank, and the sums over ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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

    def sum(self, own: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, without gradient."""
        everything = own.detach().clone()
        dist.all_reduce(everything, group=self.group)
        return everything

    def mean(self, own: Tensor) -> Tensor:
        """Return the mean of the ranks' tensors, without gradient."""
        return self.sum(own) / self.world

    def _peer(self, rank: int) -> int:
        rank %= self.world
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def gradients_around(
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
        dtype = summable(d_block)
        found = [d_rows.to(dtype), *d_scalars]
        totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
        d_block = d_block.to(dtype)
        if travelling is not None:
            d_block = d_block + travelling.wait()
        travelling = ring.pass_on(d_block, sizes[owner - 1])
    assert travelling is not None
    return totals[0], travelling.wait(), *totals[1:]


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
        return ctx.ring.sum(d_everything)[ctx.span], None, None


def total(own: Tensor, ring: Ring) -> Tensor:
    """Return the sum over ranks; a gradient of any rank's sum reaches every rank."""
    return _Total.apply(own, ring)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, ring: Ring) -> Tensor:
        ctx.ring = ring
        return ring.sum(own)

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ring.sum(d_total), None


def share(ring: Ring, sizes: Sequence[int]) -> float:
    """Return the factor that makes the ranks' means over own pairs count as their pairs do."""
    return sizes[ring.rank] * ring.world / sum(sizes)
