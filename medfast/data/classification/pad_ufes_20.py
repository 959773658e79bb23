"""PAD-UFES-20: smartphone photographs of skin lesions in six classes."""

from __future__ import annotations

from pathlib import Path

from medfast.data.classification.labelled import (
    ClassificationSet,
    Items,
    Labelled,
    absent,
    image_index,
    inside,
    not_a_class,
)
from medfast.data.records import Record
from medfast.data.skipped import Skipped
from medfast.data.sources import About
from medfast.data.tables import rows

_TABLE = "metadata.csv"
_PARTS = ("imgs_part_1", "imgs_part_2", "imgs_part_3")
_FOLDERS = (
    "images",
    *_PARTS,
    *(f"images/{part}" for part in _PARTS),
    # As one of its archives unpacks within a folder of its own name.
    *(f"{part}/{part}" for part in _PARTS),
    "Dataset",
)
_CODES = {"BCC": 0, "MEL": 1, "SCC": 2, "ACK": 3, "NEV": 4, "SEK": 5}

SETS = {
    "pad_ufes_20": ClassificationSet(
        about=About(
            key="pad_ufes_20",
            title="PAD-UFES-20",
            licence="CC BY 4.0",
            access="Get metadata.csv and the images from Mendeley Data, zr7vgbcyr2",
            citation="Pacheco et al. 2020, PAD-UFES-20: A skin lesion dataset composed of patient "
            "data and clinical images collected from smartphones, Data in Brief",
        ),
        modality="skin photograph",
        classes=(
            "basal cell carcinoma",
            "melanoma",
            "squamous cell carcinoma",
            "actinic keratosis",
            "nevus",
            "seborrheic keratosis",
        ),
        folder="pad_ufes_20",
    )
}


def read(key: str, root: Path, part: str) -> Items:
    """Yield all images; the origin is the patient.

    Args:
        key: "pad_ufes_20".
        root: Folder with `metadata.csv`; the images lie in `images`, `imgs_part_1` to
            `imgs_part_3`, these within `images`, or `Dataset`.
        part: "all".

    Raises:
        UsageError: the table is not there, cannot be read or lacks a column.
    """
    table = root / _TABLE
    if not table.is_file():
        raise absent(SETS[key].about, root, [_TABLE])
    images = image_index(root / name for name in _FOLDERS)
    for row in rows(table, ("img_id", "patient_id", "diagnostic")):
        if isinstance(row, Skipped):
            yield row
            continue
        line, cells = row
        name, patient, code = cells["img_id"], cells["patient_id"], cells["diagnostic"]
        if name is None or patient is None:
            yield Skipped(name or line, str(table), "it must have an img_id and a patient_id")
            continue
        path = inside(root / "images", name)
        if code not in _CODES:
            yield Skipped(name, str(table), not_a_class(code, _CODES))
        elif path is None:
            yield Skipped(name, str(table), "its img_id leads out of the folder")
        else:
            origin = f"patient pad_ufes_20:{patient}"
            yield Labelled(Record(name, images.get(name, path), "", origin=origin), _CODES[code])
