"""The report's result table and the one line that sums it up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medfast.report.table import Cell, table, words
from medfast.report.text import count, figure, interval, is_share, joined, number, readable

Row = Mapping[str, Any]

_TASKS = {
    "retrieval": "Retrieval",
    "zero_shot": "Zero-shot classification",
    "two_choice": "Two-choice questions",
}
# The value stands early, where a phone shows it without scrolling.
_COLUMNS = (
    "Task",
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
    """Return the evaluations as a table, ordered by task, with a line per metric."""
    if not results:
        return '<p class="empty">No results were recorded.</p>'
    by_task: dict[str, list[Row]] = {task: [] for task in _TASKS}
    for row in results:
        by_task.setdefault(str(row.get("task") or "other"), []).append(row)
    lines = (line for rows in by_task.values() for row in rows for line in _lines(row))
    return (
        table("Results", _COLUMNS, lines)
        + '<p class="quiet">Dot: value. Bar: 95\u00a0% interval. Tick: chance.</p>'
    )


def _lines(row: Row) -> Iterator[list[Cell]]:
    """Yield the line of each metric of an evaluation."""
    task = str(row.get("task") or "other")
    title = _TASKS.get(task) or readable(task).capitalize()
    metrics, chances, intervals = (row.get(key) or {} for key in ("metrics", "chance", "ci95"))
    for metric, value in metrics.items():
        chance = chances.get(metric)
        low, high = map(number, intervals.get(metric) or (None, None))
        yield [
            words(title),
            words(joined(" / ", row.get("dataset"), row.get("name"))),
            words(readable(metric)),
            Cell(figure(metric, value), number(value), 'class="value"'),
            Cell(interval(metric, low, high), high - low),
            Cell(figure(metric, chance), number(chance)),
            _range(value, low, high, chance) if is_share(metric) else Cell("", math.nan),
            Cell(count(row.get("n")), number(row.get("n"))),
            words(row.get("split") or ""),
        ]


def _range(value: Any, low: Any, high: Any, chance: Any) -> Cell:
    """Draw value, interval and chance of a share on a line from 0 to 100 %."""
    value, low, high, chance = map(number, (value, low, high, chance))
    marks = ""
    if not math.isnan(high - low):
        marks += f'<i class="bar" style="left:{low:.1%};width:{high - low:.1%}"></i>'
    if not math.isnan(chance):
        marks += f'<i class="tick" style="left:{chance:.1%}"></i>'
    if not math.isnan(value):
        marks += f'<i class="dot" style="left:{value:.1%}"></i>'
    return Cell(f'<span class="range" aria-hidden="true">{marks}</span>', value)
