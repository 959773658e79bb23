"""The linear probe's fit beside scikit-learn's solvers, which stop where their defaults say."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.compare import comparison
from benchmarks.conftest import Note
from benchmarks.measure import Run, Timing, interleave
from benchmarks.targets import Target
from medfast.evals.linear_probe import fit

CLASSES = 9
# Of the coefficients, in norm, from the optimum of scikit-learn's Newton solver.
TOLERANCE = 1e-3

Peers = dict[str, dict[str, Any]]

LBFGS: Peers = {"scikit-learn lbfgs": {"solver": "lbfgs"}}
OTHERS: Peers = {
    "scikit-learn newton-cg": {"solver": "newton-cg"},
    "scikit-learn newton-cholesky": {"solver": "newton-cholesky"},
    # These would take minutes to converge.
    "scikit-learn sag, 20 epochs": {"solver": "sag", "max_iter": 20},
    "scikit-learn saga, 20 epochs": {"solver": "saga", "max_iter": 20},
}


def problem(N: int, D: int) -> tuple[Tensor, Tensor]:
    """Return standardised features whose covariance has a decaying spectrum, and labels.

    For 512 features its condition is 17,000. No planes part the classes: the best probe is right
    about four rows of five.
    """
    generator = torch.Generator().manual_seed(0)
    deviations = torch.arange(1, D + 1, dtype=torch.float64) ** -0.75
    axes = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    latent = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weights = torch.randn(D, CLASSES, generator=generator, dtype=torch.float64)
    logits = latent @ (weights * deviations[:, None])
    logits *= 5 / logits.std()
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    features = (latent * deviations) @ axes.T
    features = (features - features.mean(0)) / features.std(0)
    return features.float(), (logits + noise).argmax(1)


def scikit_learn(
    features: Tensor, labels: Tensor, C: float, start: Tensor | None = None, **options: Any
) -> Tensor:
    """Return the coefficients [K, D + 1] that one of scikit-learn's solvers finds."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=C, warm_start=start is not None, **{"max_iter": 10_000} | options)
    if start is not None:
        model.coef_, model.intercept_ = start[:, :-1].numpy().copy(), start[:, -1].numpy().copy()
    with warnings.catch_warnings():
        # Of the peers whose steps are counted. Their errors say it too.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features.double().numpy(), labels.numpy())
    return _joined(torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_))


def race(shape: tuple[int, int], C: float, peers: Peers) -> tuple[dict[str, Any], Run]:
    """Check medfast's fit, time it beside the peers, and also return it, to run again."""
    features, labels = problem(*shape)
    own = functools.partial(fit, features, labels, CLASSES, C)
    probe = own()
    found = _joined(probe.weights, probe.bias)
    # From wherever they start, Newton's steps lead to the one optimum.
    truth = scikit_learn(features, labels, C, found, solver="newton-cg", tol=1e-9)
    errors = {"medfast": _error(found, truth)}
    assert probe.converged
    assert errors["medfast"] <= TOLERANCE, errors
    runs = {"medfast": Run(own)}
    for name, options in peers.items():
        call = functools.partial(scikit_learn, features, labels, C, **options)
        errors[name] = _error(call(), truth)
        runs[name] = Run(call)
    timings = interleave(runs, seconds=1, least=2)
    return _comparison((*shape, CLASSES), C, timings, errors, probe.gradient_norm), runs["medfast"]


@pytest.mark.parametrize("C", [1.0, 100.0])
def test_few_rows(benchmark: Any, note: Note, C: float) -> None:
    found, own = race((4096, 128), C, LBFGS | OTHERS)
    note(found)
    benchmark.pedantic(own, rounds=3)


@pytest.mark.slow
@pytest.mark.parametrize("C", [1.0, 100.0])
def test_many_rows(benchmark: Any, note: Note, C: float) -> None:
    found, own = race((50_000, 512), C, LBFGS)
    note(found, (Target("medfast", 10.0, than="scikit-learn lbfgs"),))
    benchmark.pedantic(own, rounds=3)


def _comparison(
    shape: tuple[int, ...],
    C: float,
    timings: dict[str, Timing],
    errors: dict[str, float],
    gradient_norm: float,
) -> dict[str, Any]:
    rows = [
        {
            "variant": name,
            "own": name == "medfast",
            "dtype": "float32" if name == "medfast" else "float64",
            "errors": {"coefficients": errors[name]},
            **timing.row(),
        }
        for name, timing in timings.items()
    ]
    found = comparison(f"linear probe, C = {C:g}", shape, rows)
    return found | {"gradient_norm": gradient_norm}


def _joined(weights: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weights, bias[:, None]], dim=1)


def _error(found: Tensor, truth: Tensor) -> float:
    return ((found - truth).norm() / truth.norm()).item()
