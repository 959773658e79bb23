"""Zero-shot classification: an image takes the class whose prompts match it best."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medfast.evals.bootstrap import bootstrap_ci
from medfast.evals.encode import Encoder
from medfast.evals.features import Matchable
from medfast.evals.metrics import classification_metrics, softmax


def zero_shot(
    encoder: Encoder,
    images: Matchable,
    labels: Sequence[int],
    groups: Sequence[int],
    prompts: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """Return the accuracy over classes, with its chance level and interval.

    Args:
        encoder: Embeds the prompts.
        images: Features of N images.
        labels: Class of each image, N.
        groups: Study of each image, N.
        prompts: Prompts of each class, K lists.
    """
    predicted = images.class_scores(class_texts(encoder, prompts)).argmax(1)
    correct = (predicted == torch.tensor(labels)).double()
    counts = torch.bincount(torch.tensor(labels), minlength=len(prompts))
    return {
        "n": len(labels),
        "classes": len(prompts),
        "metrics": {"accuracy": correct.mean().item()},
        # The better of guessing evenly and always naming the most frequent class.
        "chance": {"accuracy": max(1 / len(prompts), counts.max().item() / len(labels))},
        "ci95": {"accuracy": bootstrap_ci(correct.numpy(), groups)},
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }


def class_texts(encoder: Encoder, prompts: Sequence[Sequence[str]]) -> list[Matchable]:
    """Return the features of the prompts of each class, K lists -> K of them."""
    return [encoder.texts(of_class) for of_class in prompts]


def zero_shot_metrics(
    scores: Tensor,
    scale: float,
    labels: Sequence[int],
    groups: Sequence[int],
    *,
    graded: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Return all numbers of a zero-shot classification.

    Probabilities are the softmax of scale x score, for two classes as for more.

    Args:
        scores: How well each class matches each image, [N, K], as `Matchable.class_scores`.
        scale: The model's logit scale.
        labels: Class of each image, N.
        groups: Patient of each image, N.
        graded: As in `classification_metrics`, which also says what is returned.
        seed: Of the intervals.
    """
    probabilities = softmax(scale * scores.double().numpy())
    return classification_metrics(probabilities, labels, groups, graded=graded, seed=seed)
