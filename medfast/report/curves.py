"""The report's two charts: loss while training and recall on the validation pairs."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

from medfast.report.charts import SERIES_COLOURS, Line, chart, line_chart
from medfast.report.text import count, figure, number, readable

Row = Mapping[str, Any]

# A chart of 500 px has no room for more.
_MOST_POINTS = 240

_RECALL = re.compile(r"(?P<direction>image_to_text|text_to_image)_R@(?P<k>\d+)")
_DIRECTIONS = {"image_to_text": "solid", "text_to_image": "dashed"}


def last_of_each_step(history: Sequence[Row], kind: str) -> list[Row]:
    """Return the rows of `kind` by step; of a step that a resumed run repeated, the last one."""
    rows = {
        number(row.get("step")): row
        for row in history
        if row.get("kind") == kind and not math.isnan(number(row.get("step")))
    }
    return [rows[step] for step in sorted(rows)]


def curves(training: Sequence[Row], validation: Sequence[Row]) -> str:
    """Return both charts, over the same steps, and what the training cost."""
    until = max((row["step"] for row in (*training, *validation)), default=0)
    return (
        f'<div class="charts">{_losses(training, until)}{_recalls(validation, until)}</div>'
        f'<p class="quiet">{_cost(training)}</p>'
    )


def _losses(training: Sequence[Row], until: float) -> str:
    series = {"total": [number(row.get("loss")) for row in training]}
    for term in dict.fromkeys(term for row in training for term in row.get("losses") or {}):
        series[term] = [number((row.get("losses") or {}).get(term)) for row in training]
    steps = [row["step"] for row in training]
    per_point = math.ceil(len(steps) / _MOST_POINTS)
    colours = ["ink", *SERIES_COLOURS]
    lines = [
        Line(
            name,
            colours[index % len(colours)],
            dash="solid" if index < len(colours) else "dashed",
            width=1.3 if index else 2.2,
            x=_means(steps, per_point),
            y=_means(values, per_point),
        )
        for index, (name, values) in enumerate(series.items())
        if _finite(values)
    ]
    if not lines:
        return '<figure><p class="empty">No training loss was recorded.</p></figure>'

    last = [_finite(series[line.name])[-1] for line in lines]
    caption = "Training loss; in the legend, its last value."
    if per_point > 1:
        caption += f" Every point is the mean of {per_point} logged steps."
    if lost := len(steps) - len(_finite(series["total"])):
        caption += f" Without a finite total: {lost:,} of {len(steps):,} logged steps."
    ends = ", ".join(f"{line.name} {value:.3g}" for line, value in zip(lines, last, strict=True))
    return chart(
        line_chart(lines, alt=f"Training loss; last values: {ends}.", until=until),
        legend=[(line, f"{value:.3g}") for line, value in zip(lines, last, strict=True)],
        caption=caption,
    )


def _recalls(validation: Sequence[Row], until: float) -> str:
    series: dict[tuple[int, str], list[float]] = {}
    for metric in {metric for row in validation for metric in row.get("metrics") or {}}:
        match = _RECALL.fullmatch(metric)
        values = [number((row.get("metrics") or {}).get(metric)) for row in validation]
        if match and _finite(values):
            series[int(match["k"]), match["direction"]] = values
    if not series:
        return '<figure><p class="empty">No validation recall was recorded.</p></figure>'

    last = validation[-1]
    steps = [row["step"] for row in validation]
    colours = dict(zip(sorted({k for k, _ in series}), cycle(SERIES_COLOURS), strict=False))
    lines = []
    ends: dict[str, list[str]] = {direction: [] for direction in _DIRECTIONS}
    for (k, direction), values in sorted(series.items()):
        metric = f"{direction}_R@{k}"
        chance = number((last.get("chance") or {}).get(metric))
        lines.append(Line("chance", colours[k], "dotted", 1.0, (0, until), (chance, chance)))
        lines.append(Line(metric, colours[k], _DIRECTIONS[direction], x=steps, y=values))
        ends[direction].append(f"R@{k}\u00a0{figure(metric, values[-1])}")
    pairs = f"{count(last['n'])} validation pairs" if last.get("n") else "the validation pairs"
    recalls = "; ".join(
        f"{readable(name)} {', '.join(said)}" for name, said in ends.items() if said
    )
    caption = f"Recall of {pairs}; at step {count(last['step'])}: {recalls}."
    legend = [
        *(Line(f"R@{k}", colour, width=3) for k, colour in colours.items()),
        *(Line(readable(name), "muted", dash) for name, dash in _DIRECTIONS.items()),
        Line("chance", "muted", "dotted"),
    ]
    return chart(
        line_chart(lines, alt=caption, until=until, percent=True),
        legend=[(line, "") for line in legend],
        caption=caption,
    )


def _cost(training: Sequence[Row]) -> str:
    """Say how much was trained, how fast and in how much memory, as far as it was recorded."""
    last = training[-1] if training else {}
    speeds, memory = (
        _finite(number(row.get(key)) for row in training) for key in ("samples_per_s", "memory_mb")
    )
    facts = {
        "{:,.0f} steps": last.get("step"),
        "{:.3g} epochs": last.get("epoch"),
        "{:,.0f} pairs seen": last.get("samples"),
        "{:,.0f} pairs per second (median)": statistics.median(speeds) if speeds else None,
        "{:,.0f} MB at the peak": max(memory, default=None),
    }
    return " · ".join(
        fact.format(value) for fact, value in facts.items() if not math.isnan(number(value))
    )


def _means(values: Sequence[float], size: int) -> list[float]:
    """Return the mean of the finite values among every `size` ones."""
    groups = (_finite(values[start : start + size]) for start in range(0, len(values), size))
    return [statistics.fmean(group) if group else math.nan for group in groups]


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]
