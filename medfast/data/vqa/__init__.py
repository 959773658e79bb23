"""Visual question answering: readers, one file per data set, and what all of them share."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from medfast.data.skipped import Skipped
from medfast.data.sources import AbsentError
from medfast.data.vqa.questions import Question
from medfast.errors import UsageError, unknown_name

# Key on the command line -> module with `ABOUT`, `CLOSED` (its rule of what is closed) and
# `read(root, split)`. Names only: no imports.
VQA = {
    "vqa_rad": "medfast.data.vqa.vqa_rad",
    "path_vqa": "medfast.data.vqa.path_vqa",
}


@dataclass(frozen=True)
class QuestionSplits:
    """The questions of a data set; validation shares no image with train.

    Attributes:
        train: Those to train on.
        validation: Those to choose by.
        test: Upstream's test split.
        skipped: Rows that could not be used, of all splits.
        notes: What every result on the data set has to say of its splits, as sentences.
    """

    train: list[Question]
    validation: list[Question]
    test: list[Question]
    skipped: list[Skipped]
    notes: list[str]


def read_questions(key: str, root: Path) -> QuestionSplits:
    """Return the questions of the data set `key` that lies in `root`.

    Validation questions about an image that the training split holds too are left out; test
    questions are upstream's, and a note says how many are about an image that training has seen.

    Args:
        key: A key of `VQA`.
        root: Its folder.

    Raises:
        AbsentError: a file is missing, or a split has no question.
        UsageError: the key is not known, or a file is damaged, or no question of a split can be
            used.
    """
    if key not in VQA:
        raise UsageError(unknown_name("VQA data set", key, VQA))
    module = importlib.import_module(VQA[key])
    skipped: list[Skipped] = []
    splits: dict[str, list[Question]] = {"train": [], "validation": [], "test": []}
    try:
        for split, questions in splits.items():
            for item in module.read(root, split):
                if isinstance(item, Question):
                    questions.append(item)
                else:
                    skipped.append(item)
    except OSError as error:
        raise UsageError(
            f"{key}: {error.filename or root} cannot be read ({error.strerror or error}); check "
            "the name and the permissions."
        ) from None
    train, validation, test = splits.values()
    trained = {question.origin for question in train}
    chosen = [question for question in validation if question.origin not in trained]
    for split, own in (("train", train), ("validation", chosen), ("test", test)):
        if not own and skipped:
            raise UsageError(
                f"{key}: {root} holds no {split} question. The first of {len(skipped)} bad rows: "
                f"{skipped[0].reason}. Get a whole copy of it."
            )
        if not own:
            raise AbsentError(f"{key}: {root} holds no {split} question. Get a whole copy of it.")
    notes = [module.CLOSED + "."]
    if skipped:
        notes.append(f"{len(skipped)} rows of the data set could not be used.")
    if len(chosen) < len(validation):
        notes.append(
            f"{len(validation) - len(chosen)} of {len(validation)} validation questions are left "
            "out: their images are training images too."
        )
    seen = trained | {question.origin for question in chosen}
    shared = sum(question.origin in seen for question in test)
    if shared:
        notes.append(
            f"{shared} of {len(test)} test questions are about images of the training or "
            "validation split, as upstream has it."
        )
    return QuestionSplits(train, chosen, test, skipped, notes)
