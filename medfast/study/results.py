"""What the runs found: one table of everything, means over seeds, and differences."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any, NamedTuple

from scipy.special import stdtrit  # type: ignore[import-untyped]

from medfast import json_lines
from medfast.evals.suite import cells
from medfast.evals.suite.pictures import headline
from medfast.evals.suite.tables import in_means
from medfast.report.curves import last_of_each_step
from medfast.report.text import number
from medfast.run_folder import RunFolder
from medfast.study.folder import damaged, evaluation, mean_recall
from medfast.study.plan import Init, Run, Study

COLUMNS = (
    *("run", "method", "init", "seed", "dataset", "task", "name"),
    *("metric", "value", "low", "high", "chance", "n"),
)
# Names of measures in the tables -> metric of retrieval.
RECALLS = {
    "image to text R@1": "image_to_text_R@1",
    "text to image R@1": "text_to_image_R@1",
}
# The same -> task and name of their result rows.
ACCURACIES = {
    "zero-shot modality": ("zero_shot", "modality"),
    "zero-shot finding": ("zero_shot", "finding"),
    "two-choice side": ("two_choice", "side"),
    "two-choice size": ("two_choice", "size"),
    "two-choice count": ("two_choice", "count"),
}
# Names of means over the data sets of the suite -> the tasks whose headlines they are of.
SUITE_MEANS = {
    "suite zero-shot accuracy": ("zero_shot",),
    "suite probe accuracy": ("linear_probe",),
    "suite retrieval R@10": ("image_to_text", "text_to_image"),
    "suite VQA accuracy": ("vqa",),
}
MEASURES = (*ACCURACIES, *SUITE_MEANS)


class Validation(NamedTuple):
    """What the validation at one step found; NaN where it was not measured."""

    step: int
    recall: float
    loss: float


@dataclass(frozen=True)
class Outcome:
    """What one run found.

    Attributes:
        run: The run.
        rows: Those of its results.jsonl, of the test split.
        values: Value of each measure that it has, by the measure's name.
        chances: The same of guessing.
        pairs_per_s: Speeds of its steps.
        memory_mb: Most memory in use.
        validations: Those while it trained.
        suite: Result of each data set and task of the suite that it was evaluated on.
    """

    run: Run
    rows: list[dict[str, Any]]
    values: dict[str, float]
    chances: dict[str, float]
    pairs_per_s: list[float]
    memory_mb: float
    validations: list[Validation]
    suite: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    @property
    def times_chance(self) -> float:
        """Mean R@1 of both directions over that of guessing."""
        return self.values["R@1"] / self.chances["R@1"]


def read_outcome(study: Study, run: Run) -> Outcome:
    """Return what a run found that is done.

    Raises:
        UsageError: its files are damaged.
    """
    try:
        return _outcome(run, RunFolder(study.runs / run.name))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise damaged(study, run, error) from None


def _outcome(run: Run, folder: RunFolder) -> Outcome:
    with folder.results.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    found = {(row["task"], row["name"]): row for row in rows}
    retrieval = found["retrieval", ""]
    values, chances = _recalls(retrieval["metrics"]), _recalls(retrieval["chance"])
    for measure, key in ACCURACIES.items():
        if key in found and found[key]["metrics"]["accuracy"] is not None:
            values[measure] = found[key]["metrics"]["accuracy"]
            chances[measure] = number(found[key]["chance"]["accuracy"])
    history = folder.read_metrics()
    steps = [row for row in history if row["kind"] == "train"]
    return Outcome(
        run,
        rows,
        values,
        chances,
        [row["samples_per_s"] for row in steps],
        max((row["memory_mb"] for row in steps), default=math.nan),
        [
            Validation(row["step"], mean_recall(row["metrics"]), number(row.get("loss")))
            for row in last_of_each_step(history, "validation")
        ],
    )


def _recalls(metrics: Mapping[str, float]) -> dict[str, float]:
    return {
        **{measure: metrics[metric] for measure, metric in RECALLS.items()},
        "R@1": mean_recall(metrics),
    }


def with_suite(study: Study, outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return the outcomes with what the suite found for each, and with its means.

    A mean is over the data sets that all runs have, of which several with the same images count
    once: it compares like with like.

    Raises:
        UsageError: a file of results is damaged.
    """
    read = [replace(outcome, suite=_suite(study, outcome.run)) for outcome in outcomes]
    means = in_suite_means(read)
    for outcome in read:
        for measure, over in means.items():
            if outcome.suite and over:
                outcome.values[measure] = fmean(
                    headline(outcome.suite[cell]).value for cell in over
                )
    return read


