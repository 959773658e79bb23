import math

import numpy as np
import pytest

from medfast.evals.bootstrap import bootstrap_ci, bootstrap_cis
from medfast.evals.metrics import auroc, auroc_of, mean_of, median_of


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


# Two patients of values 0 and 1: a resample is (0, 0), (0, 1), (1, 0) or (1, 1), its mean 0, 1/2
# or 1 with probabilities 1/4, 1/2 and 1/4. The percentiles 12.5 and 37.5 lie in the first two.
@pytest.mark.parametrize(
    ("level", "want"), [(0.95, [0.0, 1.0]), (0.75, [0.0, 1.0]), (0.25, [0.5, 0.5])]
)
def test_interval_of_two_patients_by_hand(level, want):
    groups = ["b", "b", "b", "a"]  # of three and one images: the mean is that of all images
    values = [0.0, 0.0, 0.0, 1.0]
    single = bootstrap_ci([0.0, 1.0], level=level)
    assert single == want
    assert bootstrap_ci(values, groups, level=level) == [0.25 if x == 0.5 else x for x in want]


def test_intervals_of_any_statistic_have_the_draws_of_the_mean():
    rng = np.random.default_rng(0)
    hits, groups = rng.random(200) < 0.4, rng.integers(0, 60, 200)
    found = bootstrap_cis(
        lambda weights: {"mean": mean_of(hits)(weights)}, 200, groups, resamples=300, seed=5
    )
    assert found == {"mean": bootstrap_ci(hits, groups, resamples=300, seed=5)}


def test_intervals_are_those_of_resampled_lists():
    rng = np.random.default_rng(1)
    n, resamples = 60, 40
    labels, groups = rng.integers(0, 2, n), rng.integers(100, 120, n)
    scores = rng.integers(0, 9, n) + labels  # with ties
    names = np.unique(groups)
    draws = np.random.default_rng(3)
    aurocs, medians = [], []
    for _ in range(resamples):
        picked = names[draws.integers(0, len(names), len(names))]
        rows = np.concatenate([np.flatnonzero(groups == name) for name in picked])
        aurocs.append(auroc(scores[rows], labels[rows]))
        medians.append(np.median(scores[rows]))

    def statistic(weights):
        return {
            "auroc": auroc_of(scores, labels)(weights),
            "median": median_of(scores)(weights),
        }

    found = bootstrap_cis(statistic, n, groups, seed=3, resamples=resamples)
    assert found["auroc"] == pytest.approx(np.quantile(aurocs, [0.025, 0.975]).tolist())
    assert found["median"] == pytest.approx(np.quantile(medians, [0.025, 0.975]).tolist())


def test_blocks_of_resamples_change_nothing(monkeypatch):
    values = np.random.default_rng(0).random(30)

    def intervals():
        return bootstrap_cis(lambda weights: {"mean": mean_of(values)(weights)}, 30, resamples=25)

    whole = intervals()
    monkeypatch.setattr("medfast.evals.bootstrap._BLOCK", 30 * 4)
    assert intervals()["mean"] == pytest.approx(whole["mean"], rel=1e-12)


def test_undefined_resamples_do_not_count():
    labels, scores = [1, 0, 0, 0], [3, 2, 1, 0]  # one positive: many resamples have none
    found = bootstrap_cis(lambda weights: {"auroc": auroc_of(scores, labels)(weights)}, 4)
    assert found == {"auroc": [1.0, 1.0]}
    never = bootstrap_cis(lambda weights: {"auroc": auroc_of(scores, [1] * 4)(weights)}, 4)
    assert all(math.isnan(x) for x in never["auroc"])
    nobody = bootstrap_cis(lambda weights: {"auroc": auroc_of([], [])(weights)}, 0)
    assert all(math.isnan(x) for x in nobody["auroc"])


def test_groups_of_another_length_are_refused():
    with pytest.raises(ValueError, match="groups must name the patient of each of the 3 samples"):
        bootstrap_ci([1, 0, 1], [0, 1])
