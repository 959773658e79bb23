"""PathVQA: questions about pathology images, as pickles of its authors or as Parquet."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medfast.data.containers import ImageRow, ParquetImages
from medfast.data.records import Record
from medfast.data.skipped import Skipped
from medfast.data.sources import About
from medfast.data.vqa import plain_pickle
from medfast.data.vqa.questions import (
    ImageFiles,
    Question,
    absent,
    as_text,
    checked,
    damaged,
    image_origin,
)
from medfast.errors import UsageError

ABOUT = About(
    key="path_vqa",
    title="PathVQA",
    licence="MIT for the questions; the images belong to the publishers of two textbooks and to a "
    "digital library",
    access="Get PathVQA from its authors, github.com/UCSD-AI4H/PathVQA, or its Parquet files, "
    "flaviagiammarino/path-vqa",
    citation="He et al. 2020, PathVQA: 30000+ Questions for Medical Visual Question Answering, "
    "arXiv 2003.10286",
)
CLOSED = "closed if the answer is yes or no"

_WORDS = {"train": "train", "validation": "val", "test": "test"}


def read(root: Path, split: str) -> Iterator[Question | Skipped]:
    """Yield the questions of one of upstream's splits; the kind of one is its first word.

    Args:
        root: Folder with the authors' pickles, `{train,val,test}_qa.pkl` or `..._vqa.pkl`, in `qas`
            or `qas/{train,val,test}`, or `{train,val,test}.pkl`, in itself, and images in
            `images/{train,val,test}` or `images`; or with Parquet files in itself or in `data`
            whose names begin with the split's, and which hold the images or name them.
        split: "train", "validation" or "test".

    Raises:
        UsageError: there is no file of questions, or it is damaged.
    """
    word = _WORDS[split]
    # The second form is the one that LXMERT's code reads, whose answers may be cut to a list.
    names = [
        f"{folder}{word}{form}.pkl"
        for form in ("_qa", "_vqa", "")
        for folder in ("qas/", f"qas/{word}/", "")
    ]
    patterns = [f"{word}*.parquet", f"data/{word}*.parquet"]
    # Upstream's archive unpacks into a folder of its own.
    for base in (root, root / "pvqa"):
        images = ImageFiles(
            [base / "images" / word, base / "images", base / word, base], suffix=".jpg"
        )
        table = next((base / name for name in names if (base / name).is_file()), None)
        if table is not None:
            yield from _read_pickle(table, word, images)
            return
        tables = [path for pattern in patterns for path in sorted(base.glob(pattern))]
        if tables:
            for path in tables:
                yield from _read_parquet(path, images)
            return
    raise absent(ABOUT, root, [*names, *patterns])


def _read_pickle(table: Path, word: str, images: ImageFiles) -> Iterator[Question | Skipped]:
    try:
        rows = plain_pickle.loads(table.read_bytes())
    except pickle.UnpicklingError as error:
        raise damaged(table, error) from None
    if not isinstance(rows, list):
        raise damaged(table, f"it must hold a list of questions, not {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        key = f"{word} {number}"
        if not isinstance(row, dict):
            yield Skipped(key, str(table), f"it must be a dict, not {type(row).__name__}")
            continue
        name = as_text(row.get("image", row.get("img_id")))
        question = row.get("question", row.get("sent"))
        answer = row.get("answer", _likeliest(row.get("label")))
        key = as_text(row.get("question_id")) or key
        yield checked(key, table, images.find(name), question, answer)


def _likeliest(label: Any) -> Any:
    """Return the answer with the most weight in a dict of them."""
    if not isinstance(label, dict):
        return None
    weights = {answer: w for answer, w in label.items() if isinstance(w, int | float)}
    return max(weights, key=weights.__getitem__, default=None)


def _read_parquet(table: Path, images: ImageFiles) -> Iterator[Question | Skipped]:
    try:
        from pyarrow import parquet
        from pyarrow.types import is_struct
    except ImportError:
        raise UsageError(
            f"{table} is a Parquet file, which needs pyarrow: pip install pyarrow."
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(table) as file:
            names = file.schema_arrow.names
            lacking = [name for name in ("image", "question", "answer") if name not in names]
            if lacking:
                raise damaged(table, f"it has no column {lacking[0]!r}")
            held = _Held(table) if is_struct(file.schema_arrow.field("image").type) else None
            columns = ["question", "answer", *([] if held else ["image"])]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    found = held.find(number) if held else images.find(as_text(row["image"]))
                    number += 1
                    key = f"{table.stem} {number}"
                    yield checked(key, table, found, row["question"], row["answer"])
    # pyarrow's own errors are OSErrors and ValueErrors too.
    except (OSError, ValueError) as error:
        raise damaged(table, error) from None


class _Held:
    """The images that a Parquet file holds, equal ones once: of each there are several rows."""

    def __init__(self, table: Path) -> None:
        self._table = table
        self._container = ParquetImages(table)
        self._records: dict[str, Record] = {}

    def find(self, row: int) -> tuple[Record, str] | str:
        """Return the image of a row and its origin, or why it cannot be read."""
        try:
            origin = image_origin(self._container.read(row))
        except OSError as error:
            return f"{self._table}: {error}"
        image = ImageRow(f"row {row}", self._table, "", container=self._container, row=row)
        return self._records.setdefault(origin, image), origin