def in_suite_means(outcomes: Sequence[Outcome]) -> dict[str, list[tuple[str, str]]]:
    """Return the data sets and tasks that each of `SUITE_MEANS` is over."""
    asked = [outcome.suite for outcome in outcomes if outcome.suite]
    first = asked[0] if asked else {}
    shared = [row for cell, row in first.items() if all(_has(suite, cell) for suite in asked)]
    counted = in_means(shared)
    return {
        measure: [cell for cell in cells() if cell in counted and cell[1] in tasks]
        for measure, tasks in SUITE_MEANS.items()
    }


def _has(suite: Mapping[tuple[str, str], Mapping[str, Any]], cell: tuple[str, str]) -> bool:
    return cell in suite and not math.isnan(headline(suite[cell]).value)


def _suite(study: Study, run: Run) -> dict[tuple[str, str], dict[str, Any]]:
    rows = {cell: json_lines.read(evaluation(study, run, *cell)) for cell in cells()}
    return {cell: own[0] for cell, own in rows.items() if own}


def write_csv(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write one row per run, task and metric."""
    beside = path.with_suffix(".part")
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for outcome in outcomes:
            run = outcome.run
            for row in (*outcome.rows, *outcome.suite.values()):
                for metric, value in row["metrics"].items():
                    low, high = row["ci95"].get(metric, ("", ""))
                    about = (run.name, run.method, run.init, run.seed, row["dataset"])
                    of = (row["task"], row["name"], metric, value, low, high)
                    writer.writerow([*about, *of, row["chance"].get(metric), row["n"]])
    beside.replace(path)


class Group:
    """The runs of one method from one initialisation.

    Args:
        outcomes: Theirs, one per seed, at least one.
    """

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes = outcomes

    @property
    def seeds(self) -> list[int]:
        """The seeds."""
        return [outcome.run.seed for outcome in self.outcomes]

    def values(self, measure: str) -> list[float]:
        """Return the value of each seed that has this measure."""
        return [o.values[measure] for o in self.outcomes if measure in o.values]

    @property
    def times_chance(self) -> float:
        """Mean R@1 over that of guessing."""
        return fmean(outcome.times_chance for outcome in self.outcomes)

    @property
    def pairs_per_s(self) -> float:
        """Median speed of all steps."""
        speeds = [speed for outcome in self.outcomes for speed in outcome.pairs_per_s]
        return median(speeds) if speeds else math.nan

    @property
    def memory_mb(self) -> float:
        """Most memory in use."""
        return max(outcome.memory_mb for outcome in self.outcomes)


def groups(outcomes: Sequence[Outcome]) -> dict[tuple[str, Init], Group]:
    """Return the runs by method and initialisation, in their order."""
    grouped: dict[tuple[str, Init], list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault((outcome.run.method, outcome.run.init), []).append(outcome)
    return {key: Group(of_key) for key, of_key in grouped.items()}


@dataclass(frozen=True)
class Difference:
    """A mean minus another one.

    Attributes:
        value: The difference.
        interval: Its 95 % interval over seeds; None where these do not give one.
        why_not: Why there is no interval.
    """

    value: float
    interval: tuple[float, float] | None
    why_not: str = ""

    @property
    def is_shown(self) -> bool:
        """Whether there is an interval and 0 is not in it."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def difference(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Difference:
    """Return the mean of `a` minus that of `b`, with the interval of Welch's t (1947).

    Args:
        a: One value per seed, at least one.
        b: The same of the other side; the seeds are not paired.
        level: Coverage.
    """
    value = fmean(a) - fmean(b)
    if min(len(a), len(b)) < 2:
        return Difference(value, None, "one seed, no interval")
    parts = [variance(x) / len(x) for x in (a, b)]
    error = math.sqrt(sum(parts))
    if error == 0:  # a width of 0 would claim too much
        return Difference(value, None, "all seeds alike, no interval")
    of_each = (part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True))
    freedom = error**4 / sum(of_each)
    half = float(stdtrit(freedom, (1 + level) / 2)) * error
    return Difference(value, (value - half, value + half))
