"""The linear probe against scikit-learn's converged coefficients, and what it must not look at."""

import warnings

import numpy as np
import pytest
import torch

from medfast.evals.linear_probe import (
    GRID,
    PATIENCE,
    Split,
    fit,
    fit_path,
    label_subset,
    linear_probe,
)
from medfast.evals.metrics import classification_metrics

RNG = np.random.default_rng(0)
N, D = 300, 12


def _problems():
    X = RNG.normal(size=(N, D)) @ np.diag(np.logspace(0, -2, D)) @ RNG.normal(size=(D, D))
    W = RNG.normal(size=(D, 4))
    noisy = (X @ W + RNG.gumbel(size=(N, 4))).argmax(1)
    return {
        "multi-class": (X, noisy),
        "binary": (X, (noisy > 1).astype(int)),
        "binary separable": (X, (X[:, 0] > 0).astype(int)),
        "separable": (X, (X @ W).argmax(1)),
        "duplicate features": (np.hstack([X, X]), noisy),
        "constant feature": (np.hstack([X, np.full((N, 1), 3.7)]), noisy),
        "large offsets": (X + 100 * np.arange(D), noisy),
        "fewer rows than features": (RNG.normal(size=(30, 50)), noisy[:30]),
        "one row of a class": (X, np.where(np.arange(N) == 7, 4, noisy)),
        "fp32": (X.astype(np.float32), noisy),
    }


PROBLEMS = _problems()


def _converged(X, y, C):
    """Return scikit-learn's coefficients and intercept, of centred features: its own need it."""
    from sklearn.linear_model import LogisticRegression

    mean = X.astype(np.float64).mean(0)
    model = LogisticRegression(C=C, tol=1e-10, max_iter=1000, solver="newton-cholesky")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it would say so if it did not converge
        model.fit(X - mean, y)
    return model.coef_, model.intercept_ - model.coef_ @ mean


def _fit(X, y, C=1.0, **options):
    return fit(torch.from_numpy(X), torch.from_numpy(y), int(y.max()) + 1, C, **options)


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_coefficients_are_those_of_scikit_learn_converged(name, C):
    X, y = PROBLEMS[name]
    probe = _fit(X, y, C)
    weights, bias = probe.weights.numpy(), probe.bias.numpy()
    if len(bias) == 2:
        weights, bias = weights[1:] - weights[:1], bias[1:] - bias[:1]
    want, want_bias = _converged(X, y, C)
    assert np.linalg.norm(weights - want) <= 1e-3 * np.linalg.norm(want)
    assert np.linalg.norm(bias - want_bias) <= 1e-3 * np.linalg.norm([*want_bias, 1])
    assert probe.converged
    assert probe.gradient_norm < 1e-4


def test_reported_gradient_is_that_of_the_objective():
    X, y = PROBLEMS["multi-class"]
    centred, C = torch.from_numpy(X - X.mean(0)), 2.0
    probe = fit(centred, torch.from_numpy(y), 4, C, iterations=3)
    weights, bias = probe.weights.requires_grad_(), probe.bias.requires_grad_()
    loss = torch.nn.functional.cross_entropy(centred @ weights.T + bias, torch.from_numpy(y))
    (loss + weights.square().sum() / (2 * C * N)).backward()
    largest = max(weights.grad.abs().max(), bias.grad.abs().max()).item()
    assert largest > 1e-4  # stopped on its way
    assert probe.gradient_norm == pytest.approx(largest, rel=1e-3)


def test_too_few_iterations_are_said():
    X, y = PROBLEMS["separable"]
    short, whole = _fit(X, y, 100.0, iterations=2), _fit(X, y, 100.0)
    assert not short.converged
    assert short.iterations == 2
    assert short.gradient_norm > 10 * whole.gradient_norm
    assert whole.converged


