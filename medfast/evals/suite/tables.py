"""Results of the suite as one CSV table, and as Markdown tables with means that say over what."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from medfast.evals.suite import EVALUATIONS, TASKS, Kind, cells, overlaps

Row = Mapping[str, Any]

CSV_COLUMNS = (
    *("model", "dataset", "task", "part", "split", "n", "metric", "value"),
    *("ci95_low", "ci95_high", "chance", "in_means", "seed"),
)

CLASSES_CSV_COLUMNS = (
    *("model", "dataset", "task", "split", "class"),
    *("n", "precision", "recall", "f1", "auroc"),
)

# Column of a table -> task, metric and part of the result, as `_parts` names them.
_COLUMNS: dict[Kind, dict[str, tuple[str, str, str]]] = {
    "classification": {
        "zero-shot accuracy": ("zero_shot", "accuracy", ""),
        "balanced": ("zero_shot", "balanced_accuracy", ""),
        "macro F1": ("zero_shot", "macro_f1", ""),
        "macro AUROC": ("zero_shot", "macro_auroc", ""),
        "probe accuracy, 1 % of labels": ("linear_probe", "accuracy", "0.01"),
        "10 %": ("linear_probe", "accuracy", "0.1"),
        "100 %": ("linear_probe", "accuracy", "1"),
        "probe macro AUROC": ("linear_probe", "macro_auroc", "1"),
    },
    "retrieval": {
        f"{direction} {name}".replace("_", " "): (direction, metric, "")
        for direction in TASKS["retrieval"]
        for name, metric in {
            "R@1": "R@1",
            "R@10": "R@10",
            "R@200": "R@200",
            "median rank": "median_rank",
            "R@10, all positives": "all_positives_R@10",
        }.items()
    },
    "vqa": {
        "accuracy": ("vqa", "accuracy", ""),
        "closed": ("vqa", "accuracy_closed", ""),
        "open": ("vqa", "accuracy_open", ""),
        "majority answer": ("vqa", "accuracy", "majority"),
        "question alone": ("vqa", "accuracy", "question_only"),
    },
}
_TITLES: dict[Kind, str] = {
    "classification": "Classification",
    "retrieval": "Retrieval",
    "vqa": "Visual question answering",
}


def in_means(rows: Iterable[Row]) -> set[tuple[str, str]]:
    """Return data set and task of the results that means count.

    Of data sets with the same images only the first of the suite's order counts.
    """
    held = {(row["dataset"], row["task"]) for row in rows}
    counted: set[tuple[str, str]] = set()
    for key, task in cells():
        if (key, task) in held and not any((other, task) in counted for other in overlaps(key)):
            counted.add((key, task))
    return counted


def results_csv(rows: Sequence[Row]) -> str:
    """Return one line for each data set, task and metric."""
    counted = in_means(rows)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in rows:
        counts = "yes" if (row["dataset"], row["task"]) in counted else "no"
        lead = (row["model"], row["dataset"], row["task"])
        for part, (metrics, ci95) in _parts(row).items():
            for name, value in metrics.items():
                interval = ci95.get(name, ("", ""))
                chance = row["chance"].get(name)
                # Closed and open questions are fewer than all.
                n = row.get("n_by", {}).get(name, row["n"])
                about = (*lead, part, row["split"], n, name, value)
                writer.writerow([*about, *interval, chance, counts, row["seed"]])
    return file.getvalue()


def classes_csv(rows: Sequence[Row]) -> str:
    """Return one line for each classification and class; what is undefined is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CLASSES_CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerows({**row, **of_class} for of_class in row.get("per_class", ()))
    return file.getvalue()


def results_markdown(
    rows: Sequence[Row], missing: Mapping[str, str], failed: Mapping[str, str]
) -> str:
    """Return the results as Markdown.

    Args:
        rows: The results.
        missing: Data sets that are not there -> a sentence on how to get them.
        failed: Data sets that failed -> why.
    """
    title = f"{rows[0]['suite']}: {rows[0]['model']}" if rows else "No result"
    lines = [
        f"# {title}",
        "",
        "Values are in percent (ranks from 1), with 95 % bootstrap intervals: over patients, "
        "lesions, slides, studies or articles where they are known. Chance is that of the first "
        "metric. Sets with the same images are marked, and means count one of them.",
    ]
    for kind in _COLUMNS:
        own = [row for row in rows if EVALUATIONS[row["dataset"]] == kind]
        if own:
            lines += ["", f"## {_TITLES[kind]}", "", *_table(kind, own)]
    if failed:
        why = (
            f"- {key}: {reason} The traceback is in {key}.error.txt."
            for key, reason in failed.items()
        )
        lines += ["", "## Failed", "", *why]
    if missing:
        lines += ["", "## Not there", "", *(f"- {how}" for how in missing.values())]
    return "\n".join(lines) + "\n"


