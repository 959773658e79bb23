"""Two-choice questions: the true caption against one that differs in a single detail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medfast.evals.bootstrap import bootstrap_ci
from medfast.evals.encode import Encoder
from medfast.evals.features import Matchable


def two_choice(
    encoder: Encoder,
    images: Matchable,
    groups: Sequence[int],
    true: Sequence[str],
    false: Sequence[str],
) -> dict[str, Any]:
    """Return how often the true caption matches its image better than the false one.

    Args:
        encoder: Embeds the captions.
        images: Features of N images, one row per question.
        groups: Study of each question's image, N.
        true: The image's own captions, N.
        false: The same captions with one detail changed, N.
    """
    true_scores, false_scores = (images.own_scores(encoder.texts(x)) for x in (true, false))
    correct = (true_scores > false_scores).double()
    return {
        "n": len(true),
        "metrics": {"accuracy": correct.mean().item()},
        "chance": {"accuracy": 0.5},
        "ci95": {"accuracy": bootstrap_ci(correct.numpy(), groups)},
    }
