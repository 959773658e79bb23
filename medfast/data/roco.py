"""ROCO: radiology figures of PubMed Central with their captions, in the three layouts in use.

Access: open, through the download scripts of its authors; a copy with the images also circulates
on Kaggle. Licence: that of each article (a Creative Commons licence, mostly CC BY). Citation:
Pelka et al. 2018, "Radiology Objects in COntext (ROCO): A Multimodal Image Dataset".
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from medfast.data.records import Record, clean_caption, read_sidecar
from medfast.errors import UsageError

# The word for a split in the names of Kaggle's CSV files.
_SHORT = {"train": "train", "validation": "val", "test": "test"}
_ID = re.compile(r"[A-Za-z]+_\d+")


def read(root: Path, split: str) -> list[Record]:
    """Return the radiology pairs of one split.

    Args:
        root: Folder that holds ROCO in one of its layouts: the original one
            (`train/radiology/captions.txt`), Kaggle's (`train/radiology/traindata.csv`) or JSON
            lines (`radiologytrain_dataset.json`).
        split: "train", "validation" or "test".

    Raises:
        UsageError: no layout is recognised, a column is missing, or there is no pair.
    """
    if not root.is_dir():
        raise UsageError(
            f"roco: there is no folder {root}. Get ROCO (github.com/razorx89/roco-dataset), put it "
            "there and name it as --train-data roco:FOLDER."
        )
    folder = root / split / "radiology"
    layouts: dict[Path, Callable[[Path], Iterator[Record]]] = {
        folder / "captions.txt": _read_captions,
        folder / f"{_SHORT[split]}data.csv": _read_csv,
        folder / f"radiology{_SHORT[split]}data.csv": _read_csv,
        root / f"radiology{split}_dataset.json": _read_json_lines,
    }
    found = next((path for path in layouts if path.is_file()), None)
    if found is None:
        names = ", ".join(str(path.relative_to(root)) for path in layouts)
        raise UsageError(f"roco: {root} holds no {split} captions; looked for {names}.")
    try:
        records = list(layouts[found](found))
    except UnicodeDecodeError as error:
        raise UsageError(f"roco: {found} is not UTF-8 text ({error}).") from None
    if not records:
        raise UsageError(f"roco: {found} holds no pair.")
    return _with_studies(root, records)


def _read_captions(path: Path) -> Iterator[Record]:
    """Yield the pairs of `ID<TAB> caption` lines; a line without an id continues its caption."""
    key = ""
    lines: list[str] = []
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            head, tab, caption = line.partition("\t")
            if tab and _ID.fullmatch(head.lstrip("\ufeff")):
                if key:
                    yield _record(key, path.parent / "images" / f"{key}.jpg", " ".join(lines))
                key, lines = head.lstrip("\ufeff"), [caption]
            elif key:
                lines.append(line)
            elif line.strip():
                raise UsageError(
                    f"roco: line {number} of {path} must be an id, a tab and a caption; "
                    f"got {line.strip()[:60]!r}."
                )
    if key:
        yield _record(key, path.parent / "images" / f"{key}.jpg", " ".join(lines))


def _read_csv(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or []
        for column in ("id", "name", "caption"):
            if column not in columns:
                raise UsageError(
                    f"roco: {path} has no column {column!r}; its columns are: "
                    f"{', '.join(columns) or 'none'}."
                )
        for row in rows:
            name = row["name"] or ""
            yield _record(row["id"] or name, path.parent / "images" / name, row["caption"] or "")


def _read_json_lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                image, caption = row["image_path"], row["caption"]
            except (ValueError, KeyError, TypeError):
                raise UsageError(
                    f"roco: line {number} of {path} must be a JSON object with 'image_path' and "
                    f"'caption'; got {line.strip()[:60]!r}."
                ) from None
            yield _record(str(image), path.parent / str(image), str(caption or ""))


def _record(key: str, image: Path, caption: str) -> Record:
    return Record(key=key, image=image, caption=clean_caption(caption))


def _with_studies(root: Path, records: list[Record]) -> list[Record]:
    """Add the study ids that a sidecar gives; ROCO itself has none."""
    sidecar = read_sidecar(root)
    if sidecar is None:
        return records
    samples = sidecar["samples"]
    return [replace(r, study=samples[r.key]["study"]) if r.key in samples else r for r in records]
