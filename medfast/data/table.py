"""Pairs of the user's own: a table of image paths and captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medfast.data.pairs import pairs
from medfast.data.records import Record, clean_caption
from medfast.data.skipped import Skipped
from medfast.data.sources import About, few_pairs, hash_split, missing
from medfast.data.tables import column_names, missing_column, rows
from medfast.errors import UsageError

ABOUT = About(
    key="csv",
    title="A table of image paths and captions",
    licence="whatever licence the images have",
    access="Write a .csv, .tsv, .jsonl or .parquet file of image paths and captions",
    citation="that of the images",
)


@dataclass(frozen=True)
class Columns:
    """How to find a table's images and captions.

    Attributes:
        image: Column of the image paths.
        caption: Column of the captions.
        separator: Between the cells of a line; None for a tab or a comma, as in the file.

    Raises:
        UsageError: a name is empty, or the separator is no single character that can be one.
    """

    image: str = "filepath"
    caption: str = "title"
    separator: str | None = None

    def __post_init__(self) -> None:
        for flag, name in (("--csv-img-key", self.image), ("--csv-caption-key", self.caption)):
            if not name:
                raise UsageError(f"{flag} must be the name of a column; got ''.")
        if self.separator is not None and (len(self.separator) != 1 or self.separator in '"\r\n'):
            raise UsageError(
                "--csv-separator must be a single character, and no quotation mark or line break; "
                f"got {self.separator!r}."
            )


DEFAULT = Columns()

# Where the default names are not there.
_USUAL = {
    DEFAULT.image: ("image_path", "image", "filename", "path"),
    DEFAULT.caption: ("caption", "text", "title"),
}
_MORE = ("split", "study", "group", "patient")
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


def read(root: Path, split: str, columns: Columns = DEFAULT) -> Iterator[Record | Skipped]:
    """Yield the pairs of one split.

    Three more columns are used where they are there: `split`, `study` (or `group`) and `patient`,
    whose ids are taken to mean the same in every table. Without a `split`, 5 % of the patients are
    for validation and 5 % for test, by a hash of their ids; without patients, of the studies, and
    without these, of the images. Where any row has a `split`, one without is a bad row.

    Args:
        root: The file; image paths are relative to its folder, or absolute.
        split: "train", "validation" or "test".
        columns: Names of the columns, and the separator. For the default names, also "image_path",
            "image", "filename" or "path" and "caption" or "text" are taken.

    Raises:
        UsageError: the file or a column is missing, or there is no pair.
    """
    if not root.exists():
        raise missing(ABOUT, root)
    if root.is_dir():
        raise UsageError(
            f"csv: {root} is a folder; name the table in it, as csv:{root / 'pairs.csv'}, or use "
            f"folder:{root}."
        )
    present = column_names(root, columns.separator)
    columns = Columns(
        _find(columns.image, present, root),
        _find(columns.caption, present, root),
        columns.separator,
    )
    has_split = "split" in present
    found = _read(root, split, columns, has_split)
    remedy = few_pairs(0.05, 0.05, "name the splits in a column 'split'")
    if has_split:
        remedy = f"Write {split!r} into the column 'split' of some rows."
    yield from pairs(found, f"csv: {root}", split, shared=root, remedy=remedy)


def _find(name: str, present: Sequence[str], path: Path) -> str:
    names = tuple(dict.fromkeys((name, *_USUAL.get(name, ()))))
    found = next((n for n in names if n in present), None)
    if found is None:
        raise missing_column(path, names, present)
    return found


def _read(path: Path, split: str, columns: Columns, has_split: bool) -> Iterator[Record | Skipped]:
    for row in rows(path, (columns.image, columns.caption), _MORE, columns.separator):
        if isinstance(row, Skipped):
            yield row
            continue
        line, cells = row
        image, patient = cells[columns.image], cells.get("patient")
        study = cells.get("study") or cells.get("group")
        if image is None:
            yield Skipped(line, str(path), f"its {columns.image} is empty")
            continue
        if has_split:
            named = (cells.get("split") or "").lower()
            if named not in _SPLITS:
                reason = f"its split must be one of {', '.join(_SPLITS)}; got {named or 'nothing'}"
                yield Skipped(line, str(path), reason)
                continue
            own = _SPLITS[named]
        else:
            own = hash_split(patient or study or image, 0.05, 0.05)
        if own == split:
            yield Record(
                key=image,
                image=path.parent / image,
                caption=clean_caption(cells[columns.caption] or ""),
                study=study,
                origin=None if patient is None else f"patient {patient}",
            )
