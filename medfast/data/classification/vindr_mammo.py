"""VinDr-Mammo: mammograms with exactly one kind of finding, as DICOM files."""

from __future__ import annotations

import ast
from pathlib import Path

from medfast.data.classification.labelled import (
    ClassificationSet,
    Items,
    Labelled,
    absent,
    inside,
)
from medfast.data.records import Record
from medfast.data.skipped import Skipped
from medfast.data.sources import About
from medfast.data.tables import rows

_TABLE = "finding_annotations.csv"
_NO_FINDING = "No Finding"
_PARTS = {"train": "training", "test": "test"}
_CATEGORIES = (
    "Mass",
    "Suspicious Calcification",
    "Asymmetry",
    "Focal Asymmetry",
    "Global Asymmetry",
    "Architectural Distortion",
    "Skin Thickening",
    "Skin Retraction",
    "Nipple Retraction",
    "Suspicious Lymph Node",
)

SETS = {
    "vindr_mammo": ClassificationSet(
        about=About(
            key="vindr_mammo",
            title="VinDr-Mammo",
            licence="PhysioNet Restricted Health Data License 1.5.0, after signing its data use "
            "agreement",
            access="Get VinDr-Mammo 1.0.0 from physionet.org",
            citation="Nguyen et al. 2023, VinDr-Mammo: A large-scale benchmark dataset for "
            "computer-aided diagnosis in full-field digital mammography, Scientific Data",
            credentialed=True,
        ),
        modality="mammography",
        classes=tuple(category.lower() for category in _CATEGORIES),
        folder="vindr_mammo",
        upstream=("train", "test"),
        notes=("only images with exactly one category of finding",),
    )
}


def read(key: str, root: Path, part: str) -> Items:
    """Yield the images of one part of upstream that have findings of exactly one category.

    An image has a row for each of its findings. Images without a finding, or with findings of
    several categories, have no class and are passed over. The origin is the study, beyond which no
    patient is named.

    Args:
        key: "vindr_mammo".
        root: Folder with `finding_annotations.csv` and `images/{study_id}/{image_id}.dicom`.
        part: "train" or "test".

    Raises:
        UsageError: the table is not there, cannot be read or lacks a column.
    """
    table = root / _TABLE
    if not table.is_file():
        raise absent(SETS[key].about, root, [_TABLE])
    categories: dict[tuple[str, str], set[str]] = {}
    unusable: set[tuple[str, str]] = set()
    for row in rows(table, ("study_id", "image_id", "finding_categories", "split")):
        if isinstance(row, Skipped):
            yield row
            continue
        line, cells = row
        study, image = cells["study_id"], cells["image_id"]
        if cells["split"] not in _PARTS.values():
            reason = f"its split must be training or test; got {cells['split'] or 'nothing'}"
            yield Skipped(image or line, str(table), reason)
        elif cells["split"] != _PARTS[part]:
            continue
        elif study is None or image is None:
            yield Skipped(image or line, str(table), "it must have a study_id and an image_id")
        else:
            found = _categories(cells["finding_categories"])
            if found is None:
                reason = f"its finding_categories must be a list of {', '.join(_CATEGORIES)}"
                yield Skipped(image, str(table), f"{reason}; got {cells['finding_categories']}")
                # What else the image shows is not known.
                unusable.add((study, image))
            else:
                categories.setdefault((study, image), set()).update(found)
    for (study, image), found in categories.items():
        if (study, image) in unusable or len(found) != 1:
            continue
        path = inside(root / "images", f"{study}/{image}.dicom")
        if path is None:
            yield Skipped(image, str(table), "its study_id and image_id lead out of the folder")
        else:
            record = Record(image, path, "", origin=f"study vindr_mammo:{study}")
            yield Labelled(record, _CATEGORIES.index(found.pop()))


def _categories(cell: str | None) -> set[str] | None:
    """Return the categories in a cell, which is a list as Python writes it; None if it is not."""
    try:
        names = set(ast.literal_eval(cell or ""))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    names.discard(_NO_FINDING)
    return names if names <= set(_CATEGORIES) else None
