"""Result rows of several runs side by side: as Markdown, as CSV and as a heat map."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from medfast.errors import UsageError, unknown_name
from medfast.report.heat_map import MISSING, Share, draw_heat_map
from medfast.report.text import count, figure, interval, is_share, joined, number, readable

Row = Mapping[str, Any]

MAIN = (
    *("accuracy", "R@1", "image_to_text_R@1", "text_to_image_R@1"),
    *("accuracy_closed", "accuracy_open"),
)
"""The metrics that stand for an evaluation; of one without any of them it is the first."""
CSV_COLUMNS = (
    *("run", "dataset", "task", "name", "split", "metric"),
    *("value", "low", "high", "chance", "n", "best"),
)
# Metrics of which less is better end so.
_LESS = ("median_rank", "loss")
_RULE = (
    "Bold: the best value of a line, if its 95 % interval lies outside those of all other runs. "
    "Intervals are over samples of the data set, not over trainings."
)
_UNLIKE = (
    "† The runs were not asked alike: the number of samples or the prompts differ, or towers were "
    "trained for the questions, so none is bold."
)


@dataclass(frozen=True)
class Request:
    """What to compare, and what to write beside printing it.

    Attributes:
        sources: Run folders, folders of results, or files of them.
        metrics: Names of metrics, or "main", or "all".
        csv: File for one line per run and metric.
        markdown: File for the table that is printed.
        png: File for a heat map.
    """

    sources: tuple[Path, ...]
    metrics: tuple[str, ...] = ("main",)
    csv: Path | None = None
    markdown: Path | None = None
    png: Path | None = None


class Measure(NamedTuple):
    """What is measured, the same for all runs."""

    dataset: str
    task: str
    name: str
    split: str
    metric: str

    def __str__(self) -> str:
        about = joined(" ", self.dataset, readable(self.task), self.name)
        split = "" if self.split == "test" else f"({self.split})"
        return joined(" ", about, readable(self.metric), split)


@dataclass(frozen=True)
class Value:
    """What one run reached.

    Attributes:
        value: The value; NaN where it is undefined.
        low: Begin of its interval; NaN without one.
        high: End of its interval.
        chance: The value of guessing; NaN where it is not told.
        asked: What must be equal for values to be comparable.
        n: Samples; None where it is not told.
    """

    value: float
    low: float
    high: float
    chance: float
    asked: tuple[Any, ...]
    n: int | None


@dataclass(frozen=True)
class Comparison:
    """All values of some runs.

    Attributes:
        runs: Their names, in order.
        values: Of each measure that a run has, by run.
    """

    runs: tuple[str, ...]
    values: dict[Measure, dict[str, Value]]

    def only(self, metrics: Sequence[str]) -> Comparison:
        """Return the comparison of some metrics: "main" ones, "all", or these by their names.

        Raises:
            UsageError: no run has such a metric.
        """
        known = {measure.metric for measure in self.values}
        for name in metrics:
            if name not in ("main", "all", *known):
                raise UsageError(unknown_name("--metrics", name, ("main", "all", *known)))
        main = self._main() if "main" in metrics else set()
        kept = {
            measure: of_run
            for measure, of_run in self.values.items()
            if "all" in metrics or measure.metric in metrics or measure in main
        }
        return Comparison(self.runs, kept)

    def _main(self) -> set[Measure]:
        by_evaluation: dict[tuple[str, ...], list[Measure]] = {}
        for measure in self.values:
            by_evaluation.setdefault(measure[:-1], []).append(measure)
        chosen: set[Measure] = set()
        for own in by_evaluation.values():
            chosen.update([measure for measure in own if measure.metric in MAIN] or own[:1])
        return chosen

    def best(self, measure: Measure) -> str | None:
        """Return the run whose value is better than all others' beyond the intervals, if any."""
        of_run = self.values[measure]
        if len(of_run) < 2 or self.is_unlike(measure):
            return None
        sign = -1 if measure.metric.endswith(_LESS) else 1
        best = max(of_run, key=lambda run: _or_least(sign * of_run[run].value))
        # Written so that NaN, which is no interval, gives none.
        outside = (
            other.high < of_run[best].low if sign > 0 else of_run[best].high < other.low
            for run, other in of_run.items()
            if run != best
        )
        return best if all(outside) else None

    def is_unlike(self, measure: Measure) -> bool:
        """Return whether the runs were asked different things under one name."""
        return len({value.asked for value in self.values[measure].values()}) > 1