def _parts(row: Row) -> dict[str, tuple[Row, Row]]:
    """Return the metrics of each part of a result, and those intervals that there are.

    Parts are "" for most results, shares of the training labels for the probe, where the smaller
    ones are means over draws, and for VQA also its baselines.
    """
    if "by_fraction" in row:
        ci95 = row.get("by_fraction_ci95", {})
        return {share: (own, ci95.get(share, {})) for share, own in row["by_fraction"].items()}
    baselines = row.get("baselines", {}).items()
    return {
        "": (row["metrics"], row["ci95"]),
        **{name: (own["metrics"], own["ci95"]) for name, own in baselines},
    }


def _value(row: Row, metric: str, part: str) -> float:
    """Return a number of a result, NaN where it is undefined."""
    metrics, _ = _parts(row).get(part, ({}, {}))
    return number(metrics.get(metric))


def number(value: float | None) -> float:
    """Return a number as it was before it was written: JSON has null for NaN."""
    return math.nan if value is None else value


def _table(kind: Kind, rows: Sequence[Row]) -> list[str]:
    """Return the table of the data sets of a kind, its means and what to know of it."""
    columns = _COLUMNS[kind]
    of_set: dict[str, dict[str, Row]] = {}
    for row in rows:
        of_set.setdefault(row["dataset"], {})[row["task"]] = row
    lines = [
        "| " + " | ".join(["data set", "n", "chance", *columns]) + " |",
        "| --- |" + " ---: |" * (2 + len(columns)),
        *(_line(key, own, columns.values()) for key, own in of_set.items()),
    ]
    counted = in_means(rows)
    means: list[str] = []
    over: dict[tuple[str, ...], list[str]] = {}
    for task, metric, part in columns.values():
        found = {
            key: _value(own[task], metric, part)
            for key, own in of_set.items()
            if (key, task) in counted
        }
        values = {key: value for key, value in found.items() if not math.isnan(value)}
        mean = fmean(values.values()) if values else None
        means.append(f"{_shown(metric, mean)} ({len(values)})" if values else "")
        if values:
            over.setdefault(tuple(values), []).append(" ".join([task, metric, part]).strip())
    lines += ["| mean (of so many sets) | | | " + " | ".join(means) + " |", ""]
    for sets, names in over.items():
        lines.append(f"- Mean over {', '.join(sets)}: {', '.join(names)}.")
    for key, own in of_set.items():
        left_out = [task for task in own if (key, task) not in counted]
        if left_out:
            others = ", ".join(overlaps(key))
            lines.append(f"- {key}: in no mean of {', '.join(left_out)}, as {others} is there too.")
        lines += [f"- {key}: {note.rstrip('.')}." for note in _notes(own.values())]
    return lines


def _line(key: str, own: Mapping[str, Row], columns: Collection[tuple[str, str, str]]) -> str:
    """Return the line of a data set, given the result of each task."""
    first = next(iter(own.values()))
    metric = next(metric for task, metric, _ in columns if task == first["task"])
    cells = [
        key + (f" (as {', '.join(overlaps(key))})" if overlaps(key) else ""),
        # LC25000's zero-shot figures are of all images.
        " / ".join(dict.fromkeys(map(_n, own.values()))),
        _shown(metric, first["chance"].get(metric)),
        *(_cell(own[task], metric, part) if task in own else "" for task, metric, part in columns),
    ]
    return "| " + " | ".join(cells) + " |"


def _n(row: Row) -> str:
    """Return how many samples a result is of, also of each kind if it has several."""
    kinds = ", ".join(
        f"{n:,} {name.removeprefix('accuracy_')}"
        for name, n in row.get("n_by", {}).items()
        if name != "accuracy"
    )
    return f"{row['n']:,} ({kinds})" if kinds else f"{row['n']:,}"


def _notes(rows: Iterable[Row]) -> list[str]:
    """Return what the figures of a data set must be read with, each note once."""
    notes: list[str] = []
    for row in rows:
        notes += row["notes"]
        # Other sets of the table may have been asked in another way.
        if row.get("prompts", "default") != "default":
            notes.append(f"{row['task']}: asked with the prompts {row['prompts']}")
        if row.get("finetune"):
            notes.append(f"{row['task']}: the towers were trained too")
        if unusable := sum(row["skipped"].values()):
            samples = "sample" if unusable == 1 else "samples"
            notes.append(f"{row['task']}: {unusable} {samples} could not be used")
        if not all(run["converged"] for run in row.get("runs", [])):
            notes.append("a fit of the probe has not converged")
    return list(dict.fromkeys(notes))


def _cell(row: Row, metric: str, part: str) -> str:
    """Return a number with its interval."""
    value = _shown(metric, _value(row, metric, part))
    _, ci95 = _parts(row).get(part, ({}, {}))
    low, high = (_shown(metric, end) for end in ci95.get(metric, (None, None)))
    return f"{value} ({low} to {high})" if low else value


def _shown(metric: str, value: float | None) -> str:
    """Return a share in percent, a rank as it is, and nothing for what is undefined."""
    if math.isnan(number(value)):
        return ""
    return f"{number(value):,.1f}" if metric.endswith("rank") else f"{100 * number(value):.1f}"
