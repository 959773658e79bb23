"""The three questions of a study, and what the runs answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medfast.study.plan import FAMILIES, UNLOCKED_GROUPS, Init
from medfast.study.results import MEASURES, Difference, Group, difference

Side = tuple[str, Init]

# What is compared: the mean R@1 of both directions, the accuracies, and means over the suite.
COMPARED = ("R@1", *MEASURES)
STARTS: dict[Init, str] = {
    "scratch": "scratch",
    "general": "general weights",
    "frozen": "general weights, partly frozen",
}
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


@dataclass(frozen=True)
class Answer:
    """What the runs say to a question.

    Attributes:
        question: The question.
        pairs: Those of its comparisons whose sides have been run.
        differences: Of each of these, the difference in every measure that both sides have.
    """

    question: Question
    pairs: Sequence[tuple[Side, Side]]
    differences: Sequence[Mapping[str, Difference]]

    @property
    def measures(self) -> list[str]:
        """The measures that one of the comparisons has, in the order of `COMPARED`."""
        return [m for m in COMPARED if any(m in of_pair for of_pair in self.differences)]

    @property
    def sentences(self) -> list[str]:
        """What the numbers of each comparison say, and nothing more."""
        return [
            _sentence(a, b, found)
            for (a, b), found in zip(self.pairs, self.differences, strict=True)
        ]


def answers(found: Mapping[Side, Group]) -> list[Answer]:
    """Return the answer to each question, given the runs of each method and initialisation."""
    given = []
    for question in QUESTIONS:
        pairs = [(a, b) for a, b in question.pairs if a in found and b in found]
        given.append(Answer(question, pairs, [_differences(found[a], found[b]) for a, b in pairs]))
    return given


def rule(given: Sequence[Answer]) -> str:
    """Say what the intervals are; nothing where there is none."""
    of_all = [d for answer in given for of_pair in answer.differences for d in of_pair.values()]
    intervals = sum(found.interval is not None for found in of_all)
    if not intervals:
        return ""
    return (
        f"The intervals are 95 % each, of Welch's t over seeds. Of {intervals}, "
        f"{intervals / 20:.1f} would leave out 0 on average if nothing made a difference. They "
        "hold what a seed changes: the first weights, the order of the data and their crops."
    )


def title(side: Side) -> str:
    """Return the name of a method and its initialisation."""
    return f"{side[0]} from {STARTS[side[1]]}"


def points(found: Difference) -> str:
    """Return a difference in points with its interval, or why there is none."""
    value = f"{100 * found.value:+.1f}"
    if found.interval is None:
        return f"{value} ({found.why_not})"
    low, high = found.interval
    return f"{value} ({100 * low:+.1f} to {100 * high:+.1f})"


def _differences(a: Group, b: Group) -> dict[str, Difference]:
    """Return the difference of two sides in every measure that both have."""
    values = {measure: (a.values(measure), b.values(measure)) for measure in COMPARED}
    return {measure: difference(*sides) for measure, sides in values.items() if all(sides)}


def _sentence(a: Side, b: Side, differences: Mapping[str, Difference]) -> str:
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
    return f"{title(a)} against {title(b)}: {'; '.join(parts)}."


def _amount(found: Difference) -> str:
    """Return the size of a difference, as a positive number of points with its interval."""
    assert found.interval is not None
    low, high = sorted(abs(100 * end) for end in found.interval)
    return f"{abs(100 * found.value):.1f} points ({low:.1f} to {high:.1f})"
