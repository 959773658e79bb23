"""Sections of the study's page: heat maps, curves, cost and all runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import cycle
from statistics import fmean

from medfast.evals.suite import EVALUATIONS
from medfast.evals.suite.pictures import headline
from medfast.report.charts import SERIES_COLOURS, Line, chart, line_chart
from medfast.report.heat_map import MISSING, Share, heat_table
from medfast.report.table import Cell, table, words
from medfast.report.text import count, figure
from medfast.study.folder import Record
from medfast.study.plan import Evaluation
from medfast.study.questions import STARTS, Answer, Side, title
from medfast.study.results import ACCURACIES, RECALLS, SUITE_MEANS, Group, Outcome

Found = Mapping[Side, Group]
Parts = Mapping[str, tuple[str, tuple[str, ...]]]

NONE = Cell("\u2013", math.nan)
# Title of a heat map of the suite -> name of a group of columns -> kind of data set, and the tasks
# whose headlines a column is the mean of.
_SUITE_MAPS: dict[str, Parts] = {
    "The suite": {
        "zero-shot classification, accuracy": ("classification", ("zero_shot",)),
        "retrieval, R@10": ("retrieval", ("image_to_text", "text_to_image")),
        "VQA, accuracy": ("vqa", ("vqa",)),
    },
    "Linear probes on the suite": {
        "classification, accuracy": ("classification", ("linear_probe",)),
    },
}
_COLOUR = "Means over seeds, in percent; the colour grows from chance to perfect."
# What the curves show: the attribute of a validation, its name, and how its values are written.
_CURVES = (
    ("recall", "R@1 of the validation pairs, mean of both directions", partial(figure, "R@1")),
    ("loss", "Loss of the validation pairs", "{:.2f}".format),
)


def heat_maps(found: Found) -> str:
    """Return the heat maps of the held-out pairs and of the suite, as far as it was evaluated."""
    maps = [_held_out_map(found)]
    maps += [_suite_map(name, parts, found) for name, parts in _SUITE_MAPS.items()]
    return "".join(maps)


def colours(answer: Answer) -> dict[Side, str]:
    """Return a colour for each side of a question, the same in all of its pictures."""
    sides = dict(zip((a for a, _ in answer.pairs), SERIES_COLOURS, strict=False))
    return {**dict.fromkeys((b for _, b in answer.pairs), "ink"), **sides}


def _held_out_map(found: Found) -> str:
    """Return the heat map of the held-out split of the training data."""
    measures = [
        measure
        for measure in (*RECALLS, *ACCURACIES)
        if any(group.values(measure) for group in found.values())
    ]
    rows = [
        (title(side), [_mean(group, measure) for measure in measures])
        for side, group in found.items()
    ]
    return (
        "<h3>Held-out pairs of the training data</h3>"
        + heat_table("Held-out results", "Method", rows, measures)
        + f'<p class="quiet">{_COLOUR}</p>'
    )


def _mean(group: Group, measure: str) -> Share:
    runs = [outcome for outcome in group.outcomes if measure in outcome.values]
    return _mean_of([Share(run.values[measure], run.chances[measure]) for run in runs])


def _suite_map(name: str, parts: Parts, found: Found) -> str:
    there = {cell for group in found.values() for o in group.outcomes for cell in o.suite}
    columns: list[tuple[str, tuple[str, ...]]] = []
    over = []
    for part, (kind, tasks) in parts.items():
        keys = [key for key in EVALUATIONS if EVALUATIONS[key] == kind]
        own = [(key, tasks) for key in keys if any((key, task) in there for task in tasks)]
        columns += own
        over += [(part, len(own))] if own else []
    if not columns:
        return ""
    rows = [
        (title(side), [_of_suite(group, key, tasks) for key, tasks in columns])
        for side, group in found.items()
    ]
    heads = [key for key, _ in columns]
    return f"<h3>{name}</h3>{heat_table(name, 'Method', rows, heads, over)}"


def _of_suite(group: Group, key: str, tasks: Iterable[str]) -> Share:
    """Return the mean of the headlines of some tasks on a data set, over seeds."""
    shares = [
        headline(outcome.suite[key, task])
        for outcome in group.outcomes
        for task in tasks
        if (key, task) in outcome.suite
    ]
    return _mean_of(shares)


def _mean_of(shares: Sequence[Share]) -> Share:
    if not shares:
        return MISSING
    return Share(fmean(s.value for s in shares), fmean(s.chance for s in shares))


def curves(given: Sequence[Answer], found: Found) -> str:
    """Draw recall and loss of the validation, for the sides of each question."""
    parts = [(answer.question.title, colours(answer)) for answer in given if answer.pairs]
    if not parts:
        parts = [("All", dict(zip(found, cycle(SERIES_COLOURS), strict=False)))]
    outcomes = [outcome for group in found.values() for outcome in group.outcomes]
    until = max((v.step for outcome in outcomes for v in outcome.validations), default=0)
    return "".join(
        f'<h3>{name}</h3><div class="charts">'
        + "".join(_curve(name, sides, found, until, *what) for what in _CURVES)
        + "</div>"
        for name, sides in parts
    )


def _curve(
    name: str,
    sides: Mapping[Side, str],
    found: Found,
    until: float,
    attribute: str,
    subject: str,
    form: Callable[[float], str],
) -> str:
    lines, legend = [], []
    for side, colour in sides.items():
        last = []
        for outcome in found[side].outcomes:
            steps = [v.step for v in outcome.validations]
            values = [getattr(v, attribute) for v in outcome.validations]
            lines.append(Line(title(side), colour, x=steps, y=values))
            last += [value for value in values[-1:] if not math.isnan(value)]
        mean = form(fmean(last)) if last else "\u2013"
        legend.append((Line(title(side), colour, width=3), mean))
    ends = ", ".join(f"{line.name} {mean}" for line, mean in legend)
    said = f"{name}. {subject}; last: {ends}."
    return chart(
        line_chart(lines, alt=said, until=until, percent=attribute == "recall"),
        legend=legend,
        caption=f"{subject}. A line per seed; in the legend, the mean of their last values.",
    )


def cost(found: Found, record: Record) -> str:
    """Return speed, memory and time of each method and initialisation."""
    rows = []
    for (method, init), group in found.items():
        runs = [outcome.run for outcome in group.outcomes]
        times = [
            [record.seconds[name] for name in names if name in record.seconds]
            for names in ([r.name for r in runs], [Evaluation(r).name for r in runs])
        ]
        seconds = [fmean(own) if own else math.nan for own in times]
        rows.append((method, STARTS[init], [group.pairs_per_s, group.memory_mb, *seconds]))
    heads = ["Pairs per second", "Peak memory, MB", "Seconds of training", "Seconds of evaluation"]
    kept = [i for i in range(len(heads)) if any(not math.isnan(of[i]) for _, _, of in rows)]
    most = {i: max(of[i] for _, _, of in rows if not math.isnan(of[i])) for i in kept}
    lines = [
        [words(method), words(start), *(_amount(of[i], most[i]) for i in kept)]
        for method, start, of in rows
    ]
    shared = f" Up to {record.jobs} runs shared the machine." if record.jobs > 1 else ""
    return table("Cost", ("Method", "From", *(heads[i] for i in kept)), lines) + (
        '<p class="quiet">Speed: median over the logged steps. Memory: the most in use. Seconds: '
        f"mean over seeds, of a whole run with its validation and test.{shared}</p>"
    )


def _amount(value: float, most: float) -> Cell:
    if math.isnan(value):
        return NONE
    return Cell(f'<span class="amount" style="--s:{value / most:.3f}">{count(value)}</span>', value)


def runs(record: Record, outcomes: Sequence[Outcome]) -> str:
    """Return the values of each run."""
    measures = [
        measure
        for measure in (*RECALLS, *ACCURACIES, *SUITE_MEANS)
        if any(measure in outcome.values for outcome in outcomes)
    ]
    heads = ("Run", "Method", "From", "Seed", *measures, "x chance", "Seconds")
    lines = []
    for outcome in outcomes:
        run = outcome.run
        lines.append(
            [
                Cell(f'<a href="runs/{run.name}/report.html">{run.name}</a>'),
                words(run.method),
                words(STARTS.get(run.init, "scratch, general domain")),
                Cell(str(run.seed), run.seed),
                *(_percent(outcome.values.get(measure)) for measure in measures),
                Cell(f"{outcome.times_chance:.1f}", outcome.times_chance),
                _seconds(record.seconds.get(run.name)),
            ]
        )
    return (
        "<p>Each run has a report of its own beside this page, and all of its metrics are in "
        f"results.csv.</p>{table('Runs', heads, lines)}"
    )


def _percent(value: float | None) -> Cell:
    return NONE if value is None else Cell(figure("accuracy", value), value)


def _seconds(value: float | None) -> Cell:
    return NONE if value is None else Cell(count(value), value)
