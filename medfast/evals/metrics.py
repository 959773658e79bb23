"""Scores and labels to numbers. NumPy alone; no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

KS = (1, 5, 10)


def recall_at(ranks: ArrayLike, k: int) -> NDArray[np.float64]:
    """Return 1 for each rank (0 = best) below `k`, else 0: [N] -> [N]."""
    return (np.asarray(ranks) < k).astype(np.float64)


def bootstrap_ci(
    values: ArrayLike,
    groups: Sequence[int] | None = None,
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> list[float]:
    """Return the percentile bootstrap interval of the mean of `values`.

    Args:
        values: One number per sample, [N].
        groups: Patient or study of each sample, [N]: whole groups are drawn, since their samples
            are not independent. None draws samples.
        seed: Seed of the draws.
        resamples: How many draws.
        level: Coverage.

    Returns:
        [low, high]; NaNs for no sample.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size == 0:
        return [float("nan"), float("nan")]
    own = np.arange(numbers.size) if groups is None else np.asarray(groups)
    _, member = np.unique(own, return_inverse=True)
    sums, sizes = np.bincount(member, numbers), np.bincount(member)
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for i in range(resamples):  # one at a time: a matrix of all draws would be N x resamples
        pick = rng.integers(0, len(sums), len(sums))
        drawn[i] = sums[pick].sum() / sizes[pick].sum()
    tail = (1 - level) / 2
    return [float(x) for x in np.quantile(drawn, [tail, 1 - tail])]
