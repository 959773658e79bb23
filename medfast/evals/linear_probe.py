"""The linear probe: logistic regression on frozen features, solved to its optimum."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medfast.evals.metrics import classification_metrics

# Walked upwards; standardised features want the lower end, unit features the upper.
GRID = tuple(10.0**power for power in range(-5, 6))
# The walk ends after as many values without a better validation accuracy: large C take the longest.
PATIENCE = 3
FRACTIONS = (0.01, 0.1, 1.0)
SEEDS = (0, 1, 2)

Scaling = Literal["standard", "unit"]

# The fit has converged when its next step would move the coefficients by less, in their norm.
_TOLERANCE = 5e-6
_MOST_ITERATIONS = 1000
# Steps whose curvature is remembered.
_MEMORY = 30
# Iterations without progress after which fp32 has given what it can.
_STALLED = 10
_MOST_TRIALS = 20
# Rows that are widened to fp64 at a time.
_CHUNK = 2048
# Spread, relative to its mean, of a feature that is constant but for rounding.
_CONSTANT = 1e-12
# Eigenvalues of the classes' curvature are raised to this part of the largest.
_FLOOR = 1e-10

# From a gradient to about the step that would undo it.
_Preconditioner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Split:
    """Features and labels of one split.

    Attributes:
        features: Frozen features, [N, D].
        labels: Class of each row, int64 [N].
        groups: Patient of each row, N; None takes each for a patient of its own.
    """

    features: Tensor
    labels: Tensor
    groups: Sequence[Any] | None = None


@dataclass(frozen=True)
class Probe:
    """A fitted classifier: softmax of features @ weights.T + bias.

    Attributes:
        weights: fp64 [K, D], for the features as they were given to `fit`.
        bias: fp64 [K]; -infinity for a class without a training row, whose probability is 0.
        gradient_norm: Largest entry of the gradient of the mean objective, in fp64, with respect
            to the coefficients of the centred (and, if asked, standardised) features.
        iterations: Steps that were taken.
        converged: Whether the optimum was reached; if not, the numbers are those of a worse model.
    """

    weights: Tensor
    bias: Tensor
    gradient_norm: float
    iterations: int
    converged: bool

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the probability of each class, [N, D] -> fp64 [N, K]."""
        parts = features.split(_CHUNK)
        return torch.cat([(x.double() @ self.weights.T + self.bias).softmax(1) for x in parts])


def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    C: float = 1.0,
    *,
    standardise: bool = False,
    iterations: int = _MOST_ITERATIONS,
) -> Probe:
    """Return the multinomial logistic regression with an L2 penalty.

    Minimises C sum_i CE_i + 1/2 |weights|^2, the intercept not penalised: scikit-learn's
    `LogisticRegression(C)`, also for two classes, where it penalises the one difference of weights.

    L-BFGS, preconditioned by the Kronecker product of the features' covariance and the classes'
    mean curvature: the inverse costs two rotations, whatever C is. It runs in fp32 and ends in
    fp64. Memory: one fp32 copy of the features and a few [N, K].

    Args:
        features: [N, D] in any floating dtype.
        labels: Class of each row, int64 [N].
        classes: K, how many classes there are; those without a row get a probability of 0.
        C: Inverse strength of the penalty.
        standardise: Penalise the coefficients of features of mean 0 and standard deviation 1.
        iterations: Steps at most; `Probe.converged` tells whether they were enough.

    Raises:
        ValueError: A shape, label, feature or C is not as above.
    """
    (probe,) = fit_path(
        features, labels, classes, [C], standardise=standardise, iterations=iterations
    )
    return probe


def fit_path(
    features: Tensor,
    labels: Tensor,
    classes: int,
    grid: Sequence[float],
    *,
    standardise: bool = False,
    iterations: int = _MOST_ITERATIONS,
) -> Iterator[Probe]:
    """Yield `fit` for each C of a grid, each started at the optimum before.

    What does not depend on C is computed once.

    Args:
        features: As in `fit`.
        labels: As in `fit`.
        classes: As in `fit`.
        grid: Values of C.
        standardise: As in `fit`.
        iterations: As in `fit`, for each.
    """
    _check(features, labels, classes, grid)
    present = labels.unique()
    design = _Design(features, torch.searchsorted(present, labels), len(present), standardise)
    theta = torch.zeros(features.shape[1] + 1, len(present), dtype=torch.float64)
    for C in grid:
        # Two classes: their weights are opposite halves of the one difference w that scikit-learn
        # penalises, and |w|^2 is twice the sum of their squares.
        penalty = (2 if len(present) == 2 else 1) / (C * len(features))
        theta, gradient_norm, steps, converged = _minimise(design, theta, penalty, iterations)
        weights = torch.zeros(classes, features.shape[1], dtype=torch.float64)
        bias = torch.full((classes,), -math.inf, dtype=torch.float64)
        weights[present] = (theta[:-1] / design.spread[:, None]).T
        bias[present] = theta[-1] - weights[present] @ design.mean
        yield Probe(weights, bias, gradient_norm, steps, converged)


