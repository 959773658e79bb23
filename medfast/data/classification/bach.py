"""BACH: breast histology in four classes, as the challenge's folders or as Parquet files."""

from __future__ import annotations

from pathlib import Path

from medfast.data.classification.labelled import (
    ClassificationSet,
    Items,
    class_folders,
    find,
    parquet_files,
    parquet_images,
)
from medfast.data.sources import About

_FOLDERS = {"Benign": 0, "InSitu": 1, "Invasive": 2, "Normal": 3}

SETS = {
    "bach": ClassificationSet(
        about=About(
            key="bach",
            title="BACH: breast cancer histology, microscopy images",
            licence="CC BY-NC-ND 4.0",
            access="Get ICIAR2018_BACH_Challenge.zip from Zenodo, record 3632035, or the Parquet "
            "files of 1aurent/BACH from Hugging Face",
            citation="Aresta et al. 2019, BACH: Grand challenge on breast cancer histology images, "
            "Medical Image Analysis",
        ),
        modality="histology",
        classes=(
            "benign tissue",
            "in-situ carcinoma",
            "invasive carcinoma",
            "normal breast tissue",
        ),
        folder="bach",
        test_share=0.25,
        notes=("the patients are not known, so that one may be on both sides of the split",),
    )
}


def read(key: str, root: Path, part: str) -> Items:
    """Yield all images.

    Args:
        key: "bach".
        root: Folder with the Parquet files of `1aurent/BACH`, or those in `data`, or with the
            folders `Benign`, `InSitu`, `Invasive` and `Normal`, or these in `Photos`, also within
            `ICIAR2018_BACH_Challenge`.
        part: "all".

    Raises:
        UsageError: neither is there, or a file cannot be read.
    """
    about = SETS[key].about
    files = parquet_files(root)
    if files:
        for file in files:
            yield from parquet_images(file, {"label": _FOLDERS}, lambda label: label)
        return
    inner = ("Photos", "ICIAR2018_BACH_Challenge", "ICIAR2018_BACH_Challenge/Photos")
    base = find(about, root, inner, ["Benign"]).parent
    yield from class_folders(about, root, base, _FOLDERS)
