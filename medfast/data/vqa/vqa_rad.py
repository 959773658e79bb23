"""VQA-RAD: clinicians' questions about radiology images, as published or in MEVF's form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medfast.data.skipped import Skipped
from medfast.data.sources import About, hash_split
from medfast.data.tables import lines
from medfast.data.vqa.questions import (
    ImageFiles,
    Question,
    absent,
    as_text,
    checked,
    damaged,
)

ABOUT = About(
    key="vqa_rad",
    title="VQA-RAD",
    licence="CC0 1.0",
    access="Get VQA-RAD from its authors' page, osf.io/89kps",
    citation="Lau et al. 2018, A dataset of clinically generated visual questions and answers "
    "about radiology images, Scientific Data 5, 180251",
)
CLOSED = "closed as upstream's answer_type says: yes, no or a choice that the question names"

_PUBLISHED = "VQA_RAD Dataset Public.json"
_MEVF = {"train": "trainset.json", "validation": "trainset.json", "test": "testset.json"}
_FOLDERS = ("VQA_RAD Image Folder", "images", "")
# Of the images of upstream's training split.
VALIDATION_SHARE = 0.1


def read(root: Path, split: str) -> Iterator[Question | Skipped]:
    """Yield the questions of one split.

    Upstream has no validation split: it is 10 % of the images of its training split, by a hash of
    their content. The test split is upstream's, which shares images with its training split. The
    kind of a question is its answer type with its question type, as upstream tells both.

    Args:
        root: Folder with `VQA_RAD Dataset Public.json`, or with MEVF's `trainset.json` and
            `testset.json`; the images lie in `VQA_RAD Image Folder`, in `images` or in `root`.
        split: "train", "validation" or "test".

    Raises:
        UsageError: there is no file of questions, or it is damaged.
    """
    names = (_PUBLISHED, _MEVF[split])
    table = next((root / name for name in names if (root / name).is_file()), None)
    if table is None:
        raise absent(ABOUT, root, names)
    images = ImageFiles([root / name for name in _FOLDERS])
    for number, row in enumerate(_rows(table), 1):
        key = f"row {number}"
        if not isinstance(row, dict):
            if split == "train":
                yield Skipped(key, str(table), "it must be a JSON object")
            continue
        tested = (
            as_text(row.get("phrase_type")).startswith("test_")
            if table.name == _PUBLISHED
            else split == "test"
        )
        if tested != (split == "test"):
            continue
        item = _question(as_text(row.get("qid")) or key, row, table, images)
        own = "test" if tested else _split_of(item)
        if own == split:
            yield item


def _rows(table: Path) -> list[Any]:
    try:
        rows = json.loads("".join(lines(table)))
    except (ValueError, RecursionError) as error:
        raise damaged(table, error) from None
    if not isinstance(rows, list):
        raise damaged(table, "it must be a JSON array of questions")
    return rows


def _question(key: str, row: dict[str, Any], table: Path, images: ImageFiles) -> Question | Skipped:
    answer_type = as_text(row.get("answer_type")).lower()
    if answer_type not in ("open", "closed"):
        reason = f"its answer_type must be OPEN or CLOSED; got {answer_type or 'nothing'}"
        return Skipped(key, str(table), reason)
    return checked(
        key,
        table,
        images.find(as_text(row.get("image_name"))),
        row.get("question"),
        row.get("answer"),
        answer_type,
        kind=f"{answer_type} {as_text(row.get('question_type')).lower()}",
    )


def _split_of(item: Question | Skipped) -> str:
    """Return the split of a row of upstream's training split; "train" if it cannot be told."""
    return hash_split(item.origin, VALIDATION_SHARE) if isinstance(item, Question) else "train"
