"""Scores and labels to numbers. NumPy alone; no model.

What a sample lacks to define is NaN: the recall of a class that no sample has, the AUROC of labels
that are all alike. A mean over classes is over those where it is defined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medfast.evals.bootstrap import bootstrap_cis

KS = (1, 5, 10)
DEEP_KS = (1, 5, 10, 50, 200)
"""Where the suite cuts the ranking."""

Floats = NDArray[np.float64]
# Takes weights of the samples, [R, N], and returns the value for each row of weights, [R].
Weighted = Callable[[Floats], Floats]

_TOP = 5
# What rounding to fp32 and summing leave of a sum of 1.
_NEARLY = 1e-4


def recall_at(ranks: ArrayLike, k: int) -> Floats:
    """Return 1 for each rank (0 = best) below `k`, else 0: [N] -> [N]."""
    return (np.asarray(ranks) < k).astype(np.float64)


def median_rank(ranks: ArrayLike) -> float:
    """Return the median of ranks (0 = best), [N], as the field counts it: 1 is the best."""
    return _of_all(median_of(np.asarray(ranks) + 1), np.size(ranks))


def softmax(scores: ArrayLike) -> Floats:
    """Return the probabilities of logits [N, K], in fp64: in fp32 large logits would be ties."""
    logits = np.asarray(scores, dtype=np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def label_ranks(scores: ArrayLike, labels: ArrayLike) -> NDArray[np.int64]:
    """Return the rank of each sample's own class among its scores, int64 [N]; 0 is the best.

    Among equal scores the class of the lowest index comes first, as in `argmax`, so that a rank of
    0 is a right prediction. (scikit-learn's top-k accuracy puts the highest index first.)

    Args:
        scores: [N, K].
        labels: Class of each sample, [N].
    """
    table, own = np.asarray(scores), np.asarray(labels)[:, None]
    score = np.take_along_axis(table, own, axis=1)
    before = np.arange(table.shape[1]) < own
    return ((table > score) | ((table == score) & before)).sum(axis=1)


def top_k_accuracy(scores: ArrayLike, labels: ArrayLike, k: int) -> float:
    """Return the share of samples whose class is among its `k` best; ties as in `label_ranks`."""
    hits = recall_at(label_ranks(scores, labels), k)
    return _of_all(mean_of(hits), len(hits))


def confusion_matrix(labels: ArrayLike, predicted: ArrayLike, classes: int) -> Floats:
    """Return how many samples of each class (row) were predicted as each (column), [K, K]."""
    cells = np.asarray(labels) * classes + np.asarray(predicted)
    return _confusions(cells, np.ones((1, len(cells))), classes)[0]


def accuracy(confusion: ArrayLike) -> Floats:
    """Return the share of right predictions; confusion matrices [..., K, K] -> [...]."""
    counts = np.asarray(confusion)
    return _ratio(np.trace(counts, axis1=-2, axis2=-1), counts.sum((-2, -1)))


def balanced_accuracy(confusion: ArrayLike) -> Floats:
    """Return the mean recall of the classes that samples have: [..., K, K] -> [...]."""
    return _mean_of_defined(per_class(confusion)["recall"])


def macro_f1(confusion: ArrayLike) -> Floats:
    """Return the mean F1 of the classes that occur, as labels or predictions.

    A class that is only ever predicted has an F1 of 0; one that does neither has none.

    Args:
        confusion: Confusion matrices, [..., K, K].
    """
    return _mean_of_defined(per_class(confusion)["f1"])


def quadratic_kappa(confusion: ArrayLike) -> Floats:
    """Return Cohen's kappa with quadratic weights, for graded classes in their order.

    1 - sum d2 O / sum d2 E, with d2 the squared distance of the grades, O the confusion matrix and
    E what its margins would give by chance. NaN where labels and predictions are one same class.

    Args:
        confusion: Confusion matrices, [..., K, K].
    """
    counts = np.asarray(confusion, dtype=np.float64)
    grades = np.arange(counts.shape[-1])
    squared = (grades[:, None] - grades).astype(np.float64) ** 2
    labels, predictions = counts.sum(-1), counts.sum(-2)
    by_chance = ((labels @ squared) * predictions).sum(-1)
    return 1 - _ratio((counts * squared).sum((-2, -1)) * counts.sum((-2, -1)), by_chance)


def per_class(confusion: ArrayLike) -> dict[str, Floats]:
    """Return n, precision, recall and F1 of each class: [..., K, K] -> [..., K] each.

    NaN are the precision of a class that is never predicted, the recall of one that no sample has,
    and the F1 of one of which both are true.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    labels, predictions = counts.sum(-1), counts.sum(-2)
    return {
        "n": labels,
        "precision": _ratio(right, predictions),
        "recall": _ratio(right, labels),
        "f1": _ratio(2 * right, labels + predictions),
    }


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the area under the ROC curve.

    That is how probably a positive has a higher score than a negative, a tie counting half. NaN
    without a positive or without a negative.

    Args:
        scores: [N].
        labels: 1, 0, or NaN for samples to leave out, [N].
    """
    return _of_all(auroc_of(scores, labels), np.size(scores))


def macro_auroc(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean over classes of the AUROC of each class against the rest.

    Classes that no sample has are left out. (MedMNIST's evaluator is undefined then; for two
    classes it takes the second one's, which the first one's equals.)

    Args:
        probabilities: [N, K].
        labels: Class of each sample, [N].
    """
    table, own = np.asarray(probabilities), np.asarray(labels)
    found = [auroc(table[:, k], own == k) for k in range(table.shape[1])]
    return float(_mean_of_defined(np.array(found)))


def mean_of(values: ArrayLike) -> Weighted:
    """Return the function from weights to the weighted mean of `values`, [N]."""
    numbers = np.asarray(values, dtype=np.float64)
    return lambda weights: _ratio(weights @ numbers, weights.sum(1))


def median_of(values: ArrayLike) -> Weighted:
    """Return the function from whole weights to the median of `values`, [N], repeated as often."""
    order = np.argsort(values, kind="stable")
    ascending = np.asarray(values, dtype=np.float64)[order]

    def weighted(weights: Floats) -> Floats:
        medians = np.full(len(weights), np.nan)
        for row, until in enumerate(np.cumsum(weights[:, order], axis=1)):
            if len(until) and until[-1] > 0:
                middle = [(until[-1] - 1) // 2, until[-1] // 2]
                medians[row] = ascending[np.searchsorted(until, middle, side="right")].mean()
        return medians

    return weighted


def auroc_of(scores: ArrayLike, labels: ArrayLike) -> Weighted:
    """Return the function from weights to the weighted `auroc`, which has sorted the scores once.

    Raises:
        ValueError: A score of a sample with a label is NaN.
    """
    numbers, known = np.asarray(scores), np.asarray(labels)
    positive, negative = np.flatnonzero(known == 1), np.flatnonzero(known == 0)
    if np.isnan(numbers[positive]).any() or np.isnan(numbers[negative]).any():
        raise ValueError("auroc: scores must be numbers; got NaN. Look for what made them.")
    negative = negative[np.argsort(numbers[negative], kind="stable")]
    ascending = numbers[negative]
    lower = np.searchsorted(ascending, numbers[positive], side="left")
    not_higher = np.searchsorted(ascending, numbers[positive], side="right")

    def weighted(weights: Floats) -> Floats:
        until = np.zeros((len(weights), len(negative) + 1))
        np.cumsum(weights[:, negative], axis=1, out=until[:, 1:])
        own = weights[:, positive]
        wins = ((until[:, lower] + until[:, not_higher]) * own).sum(1)
        return _ratio(wins, 2 * own.sum(1) * until[:, -1])

    return weighted


def classification_metrics(
    probabilities: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    graded: bool = False,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Return all numbers of one class per sample, with chance levels and intervals by patient.

    Chance is the better of guessing evenly and always naming the most frequent class.

    Args:
        probabilities: [N, K]; `softmax` makes them of logits. The class of the highest is
            predicted, the first of equal ones.
        labels: Class of each sample, [N].
        groups: Patient of each sample, [N]; None takes each for a patient of its own.
        graded: The classes are grades in their order; adds the quadratic kappa.
        seed: Seed of the intervals.
        resamples: Draws of the intervals.

    Returns:
        "n", "classes"; "metrics", "chance" and "ci95", by metric, where the top-5 accuracy is left
        out for five classes or fewer; "per_class", a row for each class; "confusion", the rows of
        the confusion matrix.

    Raises:
        ValueError: The shapes do not fit, a row of `probabilities` is none, or a label no class.
    """
    table, own = _checked(probabilities, labels)
    N, K = table.shape
    statistic = _of_classes(table, own, graded)
    every = np.ones((1, N))
    confusion = confusion_matrix(own, table.argmax(1), K).astype(np.int64)
    metrics = {name: float(value[0]) for name, value in statistic(every).items()}
    chance = _chance(confusion.sum(1))
    columns = per_class(confusion)
    columns["auroc"] = np.array([auroc(table[:, k], own == k) for k in range(K)])
    return {
        "n": N,
        "classes": K,
        "metrics": metrics,
        "chance": {name: chance[name] for name in metrics},
        "ci95": bootstrap_cis(statistic, N, groups, seed=seed, resamples=resamples),
        "per_class": [
            {name: int(x[k]) if name == "n" else float(x[k]) for name, x in columns.items()}
            for k in range(K)
        ],
        "confusion": confusion.tolist(),
    }


def mean_classification_metrics(
    tables: Sequence[ArrayLike],
    labels: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    graded: bool = False,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, dict[str, Any]]:
    """Return the mean of each metric over several models on the same samples, with intervals.

    Every resample asks all models of the same patients: the interval is of the mean of these
    models, not of what another training would give.

    Args:
        tables: Probabilities of each model, each [N, K].
        labels: As in `classification_metrics`, as is all below.
        groups: Patient of each sample, [N].
        graded: Adds the quadratic kappa.
        seed: Seed of the intervals.
        resamples: Draws of the intervals.

    Returns:
        "metrics" and "ci95", by metric.

    Raises:
        ValueError: As in `classification_metrics`.
    """
    statistics = [_of_classes(*_checked(table, labels), graded) for table in tables]

    def mean(weights: Floats) -> dict[str, Floats]:
        found = [statistic(weights) for statistic in statistics]
        return {name: np.mean([own[name] for own in found], axis=0) for name in found[0]}

    N = len(np.asarray(labels))
    return {
        "metrics": {name: float(x[0]) for name, x in mean(np.ones((1, N))).items()},
        "ci95": bootstrap_cis(mean, N, groups, seed=seed, resamples=resamples),
    }


def multi_label_metrics(
    probabilities: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Return accuracy and AUROC, as means over labels of which a sample may have any number.

    The accuracy is the share of right answers to the question whether a probability is above one
    half; chance is always giving a label's more frequent answer.

    Args:
        probabilities: Of each label on its own, [N, L].
        labels: 1, 0, or NaN where it is not known, [N, L].
        groups: As in `classification_metrics`.
        seed: Seed of the intervals.
        resamples: Draws of the intervals.

    Returns:
        As `classification_metrics`, with "per_label": n, positives, accuracy and AUROC.

    Raises:
        ValueError: The shapes differ, or a probability of a known label is NaN.
    """
    table, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if table.ndim != 2 or table.shape != truth.shape:
        raise ValueError(
            "multi_label_metrics: probabilities and labels must be [N, L]; got "
            f"{list(table.shape)} and {list(truth.shape)}."
        )
    known = ~np.isnan(truth)
    right = (known & ((table > 0.5) == (truth == 1))).astype(np.float64)
    of_label = [auroc_of(*columns) for columns in zip(table.T, truth.T, strict=True)]

    def per_label(weights: Floats) -> dict[str, Floats]:
        return {
            "accuracy": _ratio(weights @ right, weights @ known),
            "auroc": np.stack([weighted(weights) for weighted in of_label], axis=1),
        }

    def statistic(weights: Floats) -> dict[str, Floats]:
        found = {name: _mean_of_defined(x) for name, x in per_label(weights).items()}
        return {"accuracy": found["accuracy"], "macro_auroc": found["auroc"]}

    N, L = table.shape
    every = np.ones((1, N))
    n, positives = known.sum(0), (truth == 1).sum(0)
    rows = {name: x[0].tolist() for name, x in per_label(every).items()}
    rows |= {"n": n.tolist(), "positives": positives.tolist()}
    usual = _mean_of_defined(_ratio(np.maximum(positives, n - positives), n))
    return {
        "n": N,
        "labels": L,
        "metrics": {name: float(x[0]) for name, x in statistic(every).items()},
        "chance": {"accuracy": float(usual), "macro_auroc": 0.5},
        "ci95": bootstrap_cis(statistic, N, groups, seed=seed, resamples=resamples),
        "per_label": [{name: x[k] for name, x in rows.items()} for k in range(L)],
    }


def _of_classes(
    table: Floats, own: NDArray[np.int64], graded: bool
) -> Callable[[Floats], dict[str, Floats]]:
    """Return the function from weights to all metrics of `classification_metrics`."""
    K = table.shape[1]
    cells = own * K + table.argmax(1)
    top = mean_of(recall_at(label_ranks(table, own), _TOP))
    of_class = [auroc_of(table[:, k], own == k) for k in range(K)]

    def statistic(weights: Floats) -> dict[str, Floats]:
        confusion = _confusions(cells, weights, K)
        aurocs = np.stack([weighted(weights) for weighted in of_class], axis=1)
        return {
            "accuracy": accuracy(confusion),
            **({f"top{_TOP}_accuracy": top(weights)} if K > _TOP else {}),
            "balanced_accuracy": balanced_accuracy(confusion),
            "macro_f1": macro_f1(confusion),
            "macro_auroc": _mean_of_defined(aurocs),
            **({"quadratic_kappa": quadratic_kappa(confusion)} if graded else {}),
        }

    return statistic


def _checked(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
    table, own = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if table.ndim != 2 or own.shape != table.shape[:1]:
        raise ValueError(
            "classification_metrics: probabilities must be [N, K] and labels [N]; got "
            f"{list(table.shape)} and {list(own.shape)}."
        )
    # Written so that NaN fails.
    valid = (table >= 0).all(1) & (np.abs(table.sum(1) - 1) <= _NEARLY)
    if not valid.all():
        raise ValueError(
            "classification_metrics: probabilities must be at least 0 and add up to 1 in each row; "
            f"{np.count_nonzero(~valid)} of {len(table)} rows do not. Use softmax on logits."
        )
    if ((own < 0) | (own >= table.shape[1])).any():
        raise ValueError(
            f"classification_metrics: labels must be from 0 to {table.shape[1] - 1}, as "
            f"probabilities has {table.shape[1]} columns; got {own.min()} to {own.max()}."
        )
    return table, own


def _chance(counts: NDArray[np.int64]) -> dict[str, float]:
    """Return each metric's chance level for a data set with so many samples of each class, [K]."""
    K, present = len(counts), max(1, int((counts > 0).sum()))
    shares = np.sort(counts / max(1, counts.sum()))[::-1]
    # Of n samples of a class and m predictions of it, n m / N are right by chance.
    even = _mean_of_defined(2 * shares / K / (shares + 1 / K))
    return {
        "accuracy": max(1 / K, float(shares[0])),
        f"top{_TOP}_accuracy": max(_TOP / K, float(shares[:_TOP].sum())),
        "balanced_accuracy": 1 / present,
        "macro_f1": max(float(even), float(2 * shares[0] / (1 + shares[0]) / present)),
        "macro_auroc": 0.5,
        "quadratic_kappa": 0.0,
    }


def _confusions(cells: NDArray[np.int64], weights: Floats, classes: int) -> Floats:
    """Return a confusion matrix for each row of weights, [R, K, K], from each sample's cell."""
    counts = np.empty((len(weights), classes**2))
    for row, own in zip(counts, weights, strict=True):
        row[:] = np.bincount(cells, own, minlength=classes**2)
    return counts.reshape(-1, classes, classes)


def _of_all(weighted: Weighted, n: int) -> float:
    return float(weighted(np.ones((1, n)))[0])


def _mean_of_defined(values: Floats) -> Floats:
    """Return the mean over the last axis without its NaNs; NaN if there is nothing else."""
    return _ratio(np.nansum(values, axis=-1), (~np.isnan(values)).sum(axis=-1))


def _ratio(part: ArrayLike, whole: ArrayLike) -> Floats:
    """Return part / whole, NaN where the whole is 0."""
    top, bottom = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    nothing = np.full(np.broadcast_shapes(top.shape, bottom.shape), np.nan)
    return np.divide(top, bottom, out=nothing, where=bottom != 0)
