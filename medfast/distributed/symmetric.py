"""Vectors of all ranks merged by one kernel that reaches the memory of every GPU.

torch's symmetric memory gives each rank the addresses of a buffer on the GPUs of all others, which
NVLink lets a kernel read and write. Letters: N entries, W ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# The kernel takes as many addresses: `kMostRanks` of csrc/arithmetic/rank_merge.h.
MOST_RANKS = 128
# Entries that the kernel loads at once, and the least that memory is made for.
_ALIGNED = 4
_LEAST = 2**12


def why_not(group: dist.ProcessGroup | None) -> str | None:
    """Return why the ranks of a group, None that of all processes, cannot merge so, or None.

    Whether their GPUs reach one another shows when the memory is made.
    """
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    backends = dist.get_backend_config(group)
    if "cuda:nccl" not in backends.split(","):
        return f"the processes talk by {backends}, it needs NCCL between GPUs"
    world = dist.get_world_size(group)
    if world > MOST_RANKS:
        return f"there are {world} ranks, its kernel takes {MOST_RANKS}"
    try:
        import medfast._CUDA  # noqa: F401
    except ImportError as error:
        return f"the CUDA kernels are not there ({error}); reinstall with nvcc"
    from torch.distributed import _symmetric_memory

    if _symmetric_memory.get_backend(torch.device("cuda")) is None:
        return "this build of torch has no symmetric memory"
    return None


def cannot_run(reason: str) -> RuntimeError:
    """Return the error for a ring that was asked to merge so and cannot."""
    return RuntimeError(f"Ring: comm='symmetric' cannot run here: {reason}. Use comm='ring'.")


class Peers:
    """The memory that the ranks of a group share, and what they merge there.

    Each rank has two vectors that all can reach: its part, and what comes of the parts of all. Each
    finishes another share of the entries, in the order of the ranks, and writes it to all, so that
    all have the same bits. A barrier before says that the parts are there, one after that the
    results are. The second also keeps what is still read from being overwritten: no rank passes it,
    and so none begins the next call, before all have read.

    All ranks must make the same calls in the same order. Memory is made anew where a call needs
    more; then the host waits.

    Args:
        group: A process group; None is that of all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)
        self._group = group
        self._capacity = 0
        # Of every rank, the addresses of both vectors.
        self._parts: list[int] = []
        self._results: list[int] = []

    def takes(self, values: Tensor) -> bool:
        """Return whether these are merged here: fp32, on a GPU, and of more than one rank."""
        return values.is_cuda and values.dtype == torch.float32 and self.world > 1

    def all_reduce(self, values: Tensor, is_log_sum_exp: bool) -> Tensor:
        """Return what the ranks' values are together: their log-sum-exp, or their sum."""
        length = values.numel()
        part = self.reserve(length, values.device)
        part.copy_(values.flatten())
        self._meet()
        each = -(-length // (self.world * _ALIGNED)) * _ALIGNED
        start = min(self.rank * each, length)
        share = slice(start, min(start + each, length))
        return self.finish(share, self.parts(share), length, is_log_sum_exp).view_as(values)

    def reserve(self, length: int, device: torch.device) -> Tensor:
        """Return this rank's part [N], to be written; what it had is gone."""
        if length > self._capacity:
            capacity = max(_LEAST, 1 << (length - 1).bit_length())
            self._make(capacity, device)
            self._capacity = capacity
        return self._memory[0, :length]

    def parts(self, share: slice) -> list[int]:
        """Return the addresses of a share of every rank's part."""
        return [address + 4 * share.start for address in self._parts]

    def merge_early(self, share: slice, device: torch.device) -> Tensor:
        """Return a share of what the others' parts are together, made beside the current stream.

        It is there for `finish`, which waits for it. All ranks must have written what the others
        take.
        """
        others = self.parts(share)
        del others[self.rank]
        # Made here, not aside: the allocator may use it again when the current stream is done.
        early = torch.empty(share.stop - share.start, dtype=torch.float32, device=device)
        with self._aside():
            self._meet()
            self._merge(others, [early.data_ptr()], len(early), is_log_sum_exp=True)
        return early

    def finish(
        self, share: slice, sources: Sequence[int], length: int, is_log_sum_exp: bool
    ) -> Tensor:
        """Merge this rank's share from the vectors at some addresses; return the whole result [N].

        The shares of all ranks are all entries.
        """
        self._rejoin()
        targets = [address + 4 * share.start for address in self._results]
        self._merge(sources, targets, share.stop - share.start, is_log_sum_exp)
        self._meet()
        # The next call writes there.
        return self._memory[1, :length].clone()

    def _make(self, capacity: int, device: torch.device) -> None:
        """Make the vectors of all ranks, and a stream beside the current one."""
        from torch.distributed import _symmetric_memory

        # What is given up may still be in use, by this rank and, up to its last barrier, by others.
        torch.cuda.synchronize(device)
        try:
            self._memory = _symmetric_memory.empty(2, capacity, dtype=torch.float32, device=device)
            group = dist.group.WORLD if self._group is None else self._group
            assert group is not None
            self._handle = _symmetric_memory.rendezvous(self._memory, group)
            bases = [
                self._handle.get_remote_tensor(rank, self._memory.shape, torch.float32).data_ptr()
                for rank in range(self.world)
            ]
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise cannot_run(f"a rank's GPU does not reach the memory of all ({reason})") from error
        self._parts = bases
        self._results = [base + 4 * capacity for base in bases]
        self._side = torch.cuda.Stream(device)

    def _meet(self) -> None:
        """Let the stream go on when those of all ranks have come here."""
        self._handle.barrier()

    def _merge(
        self, sources: Sequence[int], targets: Sequence[int], length: int, is_log_sum_exp: bool
    ) -> None:
        from medfast import _CUDA

        device = self._memory.device
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            _CUDA.rank_merge(list(sources), list(targets), length, is_log_sum_exp, stream)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Within the context work goes to another stream, behind what is on the current one now."""
        self._side.wait_stream(torch.cuda.current_stream(self._memory.device))
        with torch.cuda.stream(self._side):
            yield

    def _rejoin(self) -> None:
        """Let the current stream wait for what went aside."""
        torch.cuda.current_stream(self._memory.device).wait_stream(self._side)


class PeerMerging:
    """Log-sum-exps [N] of this rank's terms, given span by span, that become those of all ranks.

    On the ring, the span that a rank scores last is another one for each, and all others have
    scored that span before. So the rank that is last finishes it, and all but its own part of it
    is merged on a stream aside while it scores:

        stream    ... | last but one |         last span         | its own part, to all | barrier
        aside                        | barrier | W - 1 parts |

    The barrier aside waits until every rank has written all spans but its last. After the last span
    the stream waits for what went aside, and merges two vectors of N / W entries.

    Args:
        peers: The ranks.
        spans: Entries of every span; they are given in another order, each once.
        device: Where values are.

    Attributes:
        part: What the others see of this rank's [N].
    """

    def __init__(self, peers: Peers, spans: Sequence[slice], device: torch.device) -> None:
        self._peers, self._device = peers, device
        self._missing = list(spans)
        self._length = spans[-1].stop
        self.part = peers.reserve(self._length, device)

    def put(self, span: slice, values: Tensor) -> None:
        """Take the log-sum-exps of one span."""
        self._missing.remove(span)
        if not self._missing:
            self._last, self._own = span, values.contiguous()
            return
        self.part[span] = values
        if len(self._missing) == 1:
            self._early = self._peers.merge_early(self._missing[0], self._device)

    def result(self) -> Tensor:
        """Return those of all ranks [N], once every span was given."""
        sources = [self._early.data_ptr(), self._own.data_ptr()]
        return self._peers.finish(self._last, sources, self._length, is_log_sum_exp=True)
