"""MedMNIST+: small images of many modalities, an NPZ file for each set."""

from __future__ import annotations

from pathlib import Path

from medfast.data.classification.labelled import ClassificationSet, Items, Labelled, Note, find
from medfast.data.containers import ImageRow, NpzImages, npz_array
from medfast.data.skipped import Skipped
from medfast.data.sources import About
from medfast.errors import UsageError

_PARTS = {"train": "train", "validation": "val", "test": "test"}
# Of the sizes in which the sets come, the largest first; the smallest has none in its name.
_SIZES = ("_224", "_128", "_64", "")
_ORGANS = (
    "bladder",
    "femur-left",
    "femur-right",
    "heart",
    "kidney-left",
    "kidney-right",
    "liver",
    "lung-left",
    "lung-right",
    "pancreas",
    "spleen",
)


def _set(
    key: str,
    modality: str,
    classes: tuple[str, ...],
    overlap: str = "",
    graded: bool = False,
    multi_label: bool = False,
    licence: str = "CC BY 4.0",
) -> ClassificationSet:
    return ClassificationSet(
        about=About(
            key=key,
            title=f"MedMNIST+, {key}",
            licence=licence,
            access=f"Get {key}_224.npz from Zenodo, record 10519652",
            citation="Yang et al. 2023, MedMNIST v2: A large-scale lightweight benchmark for 2D "
            "and 3D biomedical image classification, Scientific Data",
        ),
        modality=modality,
        classes=classes,
        folder="medmnist",
        upstream=("train", "validation", "test"),
        graded=graded,
        multi_label=multi_label,
        overlaps=(overlap,) if overlap else (),
        notes=(f"its images are from {overlap}",) if overlap else (),
    )


_LISTED = (
    _set(
        "pathmnist",
        "histology",
        (
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
        overlap="nct_crc",
    ),
    _set(
        "dermamnist",
        "dermatoscopy",
        (
            "actinic keratoses and intraepithelial carcinoma",
            "basal cell carcinoma",
            "benign keratosis-like lesions",
            "dermatofibroma",
            "melanoma",
            "melanocytic nevi",
            "vascular lesions",
        ),
        overlap="ham10000",
        licence="CC BY-NC 4.0",
    ),
    _set(
        "octmnist",
        "oct",
        ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    ),
    _set("pneumoniamnist", "chest radiograph", ("normal", "pneumonia")),
    # Upstream names its grades of diabetic retinopathy 0 to 4.
    _set(
        "retinamnist",
        "fundus",
        tuple(f"diabetic retinopathy grade {grade}" for grade in range(5)),
        graded=True,
    ),
    _set("breastmnist", "breast ultrasound", ("malignant", "normal, benign")),
    _set(
        "bloodmnist",
        "blood smear",
        (
            "basophil",
            "eosinophil",
            "erythroblast",
            "immature granulocytes (myelocytes, metamyelocytes and promyelocytes)",
            "lymphocyte",
            "monocyte",
            "neutrophil",
            "platelet",
        ),
    ),
    _set(
        "tissuemnist",
        "kidney cells",
        (
            "collecting duct, connecting tubule",
            "distal convoluted tubule",
            "glomerular endothelial cells",
            "interstitial endothelial cells",
            "leukocytes",
            "podocytes",
            "proximal tubule segments",
            "thick ascending limb",
        ),
    ),
    *(
        _set(f"organ{plane[0]}mnist", f"{plane} abdominal ct", _ORGANS)
        for plane in ("axial", "coronal", "sagittal")
    ),
    _set(
        "chestmnist",
        "chest radiograph",
        (
            "atelectasis",
            "cardiomegaly",
            "effusion",
            "infiltration",
            "mass",
            "nodule",
            "pneumonia",
            "pneumothorax",
            "consolidation",
            "edema",
            "emphysema",
            "fibrosis",
            "pleural",
            "hernia",
        ),
        multi_label=True,
    ),
)
SETS = {own.about.key: own for own in _LISTED}


def read(key: str, root: Path, part: str) -> Items:
    """Yield the images of one part of upstream, exactly as stored.

    Args:
        key: The name of the set.
        root: Folder with `{key}_224.npz`, or in its place one of the smaller sizes; the largest
            that is there is read.
        part: "train", "validation" or "test".

    Raises:
        UsageError: the file is not there, is damaged, or images and labels differ in length.
    """
    of = SETS[key]
    path = find(of.about, root, [], [f"{key}{size}.npz" for size in _SIZES])
    images = NpzImages(path, f"{_PARTS[part]}_images")
    labels = npz_array(path, f"{_PARTS[part]}_labels")
    count = len(of.classes)
    wanted = (len(images), count if of.multi_label else 1)
    labels = labels[:, None] if labels.ndim == 1 else labels
    if labels.shape != wanted:
        raise UsageError(
            f"{path} must have {_PARTS[part]}_labels {list(wanted)}; got {list(labels.shape)}. Get "
            "a whole copy of it."
        )
    height, width = images.shape[1:3]
    yield Note(f"images of {width} x {height} pixels")
    for row, label in enumerate(labels.tolist()):
        own = f"{_PARTS[part]}/{row}"
        record = ImageRow(own, path, "", container=images, row=row)
        if of.multi_label and set(label) <= {0, 1}:
            yield Labelled(record, tuple(map(int, label)))
        elif not of.multi_label and label[0] in range(count):
            yield Labelled(record, int(label[0]))
        else:
            known = "0s and 1s" if of.multi_label else f"one of 0 to {count - 1}"
            yield Skipped(own, str(path), f"its label must be {known}; got {label}")