def test_standardising_is_scikit_learns_scaler_before():
    from sklearn.preprocessing import StandardScaler

    X, y = PROBLEMS["constant feature"]
    X = X * np.append(np.logspace(-3, 3, D), 1) + 5
    probe = _fit(X, y, standardise=True)
    scaler = StandardScaler().fit(X)
    want, want_bias = _converged(scaler.transform(X), y, 1.0)
    logits = scaler.transform(X) @ want.T + want_bias
    powers = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(
        probe.probabilities(torch.from_numpy(X)), powers / powers.sum(1, keepdims=True), atol=1e-4
    )
    assert probe.weights[:, -1].abs().max() < 1e-12


def test_classes_without_training_rows_have_probability_0():
    X, y = PROBLEMS["multi-class"]
    features, labels = torch.from_numpy(X), torch.from_numpy(2 * (y > 1).astype(int) + 1)
    probe = fit(features, labels, 5)  # 1 and 3 of 5: two classes
    found = probe.probabilities(features)
    assert found[:, [0, 2, 4]].abs().max() == 0
    alone = fit(features, (labels == 3).long(), 2)
    torch.testing.assert_close(found[:, [1, 3]], alone.probabilities(features))


def test_a_single_class_is_certain():
    probe = fit(torch.randn(6, 3), torch.full((6,), 2), 4)
    assert probe.probabilities(torch.randn(2, 3)).tolist() == [[0, 0, 1, 0]] * 2
    assert probe.converged


def test_a_path_leads_to_the_same_optima_as_single_fits():
    X, y = (torch.from_numpy(x) for x in PROBLEMS["separable"])
    grid = [0.01, 1.0, 100.0]
    alone = [fit(X, y, 4, C) for C in grid]
    for one, found in zip(alone, fit_path(X, y, 4, grid), strict=True):
        assert (found.weights - one.weights).norm() <= 1e-3 * one.weights.norm()
    assert found.iterations < one.iterations  # what the start is for


def test_features_are_left_as_they_were():
    X, y = (torch.from_numpy(x) for x in PROBLEMS["fp32"])
    before = X.clone()
    fit(X, y, 4, standardise=True)
    assert torch.equal(X, before)


@pytest.mark.parametrize(
    ("features", "labels", "C", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), 1, r"\[N, D\]"),
        (torch.zeros(3, 2), torch.zeros(2).long(), 1, r"\[3, 2\] and \[2\]"),
        (torch.zeros(0, 2), torch.zeros(0).long(), 1, "N > 0"),
        (torch.zeros(3, 2).long(), torch.zeros(3).long(), 1, "floating point"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), 1, "labels must be from 0 to 1"),
        (torch.zeros(3, 2), torch.tensor([0, 1, -1]), 1, "got -1 to 1"),
        (torch.tensor([[0.0], [float("nan")]]), torch.tensor([0, 1]), 1, "must be finite"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 1]), 0, "C must be above 0"),
    ],
)
def test_bad_input_is_refused_by_name(features, labels, C, message):
    with pytest.raises(ValueError, match=message):
        fit(features, labels, 2, C)


def test_parts_of_the_labels_are_stratified_and_keep_rare_classes():
    labels = torch.tensor([0] * 1000 + [1] * 200 + [2] * 3)[torch.randperm(1203)]
    rows = label_subset(labels, 0.1, seed=3)
    assert torch.bincount(labels[rows]).tolist() == [100, 20, 1]
    assert torch.equal(rows, rows.unique())
    assert torch.equal(rows, label_subset(labels, 0.1, seed=3))
    assert not torch.equal(rows, label_subset(labels, 0.1, seed=4))
    assert torch.equal(label_subset(labels, 1.0, seed=0), torch.arange(1203))


def _splits(seed=0, count=240):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(8, 3, generator=generator)
    splits = []
    for _ in range(3):
        features = torch.randn(count, 8, generator=generator)
        noise = torch.randn(count, 3, generator=generator)
        splits.append(Split(features, (features @ directions + 2 * noise).argmax(1)))
    return splits


