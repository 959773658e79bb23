"""Zero-shot classification: an image takes the class whose prompts match it best."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from medfast.evals.encode import Encoder
from medfast.evals.features import Matchable
from medfast.evals.metrics import bootstrap_ci


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
    classes = [encoder.texts(of_class) for of_class in prompts]
    predicted = images.class_scores(classes).argmax(1)
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
