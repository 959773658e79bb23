"""NCT-CRC-HE-100K and CRC-VAL-HE-7K: nine tissues of colorectal cancer."""

from __future__ import annotations

from pathlib import Path

from medfast.data.classification.labelled import ClassificationSet, Items, absent, class_folders
from medfast.data.sources import About

_FOLDERS = {
    name: index
    for index, name in enumerate(("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"))
}
_PARTS = {"train": "NCT-CRC-HE-100K", "test": "CRC-VAL-HE-7K"}

SETS = {
    "nct_crc": ClassificationSet(
        about=About(
            key="nct_crc",
            title="NCT-CRC-HE-100K with CRC-VAL-HE-7K",
            licence="CC BY 4.0",
            access="Get NCT-CRC-HE-100K.zip and CRC-VAL-HE-7K.zip from Zenodo, record 1214456",
            citation="Kather et al. 2019, Predicting survival from colorectal cancer histology "
            "slides using deep learning, PLOS Medicine",
        ),
        modality="histology",
        classes=(
            "adipose",
            "background",
            "debris",
            "lymphocytes",
            "mucus",
            "smooth muscle",
            "normal colon mucosa",
            "cancer-associated stroma",
            "colorectal adenocarcinoma epithelium",
        ),
        folder="nct_crc",
        upstream=("train", "test"),
        overlaps=("pathmnist",),
        notes=(
            "pathmnist is this set, resized",
            "the patients of the training images are not known, so that one may be in train and in "
            "validation; those of test are others",
        ),
    )
}


def read(key: str, root: Path, part: str) -> Items:
    """Yield the images of one part of upstream.

    Args:
        key: "nct_crc".
        root: Folder with `NCT-CRC-HE-100K` and `CRC-VAL-HE-7K`, a folder per class in each.
        part: "train" or "test".

    Raises:
        UsageError: a folder is not there.
    """
    base = root / _PARTS[part]
    if not base.is_dir():
        raise absent(SETS[key].about, root, [_PARTS[part]])
    yield from class_folders(SETS[key].about, root, base, _FOLDERS)
