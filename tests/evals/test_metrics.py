import math

import numpy as np
import pytest

from medfast.evals.metrics import bootstrap_ci, recall_at


@pytest.mark.parametrize(("k", "want"), [(1, [1, 0, 0, 0]), (5, [1, 1, 0, 0]), (10, [1, 1, 1, 0])])
def test_recall_counts_ranks_below_k(k, want):
    assert recall_at([0, 4, 5, 10], k).tolist() == want


def test_interval_covers_the_mean_and_narrows_with_n():
    rng = np.random.default_rng(0)
    small, large = rng.random(50) < 0.3, rng.random(5000) < 0.3
    for values in (small, large):
        low, high = bootstrap_ci(values)
        assert low <= values.mean() <= high
    assert np.ptp(bootstrap_ci(large)) < np.ptp(bootstrap_ci(small)) / 5


def test_interval_matches_the_normal_one_for_many_samples():
    values = np.repeat([0.0, 1.0], [700, 300])
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert bootstrap_ci(values) == pytest.approx([0.3 - half, 0.3 + half], abs=0.004)


def test_samples_of_one_group_are_drawn_together():
    values = np.repeat([0.0, 1.0], [50, 50])
    groups = np.repeat(np.arange(10), 10).tolist()
    alone, together = bootstrap_ci(values), bootstrap_ci(values, groups)
    assert np.ptp(together) > 2 * np.ptp(alone)  # ten independent groups, not 100 samples


def test_the_same_seed_gives_the_same_interval():
    values = np.arange(20) % 3 == 0
    assert bootstrap_ci(values, seed=4) == bootstrap_ci(values, seed=4)


def test_degenerate_samples():
    assert all(math.isnan(x) for x in bootstrap_ci([]))
    assert bootstrap_ci([1.0]) == [1.0, 1.0]
    assert bootstrap_ci([0.0, 0.0]) == [0.0, 0.0]
