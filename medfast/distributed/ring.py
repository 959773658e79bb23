"""The ring on which blocks travel from rank to rank, and the sums over ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from medfast.distributed.symmetric import PeerMerging, Peers, cannot_run, why_not
from medfast.errors import unknown_name
from medfast.ops.tiles import summable

COMMS = ("auto", "gather", "ring", "symmetric")
# Blocks of at most this many bytes are gathered by "auto"; see `Ring`.
SMALL_BLOCK = 2**17


class Transfer:
    """A block on its way: sent to a neighbour, while that of the other neighbour arrives.

    Args:
        works: What to wait for.
        sent: Kept until it has left.
        received: What arrives.
    """

    def __init__(self, works: Sequence[Any], sent: Tensor, received: Tensor) -> None:
        self._works, self._sent, self._received = works, sent, received

    def wait(self) -> Tensor:
        """Return the block that was sent to this rank, once it is there."""
        for work in self._works:
            work.wait()
        return self._received


class Merging:
    """Log-sum-exps [N] of this rank's terms, given span by span, that become those of all ranks.

    Args:
        ring: The ranks.
        partial: Where they go, [N], -inf.
    """

    def __init__(self, ring: Ring, partial: Tensor) -> None:
        self._ring, self._partial = ring, partial

    def put(self, span: slice, values: Tensor) -> None:
        """Take the log-sum-exps of one span."""
        self._partial[span] = values

    def result(self) -> Tensor:
        """Return those of all ranks [N], once every span was given."""
        return self._ring.merged(self._partial)


class Ring:
    """The processes of a group, each with a next and a previous one.

    All ranks must make the same calls in the same order.

    With "ring" the blocks of the others come by one after the other, each while the one before is
    being scored, and only a few are ever there, one of them from the forward to the backward. With
    "gather" one collective brings all at once, to be scored in one piece: nothing is hidden, and N
    rows stay until the backward, which is spared their second round. "auto" gathers blocks so small
    that a message costs its latency, which the ring pays W - 1 times, more than its bytes: those of
    at most 128 KiB on the rank that has most rows. A message of NCCL takes 10 to 20 us however
    small it is, and 128 KiB take 3 to 5 us at the 25 to 50 GB/s that a GPU has between nodes. Over
    gloo on one machine, on busy cores, 4 processes gathered faster up to about 128 KiB, and the
    ring was faster from 1 MiB on, with 2 processes as with 4. Each call decides from the sizes of
    all ranks, and so alike on each.

    With "symmetric" blocks travel as with "ring", and log-sum-exps and sums in fp32 are merged by a
    kernel through torch's symmetric memory, not by all-reduces: see `Peers`. It needs NCCL and GPUs
    that NVLink joins; nobody has run it on such yet, so it is not chosen unless it is asked for.

    Args:
        group: A process group; None is that of all processes.
        comm: "auto", "gather", "ring" or "symmetric".

    Attributes:
        sent: Bytes that this rank has sent since the ring was made. Blocks count as they are,
            W - 1 times where they are gathered or summed to where they belong, those of ranks with
            fewer rows filled up; an all-reduce as an algorithm on a ring sends it, 2 (W - 1) / W
            times its size, and so does "symmetric". What a backend does beyond, gloo's
            reduce-scatter for one, is not seen.

    Raises:
        ValueError: `comm` is unknown.
        RuntimeError: "symmetric" cannot run here; the sentence says why.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, comm: str = "auto") -> None:
        if comm not in COMMS:
            raise ValueError("Ring: " + unknown_name("comm", comm, COMMS))
        self._peers: Peers | None = None
        if comm == "symmetric":
            reason = why_not(group)
            if reason is not None:
                raise cannot_run(reason)
            self._peers = Peers(group)
        self.group = group
        self.comm = comm
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)
        self.sent = 0

    def sizes(self, rows: Tensor) -> list[int]:
        """Return the number of rows of every rank, which need not be the same."""
        counts = torch.zeros(self.world, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        return self.all_reduce(counts).tolist()

    def spans(self, sizes: Sequence[int]) -> list[slice]:
        """Return the rows of every rank among all N."""
        ends = itertools.accumulate(sizes, initial=0)
        return [slice(start, end) for start, end in itertools.pairwise(ends)]

    def gathers(self, sizes: Sequence[int], *own: Tensor) -> bool:
        """Return whether blocks like these are gathered; else they travel."""
        if self.comm == "auto":
            row_bytes = sum(math.prod(x.shape[1:]) * x.itemsize for x in own)
            return self.world > 1 and max(sizes) * row_bytes <= SMALL_BLOCK
        return self.world > 1 and self.comm == "gather"

    def blocks(self, sizes: Sequence[int], *own: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yield blocks that together are all N rows, and which rows each is.

        They are those of one rank after the other, own ones first; the next ones come meanwhile.
        Or they are all at once, where they are gathered.

        Args:
            sizes: Rows of every rank.
            own: What this rank has, each [B, ...]; they travel together.
        """
        if self.gathers(sizes, *own):
            yield slice(0, sum(sizes)), [self.gather(x, sizes) for x in own]
            return
        spans, blocks = self.spans(sizes), [x.contiguous() for x in own]
        for step in range(self.world):
            owner = (self.rank - step) % self.world
            is_last = step + 1 == self.world
            coming = [] if is_last else [self.pass_on(x, sizes[owner - 1]) for x in blocks]
            yield spans[owner], blocks
            blocks = [x.wait() for x in coming]

    def pass_on(self, block: Tensor, size: int, step: int = 1) -> Transfer:
        """Send a block to the next rank, or to that at `step`; `size` rows come from the other."""
        block = block.contiguous()
        received = block.new_empty(size, *block.shape[1:])
        after, before = (self._peer(self.rank + way) for way in (step, -step))
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, block, after, self.group),
                dist.P2POp(dist.irecv, received, before, self.group),
            ]
        )
        self.sent += block.nbytes
        return Transfer(works, block, received)

    def gather(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the rows [N, ...] of all ranks, of which `own` [B, ...] are this one's."""
        filled = _filled(own, max(sizes))
        of_ranks = filled.new_empty(self.world, *filled.shape)
        dist.all_gather(list(of_ranks), filled, group=self.group)
        self.sent += (self.world - 1) * filled.nbytes
        if min(sizes) == max(sizes):
            return of_ranks.flatten(0, 1)
        return torch.cat([x[:size] for x, size in zip(of_ranks, sizes, strict=True)])

    def sum_home(self, parts: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the sum over ranks of the rows that are this one's, of `parts` [N, ...]."""
        filled = [_filled(parts[span], max(sizes)) for span in self.spans(sizes)]
        home = torch.empty_like(filled[0])
        dist.reduce_scatter(home, filled, group=self.group)
        self.sent += (self.world - 1) * home.nbytes
        return home[: sizes[self.rank]]

    def all_reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Return `values`, in place of which there now is what `op` makes of those of all ranks."""
        dist.all_reduce(values, op, self.group)
        self._count_all_reduce(values)
        return values

    def merging(self, sizes: Sequence[int], like: Tensor) -> Merging | PeerMerging:
        """Return what takes this rank's log-sum-exps, span by span, and merges those of all."""
        if self._peers is not None and self._peers.takes(like):
            merging = PeerMerging(self._peers, self.spans(sizes), like.device)
            self._count_all_reduce(merging.part)
            return merging
        return Merging(self, like.new_full((sum(sizes),), -torch.inf))

    def merged(self, partial: Tensor) -> Tensor:
        """Return the log-sum-exps [N] of all ranks' terms from those of this rank's."""
        if self._peers is not None and self._peers.takes(partial):
            self._count_all_reduce(partial)
            return self._peers.all_reduce(partial, is_log_sum_exp=True)
        most = self.all_reduce(partial.clone(), dist.ReduceOp.MAX)
        # Where no rank has a term, all is -inf and their difference NaN; other NaN shall stay.
        sums = self.all_reduce((partial - most).exp().masked_fill_(most.isneginf(), 0))
        return most + sums.log()

    def sum(self, own: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, without gradient."""
        if self._peers is not None and self._peers.takes(own):
            self._count_all_reduce(own)
            return self._peers.all_reduce(own.detach(), is_log_sum_exp=False)
        return self.all_reduce(own.detach().clone())

    def mean(self, own: Tensor) -> Tensor:
        """Return the mean of the ranks' tensors, without gradient."""
        return self.sum(own) / self.world

    def _count_all_reduce(self, values: Tensor) -> None:
        self.sent += 2 * (self.world - 1) * values.nbytes // self.world

    def _peer(self, rank: int) -> int:
        rank %= self.world
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def _filled(rows: Tensor, length: int) -> Tensor:
    """Return rows with zeros behind them, because every rank of a collective has as many."""
    more = length - len(rows)
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, more)) if more else rows.contiguous()


def gradients_around(
    ring: Ring,
    sizes: Sequence[int],
    own: Sequence[Tensor],
    last: Sequence[Tensor],
    block_gradients: Callable[..., tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """Sum the gradients of all blocks; those of columns travel with their block, and home.

    All goes around the ring backwards, so that the block that came last in the forward is the
    first and need not come again. Own columns are the last, and hide the way home of the gradient.

    Args:
        ring: The ranks.
        sizes: Rows of every rank.
        own: What this rank gave to `Ring.blocks`, columns first.
        last: What that yielded last.
        block_gradients: Takes the rows that a block is and the block's tensors; returns the
            gradients of this rank's rows, of the block's columns and of scalars.

    Returns:
        The gradients of this rank's rows and columns, in at least fp32, and of the scalars.
    """
    totals: list[Tensor] = []

    def gradient(span: slice, blocks: Sequence[Tensor]) -> Tensor:
        """Return the gradient of a block's columns, and add the others to `totals`."""
        d_rows, d_block, *d_scalars = block_gradients(span, *blocks)
        dtype = summable(d_block)
        found = [d_rows.to(dtype), *d_scalars]
        totals[:] = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
        return d_block.to(dtype)

    if ring.gathers(sizes, *own):
        d_columns = ring.sum_home(gradient(slice(0, sum(sizes)), last), sizes)
        return totals[0], d_columns, *totals[1:]
    spans = ring.spans(sizes)
    travelling: Transfer | None = None
    for step in range(1, ring.world):
        owner, after = ((ring.rank + step + more) % ring.world for more in (0, 1))
        is_last = after == ring.rank
        coming = [] if is_last else [ring.pass_on(x, sizes[after], -1) for x in last]
        d_block = gradient(spans[owner], last)
        if travelling is not None:
            d_block = travelling.wait().add_(d_block)
        travelling = ring.pass_on(d_block, sizes[after], -1)
        last = [x.wait() for x in coming]
    d_columns = gradient(spans[ring.rank], own)
    if travelling is not None:
        d_columns = travelling.wait().add_(d_columns)
    return totals[0], d_columns, *totals[1:]


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
        ctx.ring, ctx.sizes = ring, sizes
        return ring.gather(own, sizes)

    @staticmethod
    def backward(ctx: Any, d_everything: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ring.sum_home(d_everything, ctx.sizes), None, None


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
