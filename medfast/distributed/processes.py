"""The processes of a run: how they find one another, agree, and name one that fails."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from medfast.distributed.ring import Ring
from medfast.errors import SharedError, UsageError

T = TypeVar("T")

# Whether this process ever had others; to end then takes care.
has_joined = False

# Words of torch.distributed's errors of a connection, for which it has no class.
_LOST = re.compile(r"gloo|nccl|connection|timed out|pair closure|broken pipe|socket", re.IGNORECASE)
# Seconds within which a process that found another one lost hears of all others that did. They all
# wait in the same step, and so find it at about the same time.
_ROLL_CALL = 5.0
# Of messages that nobody receives, only sent to see whether they can be.
_PROBE = 1


class Processes:
    """The processes that train one model together, as one of them sees them.

    A single process has no ring, agrees with itself and never waits.

    Args:
        rank: This one.
        world: How many.
        local_rank: This one among those of its machine.
        comm: How they exchange features, as in `Ring`.
        store: What they all can write to and read, where there are several.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        local_rank: int = 0,
        comm: str = "auto",
        store: dist.Store | None = None,
    ) -> None:
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self._store = store
        self.ring = None if store is None else Ring(comm=comm)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that talks and writes."""
        return self.rank == 0

    def numbers(self, *own: int) -> list[list[int]]:
        """Return the numbers that every process gives, by rank; each gives as many."""
        if self.world == 1:
            return [list(own)]
        # On the CPU: what a GPU is at need not be done for it.
        everything = torch.zeros(self.world, len(own), dtype=torch.int64)
        everything[self.rank] = torch.tensor(own)
        dist.all_reduce(everything)
        return everything.tolist()

    def objects(self, own: T) -> list[T]:
        """Return what every process gives, by rank."""
        if self.world == 1:
            return [own]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, own)
        return found

    def by_first(self, work: Callable[[], T]) -> T:
        """Return what the first process finds or does, for which the others wait.

        Raises:
            SharedError: it found a mistake of the user's.
        """
        found, said = None, None
        if self.is_first:
            try:
                found = work()
            except UsageError as error:
                said = str(error)
        if self.world > 1:
            both = [(found, said)]
            dist.broadcast_object_list(both, src=0)
            found, said = both[0]
        if said is not None:
            raise SharedError(said)
        return cast(T, found)

    def from_first(self, own: T) -> T:
        """Return what the first process gives."""
        return self.by_first(lambda: own)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Within the context, a mistake that one process finds ends all, and is told once.

        Nothing is exchanged within it.

        Raises:
            SharedError: one of them found a mistake of the user's.
        """
        said = None
        try:
            yield
        except UsageError as error:
            said = str(error)
        every = self.objects(said)
        found = [rank for rank, text in enumerate(every) if text is not None]
        if found:
            where = f"rank {found[0]}: " if len(found) < self.world else ""
            raise SharedError(f"{where}{every[found[0]]}")

    def require_equal(self, what: str, own: Mapping[str, Any]) -> None:
        """Refuse values that are not the same in every process.

        Raises:
            SharedError: they are not; it names the processes and the values.
        """
        every = self.objects(dict(own))
        for rank, other in enumerate(every):
            differing = [
                f"{key} is {every[0].get(key)!r} on rank 0 and {other.get(key)!r} on rank {rank}"
                for key in sorted(every[0].keys() | other.keys())
                if every[0].get(key) != other.get(key)
            ]
            if differing:
                raise SharedError(
                    f"the processes of a run must have the same {what}: {'; '.join(differing)}."
                )

    def part(self) -> None:
        """Let every process go its own way once all have come here."""
        if self.world > 1:
            self.numbers(0)
            dist.destroy_process_group()
            self.world, self.ring = 1, None

    @contextlib.contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Within the context, an exchange that fails or takes too long names who is missing.

        Raises:
            UsageError: processes did not answer.
        """
        try:
            yield
        except RuntimeError as error:
            if self._store is None or not (
                isinstance(error, dist.DistError) or _LOST.search(str(error))
            ):
                raise
            # torchrun, which has seen it too, ends the others: not before they have told it.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"{self._who_is_missing()} ({reason}).") from None

    def _who_is_missing(self) -> str:
        """Return a sentence on the processes that do not answer a roll call."""
        assert self._store is not None
        try:
            self._store.set(_answer(self.rank), "here")
            until = time.monotonic() + _ROLL_CALL
            missing = set(range(self.world))
            while missing and time.monotonic() < until:
                missing = {rank for rank in missing if not self._store.check([_answer(rank)])}
                time.sleep(0.1)
            # Some may still wait for one that told this already, as long as that is there.
            missing = {rank for rank in missing if not _is_connected(rank)} or missing
        except RuntimeError:
            return "the process that keeps the store of all, of rank 0 or of torchrun, is gone"
        if not missing:
            return "the connection between the processes failed, though all of them are alive"
        return f"the process of rank {_listed(missing)} has ended or hangs: it did not answer"


def join(timeout: float, comm: str = "auto", name: str = "run") -> Processes:
    """Return the processes that torchrun has started, of which this is one; else this one alone.

    GPUs talk by NCCL, CPUs by gloo; what the processes agree on always goes from CPU to CPU.

    Args:
        timeout: Seconds after which one that does not answer is given up.
        comm: How features are exchanged, as in `Ring`.
        name: Of what they do together, by which they find one another in the store.

    Raises:
        UsageError: the others do not come, or `comm` cannot run here.
    """
    world = announced()
    if world == 1:
        return Processes()
    global has_joined
    has_joined = True
    wait = timedelta(seconds=timeout)
    try:
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=wait)))
        store.set_timeout(wait)
        store = dist.PrefixStore(_meet(store, rank, world, f"medfast {name}", timeout), store)
        # Without a GPU there is no NCCL to make.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"the {world} processes that torchrun announced did not find one another within "
            f"--timeout {timeout:g} seconds ({reason})."
        ) from None
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        return Processes(rank, world, local_rank, comm, store)
    except RuntimeError as error:
        raise SharedError(f"--comm: {str(error).removeprefix('Ring: ')}") from None


def _meet(store: dist.Store, rank: int, world: int, name: str, timeout: float) -> str:
    """Return a prefix for the store that these very processes know, and none that ended before.

    torchrun's store outlives them, and torchrun does not count restarts alike on all nodes. So
    each makes up a word, and the first one gives its own to whom it hears of, until all took it.

    Raises:
        UsageError: some do not come.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"{name} {rank}", word)
        meeting = store.get(word).decode()
        store.set(f"{meeting} {rank}", "is here")
        return meeting
    until = time.monotonic() + timeout
    absent = set(range(1, world))
    while absent:
        for other in absent:
            if store.check([f"{name} {other}"]):
                store.set(store.get(f"{name} {other}").decode(), word)
        time.sleep(0.02)
        absent = {other for other in absent if not store.check([f"{word} {other}"])}
        if absent and time.monotonic() > until:
            raise UsageError(
                f"the process of rank {_listed(absent)}, of {world} that torchrun announced, did "
                f"not come within --timeout {timeout:g} seconds."
            )
    return word


def announced() -> int:
    """Return how many processes torchrun has started; one without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restarts() -> int:
    """Return how often torchrun has started these processes again, as their node counts."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def can_restart() -> bool:
    """Return whether torchrun starts these processes again when one fails."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def _is_connected(rank: int) -> bool:
    """Return whether a process can be sent to: it lives, though it may hang."""
    try:
        dist.isend(torch.zeros(1), rank, tag=_PROBE)
    except RuntimeError:
        return False
    return True


def _listed(ranks: Collection[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _answer(rank: int) -> str:
    return f"answer of rank {rank}"
