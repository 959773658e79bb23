"""PatchCamelyon: patches of lymph nodes with and without metastasis, as HDF5 files."""

from __future__ import annotations

from pathlib import Path

from medfast.data.classification.labelled import ClassificationSet, Items, Labelled, find
from medfast.data.containers import Hdf5Images, ImageRow, hdf5_array
from medfast.data.skipped import Skipped
from medfast.data.sources import About
from medfast.errors import UsageError

_PARTS = {"train": "train", "validation": "valid", "test": "test"}
_INNER = ("pcam", "pcamv1")

SETS = {
    "pcam": ClassificationSet(
        about=About(
            key="pcam",
            title="PatchCamelyon (PCam)",
            licence="CC0",
            access="Get the six .h5.gz files named camelyonpatch_level_2_split_* from Zenodo, "
            "record 2546921",
            citation="Veeling et al. 2018, Rotation Equivariant CNNs for Digital Pathology, MICCAI",
        ),
        modality="histology",
        classes=("lymph node", "lymph node containing metastatic tumor tissue"),
        folder="pcam",
        upstream=("train", "validation", "test"),
    )
}


def read(key: str, root: Path, part: str) -> Items:
    """Yield the images of one part of upstream.

    Args:
        key: "pcam".
        root: Folder with `camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5`, also within
            `pcam` or `pcamv1`.
        part: "train", "validation" or "test".

    Raises:
        UsageError: a file is not there, is damaged, or the two differ in length, or h5py is not
            installed.
    """
    about = SETS[key].about
    stem = f"camelyonpatch_level_2_split_{_PARTS[part]}"
    path, labels_path = (find(about, root, _INNER, [f"{stem}_{name}.h5"]) for name in "xy")
    images, labels = Hdf5Images(path, "x"), hdf5_array(labels_path, "y").reshape(-1)
    if len(images) != len(labels):
        raise UsageError(
            f"{path} must have as many images as {labels_path} has labels; got {len(images)} and "
            f"{len(labels)}. Get whole copies of both."
        )
    for row, label in enumerate(labels.tolist()):
        own = f"{_PARTS[part]}/{row}"
        if label in (0, 1):
            yield Labelled(ImageRow(own, path, "", container=images, row=row), int(label))
        else:
            yield Skipped(own, str(labels_path), f"its label must be 0 or 1; got {label}")
