"""Two-choice questions: the true caption against one that differs in a single detail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from medfast.evals.encode import Encoder
from medfast.evals.metrics import bootstrap_ci


def two_choice(
    encoder: Encoder,
    images: Tensor,
    groups: Sequence[int],
    true: Sequence[str],
    false: Sequence[str],
) -> dict[str, Any]:
    """Return how often the true caption lies nearer to its image than the false one.

    Args:
        encoder: Embeds the captions.
        images: Unit image features [N, D], one row per question.
        groups: Study of each question's image, N.
        true: The image's own captions, N.
        false: The same captions with one detail changed, N.
    """
    true_scores = (images * encoder.texts(true)).sum(1)
    correct = (true_scores > (images * encoder.texts(false)).sum(1)).double()
    return {
        "n": len(true),
        "metrics": {"accuracy": correct.mean().item()},
        "chance": {"accuracy": 0.5},
        "ci95": {"accuracy": bootstrap_ci(correct.numpy(), groups)},
    }
