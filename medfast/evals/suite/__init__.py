"""The suite `medical25`: which data sets, what is asked of each, and where each lies."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from medfast.data import SOURCES
from medfast.data.classification import CLASSIFICATION, facts
from medfast.data.vqa import VQA

if TYPE_CHECKING:
    from medfast.data.sources import About

Kind = Literal["classification", "retrieval", "vqa"]

SUITES = ("medical25",)
EVALUATIONS: dict[str, Kind] = {
    **dict.fromkeys(CLASSIFICATION, "classification"),
    **dict.fromkeys(("roco", "mimic_cxr", "quilt"), "retrieval"),
    **dict.fromkeys(VQA, "vqa"),
}
"""Key of each of the 25 data sets -> its kind: 20 are for classification, 3 for retrieval and 2 for
visual question answering. With the tasks of `TASKS` they are 20 x 2 + 3 x 2 + 2 x 1 = 48 cells."""

TASKS: dict[Kind, tuple[str, ...]] = {
    "classification": ("zero_shot", "linear_probe"),
    "retrieval": ("image_to_text", "text_to_image"),
    "vqa": ("vqa",),
}
"""What is asked of a data set of each kind; each gives one result."""


def cells(keys: Iterable[str] = EVALUATIONS) -> list[tuple[str, str]]:
    """Return data set and task of each result of some data sets, in the order of the table."""
    chosen = set(keys)
    return [(key, task) for key in EVALUATIONS if key in chosen for task in TASKS[EVALUATIONS[key]]]


def about(key: str) -> About:
    """Return the facts of a data set: title, licence and how to get it."""
    if EVALUATIONS[key] == "classification":
        return facts(key).about
    return importlib.import_module({**SOURCES, **VQA}[key]).ABOUT


def folder(key: str) -> str:
    """Return the name of a data set's folder where all lie in one folder."""
    return facts(key).folder if EVALUATIONS[key] == "classification" else key


def overlaps(key: str) -> tuple[str, ...]:
    """Return the other data sets of the suite that have the same images."""
    if EVALUATIONS[key] != "classification":
        return ()
    return tuple(other for other in facts(key).overlaps if other in EVALUATIONS)
