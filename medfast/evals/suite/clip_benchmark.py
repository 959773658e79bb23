"""The names that CLIP_benchmark gives to the numbers of a result, beside medfast's in its file.

With them and the keys "dataset", "model", "pretrained", "task", "metrics" and "language" its
`clip_benchmark build` joins results of medfast to its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medfast.evals.metrics import DEEP_KS

_CLASSIFICATION = {
    "accuracy": "acc1",
    "top5_accuracy": "acc5",
    "balanced_accuracy": "mean_per_class_recall",
}
# Task -> metric -> CLIP_benchmark's name. It names a retrieval after what is found.
NAMES: dict[str, dict[str, str]] = {
    "zero_shot": _CLASSIFICATION,
    "linear_probe": {own: f"lp_{name}" for own, name in _CLASSIFICATION.items()},
    "image_to_text": {f"R@{k}": f"text_retrieval_recall@{k}" for k in DEEP_KS},
    "text_to_image": {f"R@{k}": f"image_retrieval_recall@{k}" for k in DEEP_KS},
}
_ALL = frozenset(name for names in NAMES.values() for name in names.values())


def with_names(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result whose metrics are also there under CLIP_benchmark's names."""
    metrics = row["metrics"]
    names = NAMES.get(row["task"], {})
    more = {name: metrics[own] for own, name in names.items() if own in metrics}
    return {**row, "metrics": {**metrics, **more}}


def without_names(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result as it was before `with_names`: each number once."""
    own = {name: value for name, value in row["metrics"].items() if name not in _ALL}
    return {**row, "metrics": own}