def compare(rows: Mapping[str, Iterable[Row]]) -> Comparison:
    """Return the comparison of runs.

    Of an evaluation that a run has several times the last one counts.

    Args:
        rows: Result rows of each run, as in results.jsonl or as the suite writes them.
    """
    values: dict[Measure, dict[str, Value]] = {}
    for run, own in rows.items():
        for row in own:
            for measure, value in _values(row):
                values.setdefault(measure, {})[run] = value
    return Comparison(tuple(rows), values)


def _values(row: Row) -> Iterator[tuple[Measure, Value]]:
    about = [str(row.get(key) or "") for key in ("dataset", "task", "name", "split")]
    chances, intervals, n = row.get("chance") or {}, row.get("ci95") or {}, row.get("n")
    # Closed and open questions are fewer than all.
    sizes = row.get("n_by") or {}
    asked = n, row.get("prompts_sha256"), row.get("finetune")
    parts = [(about, row["metrics"], intervals)]
    # Smaller shares of the training labels: means over draws.
    for share, metrics in (row.get("by_fraction") or {}).items():
        if float(share) < 1:
            named = [*about[:2], f"{100 * float(share):g} % of labels", about[3]]
            parts.append((named, metrics, (row.get("by_fraction_ci95") or {}).get(share) or {}))
    for own, metrics, ci95 in parts:
        for metric, value in metrics.items():
            low, high = map(number, ci95.get(metric) or (None, None))
            chance = number(chances.get(metric))
            found = Value(number(value), low, high, chance, asked, sizes.get(metric, n))
            yield Measure._make([*own, metric]), found


def markdown(comparison: Comparison) -> str:
    """Return a table with a line for each measure and a column for each run, and its rule."""
    head = ["evaluation", "n", "chance", *comparison.runs]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for measure, of_run in comparison.values.items():
        best = comparison.best(measure)
        sizes = dict.fromkeys(count(value.n) for value in of_run.values())
        chance = figure(measure.metric, next(iter(of_run.values())).chance)
        mark = " †" if comparison.is_unlike(measure) else ""
        cells = [
            _cell(measure.metric, of_run[run], run == best) if run in of_run else ""
            for run in comparison.runs
        ]
        lines.append([f"{measure}{mark}", " / ".join(sizes), chance, *cells])
    unlike = any(comparison.is_unlike(measure) for measure in comparison.values)
    table = "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)
    return "\n\n".join([table, _RULE, *([_UNLIKE] if unlike else [])]) + "\n"


def _cell(metric: str, value: Value, bold: bool) -> str:
    words = figure(metric, value.value)
    words = f"**{words}**" if bold else words
    if math.isnan(value.high - value.low):
        return words
    return f"{words} ({interval(metric, value.low, value.high)})"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def csv_text(comparison: Comparison) -> str:
    """Return one line for each run and measure."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for measure, of_run in comparison.values.items():
        best = comparison.best(measure)
        for run, own in of_run.items():
            numbers = (own.value, own.low, own.high, own.chance)
            shown = ("" if math.isnan(x) else x for x in numbers)
            writer.writerow([run, *measure, *shown, own.n, "yes" if run == best else "no"])
    return file.getvalue()


def heat_map(comparison: Comparison, path: Path) -> None:
    """Draw the values of all shares, coloured by how far they are from chance to perfect.

    Args:
        comparison: What to draw; it has a share.
        path: The PNG to write.

    Raises:
        UsageError: there is no share, of which 1 is perfect, among the metrics.
    """
    shares = {m: of_run for m, of_run in comparison.values.items() if is_share(m.metric)}
    if not shares:
        raise UsageError("--png: none of the metrics is a share between 0 and 1; name others.")
    draw_heat_map(
        path,
        rows=[str(measure) for measure in shares],
        columns=comparison.runs,
        shares=[[_share(of_run.get(run)) for run in comparison.runs] for of_run in shares.values()],
        title="values in %",
    )


def _share(value: Value | None) -> Share:
    return MISSING if value is None else Share(value.value, value.chance)


def _or_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value
