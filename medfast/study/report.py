"""The study's tables and sentences, in Markdown that reads well on a terminal."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from medfast.study.folder import Record, best, validation_recall
from medfast.study.plan import (
    FAMILIES,
    PRETRAINING,
    UNLOCKED_GROUPS,
    Init,
    Run,
    Study,
    shown,
)
from medfast.study.results import ACCURACIES, Cell, Difference, Outcome, cells, difference
from medfast.train import PHANTOM_NOTE

Side = tuple[str, Init]

# What is compared: the mean R@1 of both directions, and the accuracies.
COMPARED = ("R@1", *ACCURACIES)
STARTS: dict[Init, str] = {
    "scratch": "scratch",
    "general": "general weights",
    "frozen": "general weights, partly frozen",
}
_DASH = "-"
_CLIP: Side = ("clip", "scratch")
_FROM_GENERAL: Side = ("clip", "general")


@dataclass(frozen=True)
class Question:
    """A question of the study, and the two sides of each comparison that answers it."""

    title: str
    text: str
    pairs: Sequence[tuple[Side, Side]]


QUESTIONS = (
    Question(
        "Transfer",
        "What do weights of the general domain bring, and what if the image tower keeps them: in "
        f"part (all but its last {UNLOCKED_GROUPS} groups of layers) or, in lit, as a whole?",
        (
            (_FROM_GENERAL, _CLIP),
            (("clip", "frozen"), _FROM_GENERAL),
            (("lit", "general"), _FROM_GENERAL),
        ),
    ),
    Question(
        "Unimodal",
        "What does training within one modality bring beside clip's loss?",
        tuple(((method, "scratch"), _CLIP) for method in FAMILIES["unimodal"]),
    ),
    Question(
        "Granularity",
        "What do losses of patches and words bring over clip's?",
        tuple(((method, "scratch"), _CLIP) for method in FAMILIES["granularity"]),
    ),
)


def tables(study: Study, record: Record, outcomes: Sequence[Outcome]) -> str:
    """Return what the runs found: a table of all of them, then the three questions."""
    found = cells([outcome for outcome in outcomes if outcome.run != PRETRAINING])
    lines = [PHANTOM_NOTE, ""] if "phantom" in study.config.train_data else []
    lines += ["## Results", "", *_overview(found), "", *_notes(study, record, outcomes)]
    intervals = 0
    for question in QUESTIONS:
        lines += ["", f"## {question.title}", "", question.text, ""]
        asked = [(a, b) for a, b in question.pairs if a in found and b in found]
        if not asked:
            lines.append("Not asked: that takes clip, and another method or initialisation.")
            continue
        differences = [_differences(found[a], found[b]) for a, b in asked]
        lines += [*_table_of_differences(asked, differences), ""]
        for (a, b), of_pair in zip(asked, differences, strict=True):
            lines.append(f"- {_sentence(a, b, of_pair)}")
            intervals += sum(d.interval is not None for d in of_pair.values())
    if intervals:
        lines += [
            "",
            f"The intervals are 95 % each, of Welch's t over seeds. Of {intervals}, "
            f"{intervals / 20:.1f} would leave out 0 on average if nothing made a difference. They "
            "hold what a seed changes: the first weights, the order of the data and their crops.",
        ]
    return "\n".join(lines)


def document(study: Study, record: Record, outcomes: Sequence[Outcome]) -> str:
    """Return the whole of study.md."""
    runs = [outcome.run for outcome in outcomes]
    lines = [f"# Study of {', '.join(study.methods)}", "", tables(study, record, outcomes), ""]
    lines += ["## How it was made", ""]
    lines += [f"- budget: {study.budget} ({_settings(study)}), all else default"]
    lines += [f"- versions: {'; '.join(_versions(outcomes))}; Python {platform.python_version()}"]
    lines += [f"- time: {_time(record, runs)}"]
    lines += ["- command, which runs all of these:", "", "```bash", shown(study.whole_command())]
    if PRETRAINING in runs:
        lines.append(shown(study.data_command()))
    lines += [*(shown(study.command(run)) for run in runs), "```", ""]
    return "\n".join(lines)


def _overview(found: Mapping[Side, Cell]) -> list[str]:
    header = ["method", "from", "seeds", "image to text R@1", "text to image R@1", "x chance"]
    header += [*ACCURACIES, "pairs/s", "peak memory"]
    rows = []
    for (method, init), cell in found.items():
        seeds = " ".join(str(outcome.run.seed) for outcome in cell.outcomes)
        shares = [_share(cell.values(f"{way} R@1")) for way in ("image to text", "text to image")]
        shares += [f"{cell.times_chance:.1f}", *(_share(cell.values(m)) for m in ACCURACIES)]
        cost = [_number(cell.pairs_per_s), f"{_number(cell.memory_mb)} MB"]
        rows.append([method, STARTS[init], seeds, *shares, *cost])
    return _markdown(header, rows)


def _notes(study: Study, record: Record, outcomes: Sequence[Outcome]) -> list[str]:
    lines = [
        "All values are of the test split; of several seeds they are the mean (smallest to "
        "largest). x chance: mean R@1 of both directions over that of guessing. pairs/s: median "
        "over the logged steps."
    ]
    if record.jobs > 1:
        lines.append(f"Up to {record.jobs} runs shared the machine, and slowed one another.")
    done = [outcome.run for outcome in outcomes]
    for name, method in best(study).items():
        runs = [Run(other, "scratch") for other in study.family(name)]
        if len(runs) > 1 and all(run in done for run in runs):
            recalls = ", ".join(
                f"{run.method} {100 * validation_recall(study, run):.1f} %" for run in runs
            )
            lines.append(
                f"{method} is the best {name} method by the last validation R@1 of seed 0 "
                f"({recalls}), so it has more seeds."
            )
    for outcome in outcomes:
        if outcome.run == PRETRAINING:
            recall = _share([outcome.values["R@1"]])
            lines.append(
                "The general weights are clip's, trained with the same budget on the phantom's "
                f"general domain, where its R@1 is {recall}."
            )
    if study.pretrained is not None:
        lines.append(f"The general weights are {study.pretrained}.")
    return [line for note in lines for line in (note, "")][:-1]


def _differences(a: Cell, b: Cell) -> dict[str, Difference]:
    """Return the difference of two sides in every measure that both have."""
    values = {measure: (a.values(measure), b.values(measure)) for measure in COMPARED}
    return {measure: difference(*sides) for measure, sides in values.items() if all(sides)}


def _table_of_differences(
    pairs: Sequence[tuple[Side, Side]], differences: Sequence[Mapping[str, Difference]]
) -> list[str]:
    measures = [m for m in COMPARED if any(m in of_pair for of_pair in differences)]
    rows = []
    for (a, b), of_pair in zip(pairs, differences, strict=True):
        cells_of_pair = [_points(of_pair[m]) if m in of_pair else _DASH for m in measures]
        rows.append([f"{_title(a)} minus {_title(b)}", *cells_of_pair])
    return _markdown(["difference in points", *measures], rows)


def _sentence(a: Side, b: Side, differences: Mapping[str, Difference]) -> str:
    """Say what the numbers say, and nothing more."""
    parts = [
        f"{measure} is {'higher' if found.value > 0 else 'lower'} by {_amount(found)}"
        for measure, found in differences.items()
        if found.is_shown
    ]
    none = [m for m, found in differences.items() if found.interval and not found.is_shown]
    if none:
        parts.append(f"no difference shown in {', '.join(none)}")
    for reason in dict.fromkeys(d.why_not for d in differences.values() if d.why_not):
        bare = {m: 100 * d.value for m, d in differences.items() if d.why_not == reason}
        values = ", ".join(f"{measure} {value:+.1f}" for measure, value in bare.items())
        parts.append(f"{reason}, for {values} points")
    return f"{_title(a)} against {_title(b)}: {'; '.join(parts)}."


def _amount(found: Difference) -> str:
    """Return the size of a difference, as a positive number of points with its interval."""
    assert found.interval is not None
    low, high = sorted(abs(100 * end) for end in found.interval)
    return f"{abs(100 * found.value):.1f} points ({low:.1f} to {high:.1f})"


def _points(found: Difference) -> str:
    value = f"{100 * found.value:+.1f}"
    if found.interval is None:
        return f"{value} ({found.why_not})"
    low, high = found.interval
    return f"{value} ({100 * low:+.1f} to {100 * high:+.1f})"


def _title(side: Side) -> str:
    return f"{side[0]} from {STARTS[side[1]]}"


def _share(values: Sequence[float]) -> str:
    if not values:
        return _DASH
    mean = f"{100 * fmean(values):.1f} %"
    if len(values) == 1:
        return mean
    return f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def _number(value: float) -> str:
    return _DASH if math.isnan(value) else f"{value:,.0f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table, its columns of one width so that a terminal shows it too."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    return [lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]]


def _settings(study: Study) -> str:
    return ", ".join(f"{name} {value}" for name, value in study.settings.items()) or "none given"


def _versions(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the versions that the results name; several where the runs differ."""
    found = {}
    for row in (row for outcome in outcomes for row in outcome.rows):
        git = f" ({row['git']})" if row.get("git") else ""
        found[f"medfast {row['medfast']}{git} with torch {row['torch']}"] = True
    return list(found)


def _time(record: Record, runs: Sequence[Run]) -> str:
    known = [record.seconds[run.name] for run in runs if run.name in record.seconds]
    total = f"{sum(known) / 60:.1f} min, added up over {len(known)} runs"
    elsewhere = len(runs) - len(known)
    return total + (f", without {elsewhere} run elsewhere" if elsewhere else "")
