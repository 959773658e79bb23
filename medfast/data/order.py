"""Which sample comes when: the order of every epoch, from the seed and its number alone."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from medfast.errors import UsageError


class Draw(NamedTuple):
    """One appearance of a sample.

    Attributes:
        sample: Its position in the data set.
        turn: How often it came before, which with the seed decides its crops.
    """

    sample: int
    turn: int


class Order:
    """The batches of a rank, epoch by epoch.

    Every step takes the next `world` x `batch_size` samples of the epoch, the first `batch_size` of
    them for rank 0. As samples are read one by one, also from shards, their number need not fit
    ranks or workers.

    Args:
        sizes: Samples of each source; they lie one source after another in the data set.
        batch_size: Samples per batch and rank.
        seed: Decides the order.
        shuffle: For training: shuffled, and without the last, smaller batch, so that every loss has
            as many negatives. Else in order, every sample once.
        weights: Share of each source in an epoch, up to a factor; an epoch still has as many
            samples as the data set. A source goes through all its samples before it repeats one,
            over the epochs too. None takes every sample once per epoch.
        rank: This process.
        world: Processes that train together.

    Raises:
        UsageError: with several ranks, there are fewer samples than one step takes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sizes, self.batch_size, self.seed = tuple(sizes), batch_size, seed
        self.shuffle, self.weights, self.rank, self.world = shuffle, weights, rank, world
        self.length = sum(sizes)
        if world > 1 and self.length < batch_size * world:
            raise UsageError(
                f"--batch-size: {world} ranks x {batch_size} pairs are {world * batch_size} pairs "
                f"per step, but the data set has {self.length}; lower --batch-size or use fewer "
                "ranks."
            )

    def __len__(self) -> int:
        """Batches of an epoch."""
        step = self.batch_size * self.world
        if self.shuffle and self.length >= step:
            return self.length // step
        return -(-self.length // step)

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[Draw]]:
        """Yield this rank's batches of an epoch, from batch `start` on."""
        draws = self._epoch(epoch)
        for step in range(start, len(self)):
            first = (step * self.world + self.rank) * self.batch_size
            codes = draws[first : first + self.batch_size]
            yield [Draw(code % self.length, code // self.length) for code in codes]

    def _epoch(self, epoch: int) -> array[int]:
        """Return the draws of an epoch in order, each as turn * length + index."""
        if self.weights is None:
            draws = array("q", range(epoch * self.length, (epoch + 1) * self.length))
        else:
            draws = array("q", self._weighted(epoch))
        if self.shuffle:
            _shuffle(draws, f"{self.seed} {epoch}")
        return draws

    def _weighted(self, epoch: int) -> Iterator[int]:
        """Yield each source's share of an epoch: where it is in its turn, it goes on."""
        first = 0
        for source, (size, share) in enumerate(zip(self.sizes, self.shares(), strict=True)):
            places = range(epoch * share, (epoch + 1) * share)
            for turn, block in itertools.groupby(places, size.__rfloordiv__):
                own = array("q", range(first, first + size))
                _shuffle(own, f"{self.seed} source {source} turn {turn}")
                yield from (turn * self.length + own[place % size] for place in block)
            first += size

    def shares(self) -> list[int]:
        """Return how many samples of each source an epoch has."""
        weights = self.weights or self.sizes
        sums = itertools.accumulate(weights, initial=0)
        ends = [round(self.length * part / sum(weights)) for part in sums]
        return [end - start for start, end in itertools.pairwise(ends)]


def _shuffle(items: array[int], seed: str) -> None:
    random.Random(seed).shuffle(items)
