"""The phantom as a classification set: its pictures in the layout of any of them.

A class is a finding of one kind, size and count, or none, so that every label can be seen. That the
classes bear the names of diseases means nothing here.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medfast.data.classification import CLASSIFICATION, EXTRA, facts
from medfast.data.phantom.cases import SIDES, Finding, Sample
from medfast.data.phantom.domains import DOMAINS
from medfast.data.phantom.layouts import LAYOUTS
from medfast.data.phantom.medical.cases import FINDINGS, MedicalCase
from medfast.errors import UsageError, unknown_name

# The layouts of the sets that have several; the first is the default.
VARIANTS: dict[str, tuple[str, ...]] = {
    "bach": ("folders", "parquet"),
    "lc25000_lung": ("folders", "parquet"),
    "lc25000_colon": ("folders", "parquet"),
    "ham10000": ("parts", "flat"),
    "pad_ufes_20": ("images", "parts", "dataset"),
}
_MEDMNIST = ("224", "28")

FEWEST_PER_CLASS = 10
_VIEWS = 2
# Begins every key, so that no picture is one of those for pretraining.
_SALT = 2

# What stands in for each modality: a modality and an organ of the phantom.
_LOOKS = {
    "histology": ("histology", "colon"),
    "dermatoscopy": ("histology", "skin"),
    "skin photograph": ("histology", "skin"),
    "mammography": ("mr", "breast"),
    "oct": ("ultrasound", "thyroid"),
    "chest radiograph": ("radiograph", "chest"),
    "fundus": ("histology", "breast"),
    "breast ultrasound": ("ultrasound", "uterus"),
    "blood smear": ("histology", "skin"),
    "kidney cells": ("ultrasound", "kidney"),
    "axial abdominal ct": ("ct", "abdomen"),
    "coronal abdominal ct": ("ct", "chest"),
    "sagittal abdominal ct": ("ct", "brain"),
}
# What the classes of a set show, in their order. Neighbours differ in the kind of the finding.
_SHOWN = [
    None,
    *(
        (kind, size, count)
        for count in ("one", "three")
        for size in ("large", "small")
        for kind in FINDINGS
    ),
]
# The part of upstream that each patient of a class is in, by turns.
_TURNS = ("train", "test", "train", "validation", "train")


@dataclass(frozen=True)
class Drawn:
    """A picture of a classification set.

    Attributes:
        image: What it shows.
        label: Index of its class.
        part: Part of upstream, or "all".
        patient: Number of its patient, who has two pictures, both of one class.
        number: Its own, from 0 on.
        sample: What it was drawn from.
    """

    image: Image.Image
    label: int
    part: str
    patient: int
    number: int
    sample: Sample[MedicalCase]


def write_classification(
    out: Path, key: str, *, variant: str = "", per_class: int = 20, seed: int = 0
) -> Path:
    """Write pictures into `out` as the classification set `key` and return `out`.

    Every patient, lesion or slide has two pictures. Where upstream fixes splits, a fifth of the
    patients of each class is for test, and for validation where it has that. In multi-label sets
    each picture has one label. Pictures and labels depend on the arguments alone.

    Args:
        out: The folder; may hold other sets, as those of LC25000 and of MedMNIST share one.
        key: A key of `CLASSIFICATION` or `EXTRA`.
        variant: Which layout, of `VARIANTS`, or for the MedMNIST sets "224" or "28", their size;
            "" for the first.
        per_class: Pictures of each class, an even number of at least 10.
        seed: Any number that is not negative.

    Raises:
        UsageError: an argument is out of range.
    """
    of = facts(key)
    writer = _WRITERS.get(key, _medmnist)
    known = _MEDMNIST if writer is _medmnist else VARIANTS.get(key, ("",))
    variant = variant or known[0]
    if variant not in known:
        raise UsageError(unknown_name(f"phantom: layout of {key}", variant, known))
    if per_class < FEWEST_PER_CLASS or per_class % _VIEWS:
        raise UsageError(
            f"phantom: per_class must be even and at least {FEWEST_PER_CLASS}; got {per_class}."
        )
    if seed < 0:
        raise UsageError(f"phantom: seed must not be negative; got {seed}. Give 0 or more.")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    parts = of.upstream or ("all",)
    writer(out, key, variant, list(_draw(key, parts, per_class, seed)))
    return out


def _draw(key: str, parts: Sequence[str], per_class: int, seed: int) -> Iterator[Drawn]:
    of = facts(key)
    modality, organ = _LOOKS[of.modality]
    render = DOMAINS["medical"].render
    place = [*CLASSIFICATION, *EXTRA].index(key)
    number = 0
    for label in range(len(of.classes)):
        shown = _SHOWN[label]
        for turn in range(per_class // _VIEWS):
            patient = number // _VIEWS
            part = _TURNS[turn % len(_TURNS)]
            part = part if part in parts else parts[0]
            draw = (_SALT, seed, place, label, turn)
            side = SIDES[int(np.random.default_rng(draw).integers(len(SIDES)))]
            finding = None if shown is None else Finding(shown[0], side, *shown[1:])
            case = MedicalCase(modality, finding, organ)
            for view in range(_VIEWS):
                study = f"S{100 * place + 1:05d}{patient:05d}"
                sample = Sample(f"{key}_{number:05d}", part, study, case, (*draw, view))
                yield Drawn(render(sample), label, part, patient, number, sample)
                number += 1


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def _jpeg(drawn: Drawn, path: Path) -> None:
    _save(drawn.image, path, quality=90)


def _csv(path: Path, header: str, rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header.split(","))
        writer.writerows(rows)


def _bach(out: Path, key: str, variant: str, drawn: Sequence[Drawn]) -> None:
    names = ("Benign", "InSitu", "Invasive", "Normal")
    if variant == "parquet":
        labels = {"label": (names, [own.label for own in drawn])}
        _parquet(out / "data" / "train-00000-of-00001.parquet", drawn, "TIFF", labels)
        return
    for own in drawn:
        name = names[own.label]
        _save(own.image.convert("RGB"), out / "Photos" / name / f"p{own.number:04d}.tif")


def _lc25000(out: Path, key: str, variant: str, drawn: Sequence[Drawn]) -> None:
    organ = key.removeprefix("lc25000_")
    if variant == "parquet":
        kinds = ("benign", "adenocarcinomas", "squamous carcinomas")
        organs = ("lung", "colon")
        at = organs.index(organ)
        labels = {
            "organ": (organs, [at] * len(drawn)),
            "label": (kinds, [own.label for own in drawn]),
        }
        _parquet(out / "data" / f"{organ}-00000-of-00001.parquet", drawn, "JPEG", labels)
        return
    for own in drawn:
        name = f"{organ}_{('n', 'aca', 'scc')[own.label]}"
        _jpeg(own, out / f"{organ}_image_sets" / name / f"{name}{own.number}.jpeg")


def _parquet(
    path: Path,
    drawn: Sequence[Drawn],
    kind: str,
    labels: Mapping[str, tuple[Sequence[str], list[int]]],
) -> None:
    """Write a Parquet file as Hugging Face does, with the names of the classes in its metadata."""
    import io

    import pyarrow
    from pyarrow import parquet

    encoded = []
    for own in drawn:
        file = io.BytesIO()
        own.image.convert("RGB").save(file, kind)
        encoded.append({"bytes": file.getvalue(), "path": f"{own.sample.id}.{kind.lower()}"})
    features: dict[str, Any] = {
        column: {"names": list(names), "_type": "ClassLabel"}
        for column, (names, _) in labels.items()
    }
    features["image"] = {"_type": "Image"}
    table = pyarrow.table({"image": encoded} | {name: own for name, (_, own) in labels.items()})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several groups of rows, as in real files.
    parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=30)


def _nct_crc(out: Path, key: str, variant: str, drawn: Sequence[Drawn]) -> None:
    folders = {"train": "NCT-CRC-HE-100K", "test": "CRC-VAL-HE-7K"}
    names = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
    for own in drawn:
        name = names[own.label]
        path = out / folders[own.part] / name / f"{name}-PHANTOM{own.number:05d}.tif"
        _save(own.image.convert("RGB"), path)


def _ham10000(out: Path, key: str, variant: str, drawn: Sequence[Drawn]) -> None:
    codes = ("nv", "mel", "bkl", "bcc", "akiec", "vasc", "df")
    rows = []
    for own in drawn:
        name = f"ISIC_9{own.number:06d}"
        part = f"HAM10000_images_part_{1 + own.number % 2}" if variant == "parts" else "."
        _jpeg(own, out / part / f"{name}.jpg")
        rows.append((f"HAM_{own.patient:07d}", name, codes[own.label], "histo"))
    _csv(out / "HAM10000_metadata.csv", "lesion_id,image_id,dx,dx_type", rows)


def _pad_ufes_20(out: Path, key: str, variant: str, drawn: Sequence[Drawn]) -> None:
    codes = ("BCC", "MEL", "SCC", "ACK", "NEV", "SEK")
    rows = []
    for own in drawn:
        name = f"PAT_{own.patient}_{own.patient}_{own.number}.png"
        part = f"imgs_part_{1 + own.number % 3}"
        folder = {"images": "images", "parts": part, "dataset": "Dataset"}[variant]
        _save(own.image, out / folder / name)
        rows.append((f"PAT_{own.patient}", own.patient, codes[own.label], name))
    _csv(out / "metadata.csv", "patient_id,lesion_id,diagnostic,img_id", rows)


def _pcam(out: Path, key: str, variant: str, drawn: Sequence[Drawn]) -> None:
    import h5py

    for part, name in {"train": "train", "validation": "valid", "test": "test"}.items():
        images, labels = _arrays(drawn, part, 96, "RGB")
        stem = out / f"camelyonpatch_level_2_split_{name}"
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file.create_dataset("x", data=images, chunks=(1, 96, 96, 3), compression="gzip")
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file.create_dataset("y", data=labels.reshape(-1, 1, 1, 1))


def _sicap(out: Path, key: str, variant: str, drawn: Sequence[Drawn]) -> None:
    import openpyxl

    folder = out / "partition" / "Test"
    folder.mkdir(parents=True, exist_ok=True)
    for part, name in {"train": "Train", "test": "Test"}.items():
        book = openpyxl.Workbook()
        book.active.append(["image_name", "NC", "G3", "G4", "G5", "G4C"])
        for own in drawn:
            if own.part == part:
                image = f"99B{own.patient:07d}_Block_Region_0_0_{own.number}_xini_0_yini_0.jpg"
                _jpeg(own, out / "images" / image)
                book.active.append([image, *(int(own.label == grade) for grade in range(4)), 0])
        book.save(folder / f"{name}.xlsx")


def _vindr_mammo(out: Path, key: str, variant: str, drawn: Sequence[Drawn]) -> None:
    names = [name.title() for name in facts(key).classes]
    save = LAYOUTS["mimic_cxr_dicom"].save
    findings, breasts = [], []
    for own in drawn:
        study, image = f"phantom{own.patient:05d}", f"phantom{own.number:05d}"
        path = out / "images" / study / f"{image}.dicom"
        path.parent.mkdir(parents=True, exist_ok=True)
        save(own.image, path, own.sample)
        split = "test" if own.part == "test" else "training"
        findings.append((study, image, [names[own.label]], split))
        breasts.append((study, image, "BI-RADS 3", split))
    header = "study_id,image_id,finding_categories,split"
    _csv(out / "finding_annotations.csv", header, findings)
    header = "study_id,image_id,breast_birads,split"
    _csv(out / "breast-level_annotations.csv", header, breasts)


def _medmnist(out: Path, key: str, variant: str, drawn: Sequence[Drawn]) -> None:
    of = facts(key)
    colours = of.modality in ("histology", "dermatoscopy", "fundus", "blood smear")
    arrays: dict[str, Any] = {}
    for part, name in {"train": "train", "validation": "val", "test": "test"}.items():
        images, labels = _arrays(drawn, part, int(variant), "RGB" if colours else "L")
        arrays[f"{name}_images"] = images
        arrays[f"{name}_labels"] = (
            np.eye(len(of.classes), dtype=np.uint8)[labels] if of.multi_label else labels[:, None]
        )
    np.savez_compressed(out / f"{key}{'_224' if variant == '224' else ''}.npz", **arrays)


def _arrays(
    drawn: Sequence[Drawn], part: str, size: int, mode: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pictures of a part, uint8 [N, H, W] or [N, H, W, 3], and their labels [N]."""
    own = [one for one in drawn if one.part == part]
    resized = [one.image.convert(mode).resize((size, size)) for one in own]
    return np.stack([np.asarray(image) for image in resized]), np.array(
        [one.label for one in own], np.uint8
    )


_WRITERS: dict[str, Callable[[Path, str, str, Sequence[Drawn]], None]] = {
    "bach": _bach,
    "lc25000_lung": _lc25000,
    "lc25000_colon": _lc25000,
    "nct_crc": _nct_crc,
    "ham10000": _ham10000,
    "pad_ufes_20": _pad_ufes_20,
    "pcam": _pcam,
    "sicap": _sicap,
    "vindr_mammo": _vindr_mammo,
}
