"""The study's page: the three questions, heat maps, curves, cost, all runs and their commands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from medfast.report.charts import Interval, Line, chart, interval_chart
from medfast.report.page import commands, header, section, write_page
from medfast.report.table import Cell, table, words
from medfast.report.text import text
from medfast.study.folder import Record
from medfast.study.plan import PRETRAINING, Study
from medfast.study.questions import QUESTIONS, STARTS, Answer, answers, points, rule, title
from medfast.study.report import NOT_ASKED, command_lines, facts, is_phantom, notes
from medfast.study.results import Difference, Outcome, groups
from medfast.study.sections import NONE, colours, cost, curves, heat_maps, runs
from medfast.train import PHANTOM_NOTE

_SECTIONS = ("Results", "Curves", "Cost", "Runs", "Commands")
_NO_ENDS = (math.nan, math.nan)


def write_study_page(path: Path, study: Study, record: Record, outcomes: Sequence[Outcome]) -> Path:
    """Write the page of a study, a single file that requests nothing from outside.

    Args:
        path: The file.
        study: What was asked for.
        record: The runs' times.
        outcomes: What the runs found, with the suite.

    Returns:
        `path`.
    """
    found = groups([outcome for outcome in outcomes if outcome.run != PRETRAINING])
    given = answers(found)
    read_with = "".join(f'<p class="quiet">{text(n)}</p>' for n in notes(study, outcomes))
    return write_page(
        path,
        title=_name(study),
        body=[
            _header(study, outcomes),
            *(_question(answer) for answer in given),
            f'<p class="quiet">{text(rule(given))}</p>' if rule(given) else "",
            section("Results", heat_maps(found) + read_with),
            section("Curves", curves(given, found)),
            section("Cost", cost(found, record)),
            section("Runs", runs(record, outcomes)),
            section("Commands", _making(study, record, outcomes)),
        ],
    )


def _name(study: Study) -> str:
    methods = study.methods
    return f"Study of {', '.join(methods) if len(methods) < 4 else f'{len(methods)} methods'}"


def _header(study: Study, outcomes: Sequence[Outcome]) -> str:
    compared = [outcome.run for outcome in outcomes if outcome.run != PRETRAINING]
    note = f"<p>{text(PHANTOM_NOTE)}</p>" if is_phantom(study) else ""
    about = {
        "runs": str(len(outcomes)),
        "seeds": " ".join(map(str, sorted({run.seed for run in compared}))),
        "from": "; ".join(STARTS[init] for init in dict.fromkeys(run.init for run in compared)),
        "budget": Path(study.budget).stem,
    }
    summary = f"{', '.join(study.methods)}: trained alike and asked alike."
    titles = (*(question.title for question in QUESTIONS), *_SECTIONS)
    links = "".join(f'<li><a href="#{name.lower()}">{name}</a></li>' for name in titles)
    return f"{header(_name(study), text(summary), about)}{note}<nav><ul>{links}</ul></nav>"


def _question(answer: Answer) -> str:
    asked = f"<p>{text(answer.question.text)}</p>"
    if not answer.pairs:
        return section(answer.question.title, f'{asked}<p class="empty">{NOT_ASKED}</p>')
    said = "".join(f"<li>{text(sentence)}</li>" for sentence in answer.sentences)
    return section(
        answer.question.title,
        f'{asked}<div class="answer">{_differences(answer)}<ul>{said}</ul></div>{_table(answer)}',
    )


def _differences(answer: Answer) -> str:
    """Draw the differences of a question with their intervals."""
    ink = colours(answer)
    rows = [
        (
            measure,
            [
                Interval(ink[a], 100 * d.value, *(100 * end for end in d.interval or _NO_ENDS))
                for (a, _), of_pair in zip(answer.pairs, answer.differences, strict=True)
                if (d := of_pair.get(measure)) is not None
            ],
        )
        for measure in answer.measures
    ]
    said = " ".join(["Differences with 95 % intervals.", *answer.sentences])
    return chart(
        interval_chart(rows, alt=said, unit="difference in points"),
        legend=[
            (Line(f"{title(a)} minus {title(b)}", ink[a], width=3), "") for a, b in answer.pairs
        ],
        caption="Dot: difference of means. Bar: its 95 % interval over seeds, bold in the table "
        "where it leaves out 0. Ring: without an interval.",
    )


def _table(answer: Answer) -> str:
    rows = [
        [words(f"{title(a)} minus {title(b)}"), *(_points(found.get(m)) for m in answer.measures)]
        for (a, b), found in zip(answer.pairs, answer.differences, strict=True)
    ]
    heads = ("Difference in points", *answer.measures)
    name = f"{answer.question.title}: differences in points"
    return table(name, heads, rows, kind="results named")


def _points(found: Difference | None) -> Cell:
    if found is None:
        return NONE
    if found.interval is None:  # the sentences say why
        return Cell(f'<span class="quiet">{100 * found.value:+.1f}</span>', found.value)
    return Cell(text(points(found)), found.value, 'class="value"' if found.is_shown else "")


def _making(study: Study, record: Record, outcomes: Sequence[Outcome]) -> str:
    about = "".join(
        f"<li>{name} <b>{text(value)}</b></li>"
        for name, value in facts(study, record, outcomes).items()
    )
    whole, *lines = command_lines(study, outcomes)
    return (
        f'<ul class="facts">{about}</ul><h3>Command</h3>{commands([whole])}'
        f"<details><summary>The {len(lines)} commands that it runs</summary>{commands(lines)}"
        "</details>"
    )
