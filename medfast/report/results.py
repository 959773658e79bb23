"""The report's result table and the one line that sums it up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from medfast.report.text import count, figure, interval, is_share, joined, number, readable, text

Row = Mapping[str, Any]

_TASKS = {
    "retrieval": "Retrieval",
    "zero_shot": "Zero-shot classification",
    "two_choice": "Two-choice questions",
}
# The value stands early, where a phone shows it without scrolling.
_COLUMNS = (
    "Data",
    "Metric",
    "Value",
    "95\u00a0% interval",
    "Chance",
    "0 to 100\u00a0%",
    "n",
    "Split",
)


def last_of_each_evaluation(results: Sequence[Row]) -> list[Row]:
    """Return the rows with metrics; of an evaluation that was repeated, the last one."""
    rows = {}
    for row in results:
        if row.get("metrics"):
            rows[tuple(row.get(k) for k in ("task", "dataset", "name", "split", "seed"))] = row
    return list(rows.values())


def headline(results: Sequence[Row], validation: Sequence[Row]) -> str:
    """Say the run in one line: text-to-image recall where measured, else the first figure."""
    rows = [*results, *({"split": "validation", **row} for row in reversed(validation))]
    figures = [
        (row, metric, value)
        for row in rows
        for metric, value in (row.get("metrics") or {}).items()
        if not math.isnan(number(value))
    ]
    recalls = [found for found in figures if found[1] == "text_to_image_R@1"]
    for row, metric, value in recalls or figures:
        line = f"{metric.replace('_to_', '-to-').replace('_', ' ')} {figure(metric, value)}"
        if row.get("n"):
            line += f" of {count(row['n'])}"
        if metric in (row.get("chance") or {}):
            line += f" (chance {figure(metric, row['chance'][metric])})"
        return joined(
            ", ", line, joined(" ", row.get("dataset"), row.get("name"), row.get("split"))
        )
    return "no evaluation was recorded"


def result_table(results: Sequence[Row]) -> str:
    """Return the evaluations as a table, grouped by task, a line per metric."""
    if not results:
        return '<p class="empty">No results were recorded.</p>'
    by_task: dict[str, list[Row]] = {task: [] for task in _TASKS}
    for row in results:
        by_task.setdefault(str(row.get("task") or "other"), []).append(row)
    head = "".join(f'<th scope="col">{title}</th>' for title in _COLUMNS)
    bodies = "".join(_task(task, rows) for task, rows in by_task.items() if rows)
    return (
        '<div class="scroll" role="region" aria-label="Result table" tabindex="0">'
        f'<table class="results"><thead><tr>{head}</tr></thead>'
        f"{bodies}</table></div>"
        '<p class="quiet">Dot: value. Bar: 95\u00a0% interval. Tick: chance.</p>'
    )


def _task(task: str, rows: Sequence[Row]) -> str:
    title = _TASKS.get(task) or readable(task).capitalize()
    return (
        f'<tbody><tr><th class="task" colspan="{len(_COLUMNS)}" scope="rowgroup">{text(title)}</th>'
        f"</tr>{''.join(map(_evaluation, rows))}</tbody>"
    )


def _evaluation(row: Row) -> str:
    metrics, chances, intervals = (row.get(key) or {} for key in ("metrics", "chance", "ci95"))
    lines = []
    for metric, value in metrics.items():
        chance = chances.get(metric)
        low, high = map(number, intervals.get(metric) or (None, None))
        lines.append(
            f"<td>{text(readable(metric))}</td>"
            f'<td class="value">{figure(metric, value)}</td>'
            f"<td>{interval(metric, low, high)}</td>"
            f"<td>{figure(metric, chance)}</td>"
            f"<td>{_range(value, low, high, chance) if is_share(metric) else ''}</td>"
        )
    # What the metrics share spans the lines of all of them.
    span = f'rowspan="{len(lines)}"'
    data = text(joined(" / ", row.get("dataset"), row.get("name")))
    lines[0] = (
        f'<th scope="row" {span}>{data}</th>{lines[0]}'
        f"<td {span}>{count(row.get('n'))}</td><td {span}>{text(row.get('split', ''))}</td>"
    )
    return "".join(f"<tr>{line}</tr>" for line in lines)


def _range(value: Any, low: Any, high: Any, chance: Any) -> str:
    """Draw value, interval and chance of a share on a line from 0 to 100 %."""
    value, low, high, chance = map(number, (value, low, high, chance))
    marks = ""
    if not math.isnan(high - low):
        marks += f'<i class="bar" style="left:{low:.1%};width:{high - low:.1%}"></i>'
    if not math.isnan(chance):
        marks += f'<i class="tick" style="left:{chance:.1%}"></i>'
    if not math.isnan(value):
        marks += f'<i class="dot" style="left:{value:.1%}"></i>'
    return f'<span class="range" aria-hidden="true">{marks}</span>'
