"""Answers in words to numbers: when two are the same, and how many are right. No model."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from medfast.evals.bootstrap import bootstrap_ci

_UNDER_TEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NUMBERS = {word: str(number) for number, word in enumerate((*_UNDER_TEN, "ten"))}
_ARTICLES = frozenset({"a", "an", "the"})
# Of whole answers: "y" within a longer one may be a name.
_YES_NO = {
    **dict.fromkeys(("y", "yeah", "yep", "true"), "yes"),
    **dict.fromkeys(("n", "nope", "false"), "no"),
}

_ACCENTS = re.compile("[\u0300-\u036f]")
_APOSTROPHES = re.compile("['`\u2018\u2019]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# The sign and the point of a number, and what compares or counts, are more than punctuation.
_MARKS = re.compile(
    r"(?P<number>(?<![\w.])-(?=\.?\d)|(?<![^\W\d])\.(?=\d)|%)|(?P<word>[<>+])|[^\w\s]|_"
)


def normalise_answer(text: str) -> str:
    """Return an answer in the form in which answers are compared.

    Two answers are the same if their forms are. A form is in lower case, in plain characters
    without accents, with single spaces; "%", "<", ">", "+" and the sign and point of a number are
    its only marks; small numbers are digits; "x-ray" is "x ray", "5cm" is "5 cm"; articles are
    left out, but for a last word ("hepatitis A"); "y" and "true" are "yes", "n" and "false" are
    "no". Plurals stay: "lungs" may be right where "lung" is wrong.
    """
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    text = _APOSTROPHES.sub("", unicodedata.normalize("NFC", _ACCENTS.sub("", text)))
    text = _MARKS.sub(_kept, _THOUSANDS.sub("", text))
    text = re.sub(r"\s+%", "%", text)
    text = re.sub(r"(?<=\d)(?=[mc]m\b)", " ", text)
    words = re.sub(r"\bxray", "x ray", text).split()
    words = [w for i, w in enumerate(words, 1) if w not in _ARTICLES or i == len(words)]
    answer = " ".join(_NUMBERS.get(word, word) for word in words)
    return _YES_NO.get(answer, answer)


def _kept(mark: re.Match[str]) -> str:
    return mark["number"] or f" {mark['word'] or ''} "


def candidate_answers(answers: Sequence[str]) -> list[str]:
    """Return the distinct normalised answers, the most frequent first, then by the alphabet."""
    counts = Counter(filter(None, map(normalise_answer, answers)))
    return sorted(counts, key=lambda answer: (-counts[answer], answer))


def majority_answers(
    kinds: Sequence[str], answers: Sequence[str], asked: Sequence[str]
) -> list[str]:
    """Return the most frequent training answer of the kind of each question that is asked.

    That is the "per Q-type prior" of Antol 2015 (arXiv 1505.00468). Of equally frequent answers it
    is the one that is more frequent among all; a kind without a training answer takes the most
    frequent of all.

    Args:
        kinds: Of the training questions.
        answers: Theirs.
        asked: Kind of each question to answer.
    """
    order = candidate_answers(answers)
    of_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, answer in zip(kinds, map(normalise_answer, answers), strict=True):
        if answer:
            of_kind[kind][answer] += 1
    # The first of the greatest, in the order of all.
    best = {kind: max(order, key=counts.__getitem__) for kind, counts in of_kind.items()}
    return [best.get(kind, order[0]) for kind in asked]


def exact(predicted: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Return 1 where a prediction is the answer, once both are normalised, else 0, [N].

    An answer of which nothing is left is never right.
    """
    pairs = zip(map(normalise_answer, predicted), map(normalise_answer, answers), strict=True)
    return np.array([float(p == a != "") for p, a in pairs])


def score(
    correct: np.ndarray, answer_types: Sequence[str], images: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Return the accuracy of all, closed and open questions, with n and interval of each.

    Args:
        correct: 1 for each right answer, else 0, [N].
        answer_types: "closed" or "open", N.
        images: What tells the image of each question, N: an interval is drawn by images.
        seed: Of the bootstrap.

    Returns:
        `n_by`, `metrics` and `ci95` by "accuracy", "accuracy_closed" and "accuracy_open"; the last
        two leave out a type of which there is no question.
    """
    types, groups = np.asarray(answer_types), np.asarray(images)
    rows = {
        "accuracy": np.ones(len(correct), dtype=bool),
        "accuracy_closed": types == "closed",
        "accuracy_open": types == "open",
    }
    asked = {name: own for name, own in rows.items() if own.any()}
    return {
        "n_by": {name: int(own.sum()) for name, own in rows.items()},
        "metrics": {name: float(correct[own].mean()) for name, own in asked.items()},
        "ci95": {
            name: bootstrap_ci(correct[own], groups[own], seed=seed) for name, own in asked.items()
        },
    }