def _rows(splits, **options):
    return list(linear_probe(*splits, 3, resamples=5, **options))


@pytest.mark.parametrize("scaling", ["standard", "unit"])
def test_rows_say_what_was_fitted(scaling):
    rows = _rows(_splits(), scaling=scaling, fractions=(0.1, 1.0))
    assert [(row["fraction"], row["seed"], row["n_train"]) for row in rows] == [
        (0.1, 0, 24),
        (0.1, 1, 24),
        (0.1, 2, 24),
        (1.0, 0, 240),
    ]
    for row in rows:
        assert row["converged"]
        assert row["scaling"] == scaling
        assert row["n"] == 240
        assert row["C"] in GRID
        low, high = row["ci95"]["accuracy"]
        assert low <= row["metrics"]["accuracy"] <= high
    assert rows[-1]["metrics"]["accuracy"] > 0.6 > 0.5 > rows[-1]["chance"]["accuracy"]


def test_c_is_the_smallest_of_the_best_on_the_validation_split():
    train, validation, test = _splits()
    found = {}
    for C, probe in zip(
        GRID, fit_path(train.features, train.labels, 3, GRID, standardise=True), strict=True
    ):
        right = probe.probabilities(validation.features).argmax(1) == validation.labels
        found[C] = right.double().mean().item()
    best = max(found.values())
    (row,) = _rows([train, validation, test], fractions=(1.0,))
    assert row["validation_accuracy"] == best
    assert row["C"] == next(C for C, accuracy in found.items() if accuracy == best)
    assert row["C"] not in (GRID[0], GRID[-1])


def test_the_walk_up_the_grid_ends_after_its_patience(monkeypatch):
    from medfast.evals import linear_probe as module

    walked = []

    def path(*arguments, **options):
        for C, probe in zip(GRID, fit_path(*arguments, **options), strict=True):
            walked.append(C)
            yield probe

    monkeypatch.setattr(module, "fit_path", path)
    (row,) = _rows(_splits(), fractions=(1.0,))
    assert walked == list(GRID[: GRID.index(row["C"]) + 1 + PATIENCE])


@pytest.mark.parametrize("scaling", ["standard", "unit"])
def test_nothing_of_the_test_split_reaches_the_fit(scaling):
    train, validation, test = _splits()
    other = Split(1e3 * test.features.flip(0) + 7, (test.labels + 1) % 3)
    options = {"scaling": scaling, "fractions": (0.1, 1.0)}
    fitted = ("C", "validation_accuracy", "gradient_norm", "iterations", "n_train")
    first, second = (_rows([train, validation, x], **options) for x in (test, other))
    assert [[row[name] for name in fitted] for row in first] == [
        [row[name] for name in fitted] for row in second
    ]
    assert first[-1]["metrics"] != second[-1]["metrics"]
    # And the fitted model is that one: it predicts the same rows alike beside any others.
    both = Split(torch.cat([test.features, other.features]), torch.cat([test.labels, other.labels]))
    joined = _rows([train, validation, both], **options)
    for a, b, c in zip(first, second, joined, strict=True):
        assert (np.array(a["confusion"]) + b["confusion"] == c["confusion"]).all()


def test_intervals_are_drawn_by_the_seed_of_the_run():
    splits = _splits()
    (zero,), (one,) = (_rows(splits, fractions=(1.0,), seeds=(seed,)) for seed in (0, 1))
    assert zero["metrics"] == one["metrics"]
    assert zero["ci95"] != one["ci95"]
    own = one["probabilities"], splits[2].labels.numpy()
    assert one["ci95"] == classification_metrics(*own, seed=1, resamples=5)["ci95"]


def test_a_split_without_rows_is_named():
    train, _, test = _splits()
    with pytest.raises(ValueError, match="validation must have rows"):
        _rows([train, Split(torch.zeros(0, 8), torch.zeros(0).long()), test])