def label_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Return the rows of a random part of the labels, in order, int64.

    Stratified: of each class its share, rounded, and never less than one row.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for name in labels.unique():
        rows = (labels == name).nonzero().squeeze(1)
        count = max(1, round(fraction * len(rows)))
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def linear_probe(
    train: Split,
    validation: Split,
    test: Split,
    classes: int,
    *,
    scaling: Scaling = "standard",
    grid: Sequence[float] = GRID,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = SEEDS,
    graded: bool = False,
    resamples: int = 1000,
) -> Iterator[dict[str, Any]]:
    """Yield the test metrics of the probe for each part of the training labels.

    C is the value of the grid with the best accuracy on the whole validation split, the smallest
    of equal ones; the walk up the grid ends after `PATIENCE` values without a better one. The probe
    is not fitted again with the validation rows. The test split is only ever predicted.

    Args:
        train: Rows to fit; mean and spread of "standard" are those of the part that is fitted.
        validation: Rows to choose C by.
        test: Rows to report.
        classes: K.
        scaling: "standard" gives each feature mean 0 and standard deviation 1, "unit" each row
            length 1.
        grid: Values of C, ascending.
        fractions: Parts of the training labels, drawn by `label_subset`.
        seeds: Seeds of the draws and of their intervals; a part of all labels is the same for each
            and fitted once.
        graded: As in `classification_metrics`.
        resamples: As in `classification_metrics`.

    Yields:
        `classification_metrics` of the test split with "fraction", "seed", "n_train", "scaling",
        "C", "validation_accuracy", the fit's "gradient_norm", "iterations" and "converged", and
        its "probabilities" of the test rows, [N, K].

    Raises:
        ValueError: As in `fit`, or a split without rows.
    """
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        if not len(split.labels):
            raise ValueError(f"linear_probe: {name} must have rows; got none.")
    scaled = F.normalize if scaling == "unit" else lambda features: features
    inputs = {id(split): scaled(split.features) for split in (train, validation, test)}
    for fraction in fractions:
        for seed in seeds if fraction < 1 else seeds[:1]:
            features, labels = inputs[id(train)], train.labels
            if fraction < 1:
                rows = label_subset(labels, fraction, seed)
                features, labels = features[rows], labels[rows]
            path = fit_path(features, labels, classes, grid, standardise=scaling == "standard")
            C, accuracy, probe = _best(
                zip(grid, path, strict=False), inputs[id(validation)], validation.labels
            )
            probabilities = probe.probabilities(inputs[id(test)]).numpy()
            found = classification_metrics(
                *(probabilities, test.labels.numpy(), test.groups),
                graded=graded,
                seed=seed,
                resamples=resamples,
            )
            yield {
                "fraction": fraction,
                "seed": seed,
                "n_train": len(labels),
                "scaling": scaling,
                "C": C,
                "validation_accuracy": accuracy,
                "gradient_norm": probe.gradient_norm,
                "iterations": probe.iterations,
                "converged": probe.converged,
                "probabilities": probabilities,
                **found,
            }


def _best(
    path: Iterator[tuple[float, Probe]], features: Tensor, labels: Tensor
) -> tuple[float, float, Probe]:
    """Return C, accuracy and probe of the first best of the path, or of its start."""
    best: tuple[float, float, Probe] | None = None
    worse = 0
    for C, probe in path:
        right = probe.probabilities(features).argmax(1) == labels
        accuracy = right.double().mean().item()
        if best is None or accuracy > best[1]:
            best, worse = (C, accuracy, probe), 0
        else:
            worse += 1
        if worse == PATIENCE:
            break
    assert best is not None  # the grid has been checked
    return best


def _check(features: Tensor, labels: Tensor, classes: int, grid: Sequence[float]) -> None:
    if features.dim() != 2 or not len(features) or labels.shape != features.shape[:1]:
        raise ValueError(
            "linear probe: features must be [N, D] and labels [N], with N > 0; got "
            f"{list(features.shape)} and {list(labels.shape)}."
        )
    if not features.is_floating_point():
        raise ValueError(
            f"linear probe: features must be floating point; got {features.dtype}. Convert them."
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"linear probe: labels must be from 0 to {classes - 1} for {classes} classes; got "
            f"{labels.min()} to {labels.max()}."
        )
    if not grid or not all(0 < C < math.inf for C in grid):
        raise ValueError(f"linear probe: C must be above 0 and finite; got {list(grid)}.")


