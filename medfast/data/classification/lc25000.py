"""LC25000: histology of lung and colon, as folders or as Parquet files; two sets in one."""

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

_FOLDERS = {
    "lc25000_lung": {"lung_n": 0, "lung_aca": 1, "lung_scc": 2},
    "lc25000_colon": {"colon_n": 0, "colon_aca": 1},
}
_ORGANS = {"lung": 0, "colon": 1}
_LABELS = {"benign": 0, "adenocarcinomas": 1, "squamous carcinomas": 2}
_NOTE = (
    "its 25,000 images are augmentations of 1,250 originals, so that a linear probe is tested on "
    "images that it was trained on, turned and flipped, and intervals, which are over images, are "
    "too narrow"
)


def _set(key: str, organ: str, classes: tuple[str, ...]) -> ClassificationSet:
    return ClassificationSet(
        about=About(
            key=key,
            title=f"LC25000, {organ}",
            licence="no conditions are named; Hugging Face lists The Unlicense",
            access="Get lung_colon_image_set from github.com/tampapath/lung_colon_image_set, or "
            "the Parquet files of 1aurent/LC25000 from Hugging Face",
            citation="Borkowski et al. 2019, Lung and Colon Cancer Histopathological Image Dataset "
            "(LC25000), arXiv 1912.12142",
        ),
        modality="histology",
        classes=classes,
        folder="lc25000",
        zero_shot="all",
        notes=(_NOTE,),
    )


SETS = {
    "lc25000_lung": _set(
        "lc25000_lung",
        "lung",
        ("benign lung", "lung adenocarcinoma", "lung squamous cell carcinoma"),
    ),
    "lc25000_colon": _set(
        "lc25000_colon", "colon", ("benign colonic tissue", "colon adenocarcinoma")
    ),
}


def read(key: str, root: Path, part: str) -> Items:
    """Yield all images of one organ.

    Args:
        key: "lc25000_lung" or "lc25000_colon".
        root: Folder with the Parquet files of `1aurent/LC25000`, or those in `data`, or with
            `lung_image_sets` and `colon_image_sets`, also within `lung_colon_image_set`.
        part: "all".

    Raises:
        UsageError: neither is there, or a file cannot be read.
    """
    about = SETS[key].about
    organ = key.removeprefix("lc25000_")
    files = parquet_files(root)
    if files:

        def label(kind: int, own: int) -> int | None:
            return kind if own == _ORGANS[organ] else None

        for file in files:
            yield from parquet_images(file, {"label": _LABELS, "organ": _ORGANS}, label)
        return
    base = find(about, root, ["lung_colon_image_set"], [f"{organ}_image_sets"])
    yield from class_folders(about, root, base, _FOLDERS[key])
