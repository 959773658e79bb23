"""SICAPv2: patches of prostate biopsies with Gleason patterns, listed in XLSX files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from medfast.data.classification.labelled import (
    ClassificationSet,
    Items,
    Labelled,
    find,
    inside,
)
from medfast.data.records import MOST_BYTES, Record
from medfast.data.skipped import Skipped
from medfast.data.sources import About
from medfast.data.tables import missing_column
from medfast.errors import UsageError

_TABLES = {"train": "partition/Test/Train.xlsx", "test": "partition/Test/Test.xlsx"}
_PATIENTS = "wsi_labels.xlsx"
_GRADES = ("NC", "G3", "G4", "G5")

SETS = {
    "sicap": ClassificationSet(
        about=About(
            key="sicap",
            title="SICAPv2",
            licence="the licence that its page at Mendeley Data names",
            access="Get SICAPv2.zip from Mendeley Data, 9xxm58dvs3",
            citation="Silva-Rodríguez et al. 2020, Going deeper through the Gleason scoring scale: "
            "An automatic end-to-end system for histology prostate grading and cribriform pattern "
            "detection, Computer Methods and Programs in Biomedicine",
        ),
        modality="histology",
        classes=(
            "benign glands",
            "atrophic dense glands",
            "cribriform ill-formed fused papillary patterns",
            "isolated nest cells without lumen roseting patterns",
        ),
        folder="sicap",
        upstream=("train", "test"),
        graded=True,
    )
}


def read(key: str, root: Path, part: str) -> Items:
    """Yield the images of one part of upstream.

    The label is the greatest of the columns NC, G3, G4 and G5. The origin is the patient, whom
    `wsi_labels.xlsx` names, or without it the slide, with which the name of the image starts.

    Args:
        key: "sicap".
        root: Folder with `partition/Test/{Train,Test}.xlsx` and `images`, also within `SICAPv2`.
        part: "train" or "test".

    Raises:
        UsageError: a table is not there, cannot be read or lacks a column, or openpyxl is not
            installed.
    """
    table = find(SETS[key].about, root, ["SICAPv2"], [_TABLES[part]])
    base = table.parents[2]
    patients = _patients(base / _PATIENTS)
    for row, cells in _rows(table, ("image_name", *_GRADES)):
        name, *grades = cells
        if not isinstance(name, str) or not name.strip():
            yield Skipped(row, str(table), "it has no image_name")
            continue
        name = name.strip()
        path = inside(base / "images", name)
        if path is None:
            yield Skipped(name, str(table), "its image_name leads out of the folder")
        elif not all(isinstance(grade, int | float) for grade in grades):
            yield Skipped(name, str(table), f"its {', '.join(_GRADES)} must be numbers")
        elif grades.count(max(grades)) > 1:
            # Among them the rows without any grade.
            yield Skipped(name, str(table), f"none of its {', '.join(_GRADES)} is the greatest")
        else:
            slide = PurePath(name).stem.partition("_Block")[0]
            patient = patients.get(slide)
            origin = f"slide sicap:{slide}" if patient is None else f"patient sicap:{patient}"
            yield Labelled(Record(name, path, "", origin=origin), grades.index(max(grades)))


def _patients(path: Path) -> dict[str, str]:
    """Return the patient of each slide, {} without the table."""
    if not path.is_file():
        return {}
    found = (cells for _, cells in _rows(path, ("slide_id", "patient_id")))
    return {str(slide): str(patient) for slide, patient in found if slide and patient is not None}


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the name of each row of the first sheet ("row 2") and its cells in some columns."""
    try:
        import openpyxl
    except ImportError:
        raise UsageError(
            f"{path} is an XLSX file, which needs openpyxl: pip install openpyxl."
        ) from None
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MOST_BYTES:
            raise ValueError(f"it unpacks to {size} bytes, more than {MOST_BYTES}")
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            sheet = book.worksheets[0].iter_rows(values_only=True)
            header = [str(cell).strip() for cell in next(sheet, ())]
            for column in columns:
                if column not in header:
                    raise missing_column(path, [column], header)
            places = [header.index(column) for column in columns]
            for number, cells in enumerate(sheet, 2):
                if any(cell is not None for cell in cells):
                    yield (
                        f"row {number}",
                        [cells[place] if place < len(cells) else None for place in places],
                    )
        finally:
            book.close()
    # What openpyxl raises for files that are damaged, or no workbooks.
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        EOFError,
        SyntaxError,
        zipfile.BadZipFile,
    ) as error:
        raise UsageError(f"{path} cannot be read ({error}); get a whole copy of it.") from None
