"""What the runs found: one table of everything, means over seeds, and differences."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any

from scipy.special import stdtrit  # type: ignore[import-untyped]

from medfast.run_folder import RunFolder
from medfast.study.folder import damaged, mean_recall
from medfast.study.plan import Init, Run, Study

COLUMNS = (
    *("run", "method", "init", "seed", "task", "name"),
    *("metric", "value", "low", "high", "chance", "n"),
)
# Names of measures in the tables -> task and name of their result rows.
ACCURACIES = {
    "zero-shot modality": ("zero_shot", "modality"),
    "zero-shot finding": ("zero_shot", "finding"),
    "two-choice side": ("two_choice", "side"),
    "two-choice size": ("two_choice", "size"),
    "two-choice count": ("two_choice", "count"),
}


@dataclass(frozen=True)
class Outcome:
    """What one run found on the test split.

    Attributes:
        run: The run.
        rows: Those of its results.jsonl.
        values: Value of each measure that it has, by the measure's name.
        times_chance: Mean R@1 of both directions over that of guessing.
        pairs_per_s: Speeds of its steps.
        memory_mb: Most memory in use.
    """

    run: Run
    rows: list[dict[str, Any]]
    values: dict[str, float]
    times_chance: float
    pairs_per_s: list[float]
    memory_mb: float


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
    values = {
        "image to text R@1": retrieval["metrics"]["image_to_text_R@1"],
        "text to image R@1": retrieval["metrics"]["text_to_image_R@1"],
        "R@1": mean_recall(retrieval["metrics"]),
    }
    for measure, key in ACCURACIES.items():
        if key in found and found[key]["metrics"]["accuracy"] is not None:
            values[measure] = found[key]["metrics"]["accuracy"]
    steps = [row for row in folder.read_metrics() if row["kind"] == "train"]
    return Outcome(
        run,
        rows,
        values,
        values["R@1"] / mean_recall(retrieval["chance"]),
        [row["samples_per_s"] for row in steps],
        max((row["memory_mb"] for row in steps), default=math.nan),
    )


def write_csv(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write one row per run, task and metric."""
    beside = path.with_suffix(".part")
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for outcome in outcomes:
            run = outcome.run
            for row in outcome.rows:
                for metric, value in row["metrics"].items():
                    low, high = row["ci95"][metric]
                    about = (run.name, run.method, run.init, run.seed, row["task"], row["name"])
                    chance = row["chance"][metric]
                    writer.writerow([*about, metric, value, low, high, chance, row["n"]])
    beside.replace(path)


class Cell:
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


def cells(outcomes: Sequence[Outcome]) -> dict[tuple[str, Init], Cell]:
    """Return the runs by method and initialisation, in their order."""
    grouped: dict[tuple[str, Init], list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault((outcome.run.method, outcome.run.init), []).append(outcome)
    return {key: Cell(of_key) for key, of_key in grouped.items()}


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