class _Design:
    """The training rows, centred, and what their curvature is made of.

    Centred features are uncorrelated with the intercept, whose row in `theta` [D + 1, K] is the
    last.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, standardise: bool) -> None:
        N = len(features)
        parts = features.split(_CHUNK)
        self.mean = functools.reduce(torch.add, (x.double().sum(0) for x in parts)) / N
        if not self.mean.isfinite().all():
            raise ValueError("linear probe: features must be finite; got NaN or infinity.")
        self.spread = torch.ones_like(self.mean)
        if standardise:
            squares = ((x.double() - self.mean).square().sum(0) for x in parts)
            spread = (functools.reduce(torch.add, squares) / N).sqrt()
            varies = spread > _CONSTANT * self.mean.abs()
            self.spread[varies] = spread[varies]
        self.rows = torch.empty(features.shape, dtype=torch.float32)
        for own, given in zip(self.rows.split(_CHUNK), parts, strict=True):
            own.copy_((given.double() - self.mean) / self.spread)
        self.labels = labels
        self.counts = torch.bincount(labels, minlength=classes).double()
        # A preconditioner may be rounded: fp32 products take half the time.
        values, self.axes = torch.linalg.eigh((self.rows.T @ self.rows).double() / N)
        # The intercept is a feature that is 1.
        self.variances = torch.cat([values.clamp_min(0), values.new_ones(1)])

    def gradient(self, theta: Tensor, penalty: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the gradient of the mean objective, [D + 1, K], and the classes' curvature.

        That is the mean of diag(p) - p p^T over the rows, [K, K].
        """
        N, K = len(self.rows), len(self.counts)
        weights, bias = theta[:-1].to(dtype), theta[-1].to(dtype)
        gradient = torch.zeros_like(theta)
        products = theta.new_zeros(K, K)
        # fp32 rows are used as they lie.
        chunk = N if dtype == self.rows.dtype else _CHUNK
        for x, own in zip(self.rows.split(chunk), self.labels.split(chunk), strict=True):
            x = x.to(dtype)
            residual = torch.addmm(bias, x, weights).softmax(1)
            products += residual.T @ residual
            residual[torch.arange(len(own)), own] -= 1
            gradient[:-1] += x.T @ residual
            gradient[-1] += residual.sum(0, dtype=torch.float64)
        curvature = torch.diag(gradient[-1] + self.counts) - products
        gradient /= N
        gradient[:-1] += penalty * theta[:-1]
        # Adding one vector to every class changes no probability: the optimum has a sum of 0, and
        # rounding must not lead away from it where only the penalty would lead back.
        return gradient - gradient.mean(1, keepdim=True), curvature / N

    def preconditioner(self, curvature: Tensor, penalty: float) -> _Preconditioner:
        """Return the inverse of covariance x curvature + penalty."""
        values, classes = torch.linalg.eigh(curvature)
        # The first one belongs to the sum over classes, which is 0.
        values, classes = values[1:], classes[:, 1:]
        values = values.clamp_min(_FLOOR * values[-1].item())
        scale = self.variances[:, None] * values
        scale[:-1] += penalty

        def apply(gradient: Tensor) -> Tensor:
            turned = torch.cat([self.axes.T @ gradient[:-1], gradient[-1:]]) @ classes / scale
            return torch.cat([self.axes @ turned[:-1], turned[-1:]]) @ classes.T

        return apply


def _minimise(
    design: _Design, theta: Tensor, penalty: float, iterations: int
) -> tuple[Tensor, float, int, bool]:
    """Return the optimum, its gradient's largest entry, the steps, and whether it is one.

    fp32 leads near to it, at the cost of reading the rows twice a step; fp64 confirms it with one
    gradient more, or goes on from there.
    """
    if len(design.counts) == 1:
        return theta, 0.0, 0, True
    steps = 0
    memory: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MEMORY)
    for dtype in (torch.float32, torch.float64):
        gradient, curvature = design.gradient(theta, penalty, dtype)
        least, stalled, converged = math.inf, 0, False
        while steps < iterations:
            step = -_inverse(gradient, memory, design.preconditioner(curvature, penalty))
            length = step.norm().item()
            converged = length <= _TOLERANCE * theta.norm().item()
            stalled = 0 if length < least else stalled + 1
            least = min(least, length)
            if converged or (stalled == _STALLED and dtype == torch.float32):
                break
            steps += 1
            before = theta, gradient
            slope = -(gradient * step).sum().item()
            size = 1.0
            for _ in range(_MOST_TRIALS):
                theta = before[0] + size * step
                gradient, curvature = design.gradient(theta, penalty, dtype)
                # The objective is convex: its slope tells how far beyond the minimum we are, and,
                # unlike its value, still does so close to the optimum.
                after = (gradient * step).sum().item()
                if after <= slope / 2:
                    break
                size *= slope / (slope + after)
            moved, bent = theta - before[0], gradient - before[1]
            if (moved * bent).sum() > 0:
                memory.append((moved, bent))
    return theta, gradient.abs().max().item(), steps, converged


def _inverse(
    gradient: Tensor, memory: deque[tuple[Tensor, Tensor]], precondition: _Preconditioner
) -> Tensor:
    """Return the gradient times L-BFGS's inverse of the curvature (Nocedal 1980)."""
    found = gradient.clone()
    parts = []
    for moved, bent in reversed(memory):
        along = 1 / (moved * bent).sum()
        part = along * (moved * found).sum()
        found -= part * bent
        parts.append((moved, bent, along, part))
    found = precondition(found)
    for moved, bent, along, part in reversed(parts):
        found += (part - along * (bent * found).sum()) * moved
    return found
