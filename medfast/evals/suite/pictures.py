"""Results of the suite as pictures: a heat map of all, and the confusions of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfast.evals.suite import EVALUATIONS, TASKS
from medfast.evals.suite.tables import number
from medfast.report.heat_map import MISSING, Share, draw_heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

HEADLINES = {
    "zero_shot": "accuracy",
    "linear_probe": "accuracy",
    "image_to_text": "R@10",
    "text_to_image": "R@10",
    "vqa": "accuracy",
}
"""Task -> the metric that the heat map shows."""

_MOST_WRITTEN = 16


def heat_map(rows: Sequence[Row], path: Path) -> None:
    """Draw one number of each result, coloured by how far it is from chance to perfect.

    Args:
        rows: The results of one model.
        path: The PNG to write.
    """
    keys = [key for key in EVALUATIONS if any(result["dataset"] == key for result in rows)]
    tasks = list(dict.fromkeys(task for key in keys for task in TASKS[EVALUATIONS[key]]))
    found = {(result["dataset"], result["task"]): headline(result) for result in rows}
    draw_heat_map(
        path,
        rows=keys,
        columns=[f"{task} {HEADLINES[task]}" for task in tasks],
        shares=[[found.get((key, task), MISSING) for task in tasks] for key in keys],
        title=f"{rows[0]['model']}, values in %",
    )


def headline(row: Row) -> Share:
    """Return the number of a result that stands for it, and that of guessing."""
    metric = HEADLINES[row["task"]]
    return Share(number(row["metrics"].get(metric)), number(row["chance"].get(metric)))


def confusion_picture(row: Row, path: Path) -> None:
    """Draw the confusion matrix of a classification result, in shares of each class's samples.

    Args:
        row: The result.
        path: The PNG to write.
    """
    import numpy as np

    counts = np.array(row["confusion"], dtype=np.float64)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    names = [of["class"] for of in row["per_class"]]
    figure = _figure(3.6 + 0.42 * len(names), 2.8 + 0.42 * len(names))
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
    short = [name if len(name) <= 32 else f"{name[:31]}\u2026" for name in names]
    axes.set_xticks(range(len(names)), short, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(names)), short, fontsize=7)
    axes.set_xlabel("predicted", fontsize=8)
    axes.set_ylabel("true", fontsize=8)
    if len(names) <= _MOST_WRITTEN:
        for true, predicted in np.argwhere(counts > 0):
            count = f"{counts[true, predicted]:.0f}"
            _write(axes, true, predicted, count, shares[true, predicted])
    axes.set_title(f"{row['dataset']}, {row['task']}, n {row['n']:,}", fontsize=9)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    # A figure of its own, without pyplot: the caller's figures and backend stay as they are.
    return Figure(figsize=(width, height), layout="constrained")


def _write(axes: Any, row: int, column: int, words: str, strength: float) -> None:
    """Write into a cell, light on dark colours and dark on light ones."""
    # Where chance is perfect, there is no colour.
    colour = "white" if strength <= 0.6 else "black"
    axes.text(column, row, words, ha="center", va="center", color=colour, fontsize=7)


def _save(figure: Figure, path: Path) -> None:
    # Without a date, so that equal results are equal files.
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
