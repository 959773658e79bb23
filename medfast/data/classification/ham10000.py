"""HAM10000: dermatoscopic images of pigmented lesions in seven classes."""

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

_TABLE = "HAM10000_metadata.csv"
_FOLDERS = ("HAM10000_images_part_1", "HAM10000_images_part_2", "images", "")
_CODES = {"nv": 0, "mel": 1, "bkl": 2, "bcc": 3, "akiec": 4, "vasc": 5, "df": 6}

SETS = {
    "ham10000": ClassificationSet(
        about=About(
            key="ham10000",
            title="HAM10000: Human Against Machine with 10000 training images",
            licence="CC BY-NC 4.0",
            access="Get HAM10000_metadata.csv and both archives of images from Harvard Dataverse, "
            "doi 10.7910/DVN/DBW86T",
            citation="Tschandl et al. 2018, The HAM10000 dataset, a large collection of "
            "multi-source dermatoscopic images of common pigmented skin lesions, Scientific Data",
        ),
        modality="dermatoscopy",
        classes=(
            "melanocytic nevi",
            "melanoma",
            "benign keratosis-like lesions",
            "basal cell carcinoma",
            "actinic keratoses and intraepithelial carcinoma",
            "vascular lesions",
            "dermatofibroma",
        ),
        folder="ham10000",
        overlaps=("dermamnist",),
        notes=("dermamnist is this set, resized and divided otherwise",),
    )
}


def read(key: str, root: Path, part: str) -> Items:
    """Yield all images; the origin is the lesion.

    Args:
        key: "ham10000".
        root: Folder with `HAM10000_metadata.csv`; the images `{image_id}.jpg` lie in it, in
            `HAM10000_images_part_1` and `HAM10000_images_part_2`, or in `images`.
        part: "all".

    Raises:
        UsageError: the table is not there, cannot be read or lacks a column.
    """
    table = root / _TABLE
    if not table.is_file():
        raise absent(SETS[key].about, root, [_TABLE])
    images = image_index((root / name for name in _FOLDERS), ".jpg")
    for row in rows(table, ("lesion_id", "image_id", "dx")):
        if isinstance(row, Skipped):
            yield row
            continue
        line, cells = row
        name, lesion, code = cells["image_id"], cells["lesion_id"], cells["dx"]
        path = inside(root, f"{name}.jpg")
        if name is None or lesion is None:
            yield Skipped(name or line, str(table), "it must have an image_id and a lesion_id")
        elif code not in _CODES:
            yield Skipped(name, str(table), not_a_class(code, _CODES))
        elif path is None:
            yield Skipped(name, str(table), "its image_id leads out of the folder")
        else:
            record = Record(name, images.get(name, path), "", origin=f"lesion ham10000:{lesion}")
            yield Labelled(record, _CODES[code])
