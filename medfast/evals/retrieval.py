"""Image-to-text and text-to-image retrieval over the whole gallery."""

from __future__ import annotations

from typing import Any

from medfast.evals.encode import Embeddings
from medfast.evals.metrics import KS, bootstrap_ci, recall_at


def retrieval(embeddings: Embeddings) -> dict[str, Any]:
    """Return Recall@k of both directions with chance levels and intervals by study.

    One positive per query: its own caption (or image). Another view of the same study counts as
    a miss.
    """
    n = len(embeddings.index)
    image_to_text, text_to_image = embeddings.ranks
    both = {"image_to_text": image_to_text, "text_to_image": text_to_image}
    hits = {
        f"{direction}_R@{k}": recall_at(found, k) for direction, found in both.items() for k in KS
    }
    return {
        "n": n,
        "metrics": {name: float(hit.mean()) for name, hit in hits.items()},
        "chance": {name: min(1.0, int(name.rpartition("@")[2]) / n) for name in hits},
        "ci95": {name: bootstrap_ci(hit, embeddings.group.tolist()) for name, hit in hits.items()},
    }
