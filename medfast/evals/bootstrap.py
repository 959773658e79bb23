"""Percentile bootstrap intervals that draw whole patients. NumPy alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Takes how often each sample was drawn in each resample, [R, N], and returns each of its values
# in each resample, [R]; NaN where a value is undefined.
Statistic = Callable[[NDArray[np.float64]], Mapping[str, NDArray[np.float64]]]

# Weights of the resamples that are asked for at once: 8 MB.
_BLOCK = 2**20


def bootstrap_ci(
    values: ArrayLike,
    groups: ArrayLike | None = None,
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
    member = _members(groups, numbers.size)
    sums, sizes = np.bincount(member, numbers), np.bincount(member)
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for i in range(resamples):  # one at a time: a matrix of all draws would be N x resamples
        pick = rng.integers(0, len(sums), len(sums))
        drawn[i] = sums[pick].sum() / sizes[pick].sum()
    return _interval(drawn, level)


def bootstrap_cis(
    statistic: Statistic,
    n: int,
    groups: ArrayLike | None = None,
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> dict[str, list[float]]:
    """Return the percentile bootstrap interval of every value of a statistic.

    A resample is no list of samples but how often each was drawn, so that a statistic sorts its
    scores once. With one seed the draws are those of `bootstrap_ci`.

    Args:
        statistic: Computes the values.
        n: How many samples there are.
        groups: As in `bootstrap_ci`, [N].
        seed: Seed of the draws.
        resamples: How many draws.
        level: Coverage.

    Returns:
        [low, high] of each value, by its name. Resamples in which it is undefined, as when no
        patient of a rare class was drawn, do not count; NaNs where it always is.
    """
    if n == 0:
        return {name: [float("nan")] * 2 for name in statistic(np.ones((1, 0)))}
    member = _members(groups, n)
    count = int(member.max()) + 1
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // n)
    parts = []
    for start in range(0, resamples, block):
        weights = np.empty((min(block, resamples - start), n))
        for row in weights:
            row[:] = np.bincount(rng.integers(0, count, count), minlength=count)[member]
        parts.append(statistic(weights))
    return {
        name: _interval(np.concatenate([part[name] for part in parts]), level) for name in parts[0]
    }


def _members(groups: ArrayLike | None, n: int) -> NDArray[np.intp]:
    """Return the number of each sample's group, [N]."""
    if groups is None:
        return np.arange(n)
    own = np.asarray(groups)
    if own.shape != (n,):
        raise ValueError(
            f"bootstrap: groups must name the patient of each of the {n} samples; got shape "
            f"{list(own.shape)}."
        )
    return np.unique(own, return_inverse=True)[1]


def _interval(drawn: NDArray[np.float64], level: float) -> list[float]:
    known = drawn[~np.isnan(drawn)]
    if known.size == 0:
        return [float("nan"), float("nan")]
    tail = (1 - level) / 2
    return [float(x) for x in np.quantile(known, [tail, 1 - tail])]
