"""The study's tables and sentences, in Markdown that reads well on a terminal."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from statistics import fmean

from medfast.study.folder import Record, best, failures, validation_recall
from medfast.study.plan import PRETRAINING, PRETRAINING_LENGTH, Run, Study, shown
from medfast.study.questions import STARTS, Answer, Side, answers, points, rule, title
from medfast.study.results import (
    ACCURACIES,
    RECALLS,
    SUITE_MEANS,
    Group,
    Outcome,
    groups,
    in_suite_means,
)
from medfast.train import PHANTOM_NOTE

NOT_ASKED = "Not asked: that takes clip, and another method or initialisation."
_READING = (
    "All values are of the test split; of several seeds they are the mean (smallest to largest). x "
    "chance: mean R@1 of both directions over that of guessing. pairs/s: median over the logged "
    "steps."
)
_DASH = "-"


def tables(study: Study, record: Record, outcomes: Sequence[Outcome]) -> str:
    """Return what the runs found: a table of all of them, then the three questions."""
    found = groups([outcome for outcome in outcomes if outcome.run != PRETRAINING])
    lines = [PHANTOM_NOTE, ""] if is_phantom(study) else []
    lines += ["## Results", "", *_overview(found), "", _READING, ""]
    if record.jobs > 1:
        lines += [f"Up to {record.jobs} runs shared the machine, and slowed one another.", ""]
    lines += [line for note in notes(study, outcomes) for line in (note, "")]
    given = answers(found)
    for answer in given:
        lines += [f"## {answer.question.title}", "", answer.question.text, ""]
        if answer.pairs:
            lines += [*_table_of_differences(answer), ""]
            lines += [*(f"- {sentence}" for sentence in answer.sentences), ""]
        else:
            lines += [NOT_ASKED, ""]
    return "\n".join([*lines, rule(given)]).rstrip()


def document(study: Study, record: Record, outcomes: Sequence[Outcome]) -> str:
    """Return the whole of study.md."""
    lines = [f"# Study of {', '.join(study.methods)}", "", tables(study, record, outcomes), ""]
    lines += ["## How it was made", ""]
    lines += [f"- {name}: {value}" for name, value in facts(study, record, outcomes).items()]
    lines += ["- command, which runs all of these:", "", "```bash"]
    lines += [*command_lines(study, outcomes), "```", ""]
    return "\n".join(lines)


def facts(study: Study, record: Record, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Return what a study was made with, and what it took."""
    return {
        "budget": f"{study.budget} ({_settings(study)}), all else default",
        "versions": f"{'; '.join(_versions(outcomes))}; Python {platform.python_version()}",
        "time": _time(record, [outcome.run for outcome in outcomes]),
    }


def command_lines(study: Study, outcomes: Sequence[Outcome]) -> list[str]:
    """Return the command of the study, and those that it runs."""
    runs = [outcome.run for outcome in outcomes]
    words = [study.whole_command()]
    if PRETRAINING in runs:
        words.append(study.data_command())
    words += [study.command(run) for run in runs]
    if study.suite is not None:
        words += [study.suite_command()] if study.suite.is_phantom else []
        words += [study.evaluation_command(run) for run in runs if run != PRETRAINING]
    return [shown(command) for command in words]


def is_phantom(study: Study) -> bool:
    """Return whether the runs are trained on the phantom."""
    return "phantom" in study.config.train_data


def _overview(found: Mapping[Side, Group]) -> list[str]:
    suite = [name for name in SUITE_MEANS if any(group.values(name) for group in found.values())]
    header = ["method", "from", "seeds", *RECALLS, "x chance"]
    header += [*ACCURACIES, *suite, "pairs/s", "peak memory"]
    rows = []
    for (method, init), group in found.items():
        seeds = " ".join(map(str, group.seeds))
        shares = [_share(group.values(name)) for name in RECALLS]
        shares += [f"{group.times_chance:.1f}"]
        shares += [_share(group.values(name)) for name in (*ACCURACIES, *suite)]
        cost = [_number(group.pairs_per_s), f"{_number(group.memory_mb)} MB"]
        rows.append([method, STARTS[init], seeds, *shares, *cost])
    return _markdown(header, rows)


def notes(study: Study, outcomes: Sequence[Outcome]) -> list[str]:
    """Return what the values must be read with."""
    lines = []
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
                f"The general weights are clip's, trained {PRETRAINING_LENGTH} times as many "
                f"epochs on the phantom's general domain, where its R@1 is {recall}."
            )
    if study.pretrained is not None:
        lines.append(f"The general weights are {study.pretrained}.")
    return [*lines, *_suite_notes(study, outcomes)]


def _suite_notes(study: Study, outcomes: Sequence[Outcome]) -> list[str]:
    """Say what the means over the suite are of, and what could not be evaluated."""
    lines = []
    if any(outcome.suite for outcome in outcomes):
        counts = {name: len(own) for name, own in in_suite_means(outcomes).items() if own}
        of_each = ", ".join(f"{name.removeprefix('suite ')} {n}" for name, n in counts.items())
        lines.append(
            "The suite's means are over the results that all evaluated runs have, of data sets "
            f"with the same images one ({of_each})."
        )
        if study.suite_data.exists():
            lines.append("The suite's data sets are phantoms: stand-ins, not medical results.")
        runs = [outcome.run for outcome in outcomes if not outcome.suite]
        lacking = ", ".join(run.name for run in runs if run != PRETRAINING)
        lines += [f"Without results of the suite: {lacking}."] if lacking else []
    failed: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        for cause in failures(study, outcome.run).items():
            failed.setdefault(cause, []).append(outcome.run.name)
    for (key, reason), names in failed.items():
        lines.append(f"{', '.join(names)} could not be evaluated on {key}: {reason}")
    return lines


def _table_of_differences(answer: Answer) -> list[str]:
    rows = [
        [
            f"{title(a)} minus {title(b)}",
            *(points(found[m]) if m in found else _DASH for m in answer.measures),
        ]
        for (a, b), found in zip(answer.pairs, answer.differences, strict=True)
    ]
    return _markdown(["difference in points", *answer.measures], rows)


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
