"""Image-to-text and text-to-image retrieval over the whole gallery."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medfast.evals.encode import Embeddings
from medfast.evals.metrics import KS, bootstrap_ci, recall_at


def ranks(query: Tensor, gallery: Tensor, chunk: int = 2048) -> Tensor:
    """Return the rank of gallery row i for query row i, int64 [N]; 0 is best.

    Ties count against the query: a model that gives everything the same score finds nothing.

    Args:
        query: Unit features [N, D].
        gallery: Unit features [N, D].
        chunk: Queries scored at a time, which bounds the memory at chunk x N.
    """
    found = []
    for start in range(0, len(query), chunk):
        scores = query[start : start + chunk] @ gallery.T
        own = scores.diagonal(start).unsqueeze(1)
        found.append((scores >= own).sum(1) - 1)
    return torch.cat(found)


def retrieval(embeddings: Embeddings) -> dict[str, Any]:
    """Return Recall@k of both directions with chance levels and intervals by study.

    One positive per query: its own caption (or image). Another view of the same study counts as
    a miss.
    """
    n = len(embeddings.index)
    both = {
        "image_to_text": ranks(embeddings.image, embeddings.text),
        "text_to_image": ranks(embeddings.text, embeddings.image),
    }
    hits = {
        f"{direction}_R@{k}": recall_at(found, k) for direction, found in both.items() for k in KS
    }
    return {
        "n": n,
        "metrics": {name: float(hit.mean()) for name, hit in hits.items()},
        "chance": {name: min(1.0, int(name.rpartition("@")[2]) / n) for name in hits},
        "ci95": {name: bootstrap_ci(hit, embeddings.group.tolist()) for name, hit in hits.items()},
    }
