"""The record: one image and its caption, as every reader returns it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfast.errors import UsageError


@dataclass(frozen=True, slots=True)
class Record:
    """One pair on disk.

    Attributes:
        key: Name of the sample, unique within its split.
        image: Path of the image file, which may be missing or damaged.
        caption: Caption with white space squeezed; may be empty.
        study: Images and captions of one study belong together; None stands for itself alone.
    """

    key: str
    image: Path
    caption: str
    study: str | None = None


def clean_caption(text: str) -> str:
    """Return `text` with every run of white space, line breaks included, as one space."""
    return " ".join(text.split())


def group_ids(records: Iterable[Record]) -> list[int]:
    """Return one integer per record, equal where the study is equal."""
    ids: dict[str, int] = {}
    return [
        ids.setdefault(f"study {r.study}" if r.study is not None else f"key {r.key}", len(ids))
        for r in records
    ]


def read_sidecar(root: Path) -> dict[str, Any] | None:
    """Return what `phantom.json` in `root` says of labels, studies and questions, if it is there.

    Raises:
        UsageError: the file is damaged.
    """
    path = root / "phantom.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{path} is damaged ({error}): delete {root} and write it again."
        ) from None
