"""The layouts in which the phantom can be written: its files, and what their readers make of it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from medfast.data import quilt
from medfast.data.phantom.cases import SPLITS, Sample

if TYPE_CHECKING:
    from pydicom.uid import UID

Caption = Callable[[Sample], str]

# Stored values of black, and of each of the 255 steps from there to white.
_BLACK, _STEP = 256, 12


def _save_jpeg(image: Image.Image, path: Path, sample: Sample) -> None:
    image.save(path, quality=90)


@dataclass(frozen=True)
class Layout:
    """How the phantom lies on disk, and what the reader of the layout makes of it.

    Attributes:
        source: Key of the reader.
        image: Path of a sample's image below the root.
        texts: Path below the root and content of every text file, given the samples' captions.
        table: File to give to the reader, where it takes one instead of the root.
        key: Key of a sample.
        split: Its split.
        study: Its study.
        worded: The sample whose caption it has.
        save: Writes its image.
        package: What `save` needs beyond Pillow.
        domain: The only domain that it can hold, if not any.
    """

    source: str
    image: Callable[[Sample], str]
    texts: Callable[[Sequence[Sample], Caption], Iterator[tuple[str, str]]]
    table: str = ""
    key: Callable[[Sample], str] = lambda sample: sample.id
    split: Callable[[Sample], str] = lambda sample: sample.split
    study: Callable[[Sample], str] = lambda sample: sample.study
    worded: Callable[[Sample], Sample] = lambda sample: sample
    save: Callable[[Image.Image, Path, Sample], None] = _save_jpeg
    package: str = ""
    domain: str = ""


def _roco_image(sample: Sample) -> str:
    return f"{sample.split}/radiology/images/{sample.id}.jpg"


def _roco_texts(samples: Sequence[Sample], caption: Caption) -> Iterator[tuple[str, str]]:
    for split, own in _by_split(samples):
        captions = "".join(f"{s.id}\t {caption(s)}\n" for s in own)
        links = "".join(f"{s.id}\tmedfast phantom {s.study}\t{s.id}.jpg\n" for s in own)
        yield f"{split}/radiology/captions.txt", captions
        yield f"{split}/radiology/dlinks.txt", links


def _kaggle_texts(samples: Sequence[Sample], caption: Caption) -> Iterator[tuple[str, str]]:
    words = {"train": "train", "validation": "val", "test": "test"}
    for split, own in _by_split(samples):
        table = _csv("id,name,caption", ((s.id, _figure(s), caption(s)) for s in own))
        yield f"{split}/radiology/{words[split]}data.csv", table


def _roco_json_texts(samples: Sequence[Sample], caption: Caption) -> Iterator[tuple[str, str]]:
    for split, own in _by_split(samples):
        rows = ({"caption": caption(s), "image_path": _roco_image(s)} for s in own)
        yield f"radiology{split}_dataset.json", _json_lines(rows)


def _pmc_oa_texts(samples: Sequence[Sample], caption: Caption) -> Iterator[tuple[str, str]]:
    words = {"train": "train", "validation": "valid", "test": "test"}
    for split, own in _by_split(samples):
        rows = ({"image": _figure(s), "caption": caption(s)} for s in own)
        yield f"{words[split]}.jsonl", _json_lines(rows)


def _mimic_texts(samples: Sequence[Sample], caption: Caption) -> Iterator[tuple[str, str]]:
    words = {"train": "train", "validation": "validate", "test": "test"}
    rows = ((_dicom_id(s), _mimic_study(s)[1:], _patient(s), words[s.split]) for s in samples)
    yield "mimic-cxr-2.0.0-split.csv", _csv("dicom_id,study_id,subject_id,split", rows)
    for sample in {s.study: s for s in samples}.values():
        yield f"{_mimic_folder(sample)}.txt", _report(sample, caption)


def _quilt_texts(samples: Sequence[Sample], caption: Caption) -> Iterator[tuple[str, str]]:
    header = (
        "split,subset,caption,image_path,pathology,magnification,height,width,"
        "noisy_text,corrected_text,med_umls_ids,roi_text"
    )
    rows = (
        ("val" if s.split == "test" else "train", "quilt", caption(s), _frame(s), *[""] * 8)
        for s in samples
    )
    yield "quilt_1M_lookup.csv", _csv(header, rows)


def _table_texts(samples: Sequence[Sample], caption: Caption) -> Iterator[tuple[str, str]]:
    rows = (
        (f"images/{s.id}.jpg", caption(s), s.split, s.study, f"phantom:{s.study}") for s in samples
    )
    yield "pairs.csv", _csv("filepath,title,split,study,patient", rows)


def _folder_texts(samples: Sequence[Sample], caption: Caption) -> Iterator[tuple[str, str]]:
    for sample in samples:
        yield f"{sample.split}/{sample.id}.txt", f"{caption(sample)}\n"


def _by_split(samples: Sequence[Sample]) -> Iterator[tuple[str, list[Sample]]]:
    for split in SPLITS:
        yield split, [sample for sample in samples if sample.split == split]


def _csv(header: str, rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header.split(","))
    writer.writerows(rows)
    return text.getvalue()


def _json_lines(rows: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _number(sample: Sample) -> int:
    return int(sample.study.removeprefix("S"))


def _figure(sample: Sample) -> str:
    # The ids of real articles never start with a zero.
    return f"PMC0{_number(sample):06d}_{sample.id}.jpg"


def _frame(sample: Sample) -> str:
    # The id of a video on YouTube has as many characters.
    return f"phantom{_number(sample):04d}"[-11:] + f"_image_{_dicom_id(sample)}.jpg"


def _dicom_id(sample: Sample) -> str:
    digits = hashlib.blake2b(sample.id.encode(), digest_size=20).hexdigest()
    return "-".join(digits[start : start + 8] for start in range(0, len(digits), 8))


def _patient(sample: Sample) -> str:
    return str(10_000_000 + _number(sample))


def _mimic_study(sample: Sample) -> str:
    return f"s{50_000_000 + _number(sample)}"


def _mimic_folder(sample: Sample) -> str:
    patient = _patient(sample)
    return f"files/p{patient[:2]}/p{patient}/{_mimic_study(sample)}"


def _first_view(sample: Sample) -> Sample:
    """Return the sample with the wording of its study's first view: a study has one report."""
    return replace(sample, key=(*sample.key[:-1], 0))


def _report(sample: Sample, caption: Caption) -> str:
    first, dot, rest = caption(_first_view(sample)).partition(". ")
    names = sample.case.names()
    sections = {
        "EXAMINATION": f"{names['modality']} ({names['organ']})".upper(),
        "FINDINGS": f"{first}." if dot else "",
        "IMPRESSION": rest if dot else first,
    }
    body = "".join(f" {name}:  {text}\n \n" for name, text in sections.items() if text)
    return f"{'FINAL REPORT':>45}\n{body}"


def _save_dicom(image: Image.Image, path: Path, sample: Sample) -> None:
    """Write the picture, in grey, as a digital radiograph of 12 bits that needs its window."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

    grey = np.asarray(image.convert("L"))
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = _uid(f"image {sample.key}")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    # Otherwise it would name the version of pydicom.
    meta.ImplementationClassUID = _uid("medfast phantom")
    meta.ImplementationVersionName = "MEDFAST PHANTOM"
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = _uid(f"study {sample.key[:-1]}")
    dataset.SeriesInstanceUID = _uid(f"series {sample.key}")
    dataset.StudyID = _mimic_study(sample)[1:]
    dataset.PatientID = _patient(sample)
    dataset.PatientName = ""
    dataset.Modality = "DX"
    dataset.Rows, dataset.Columns = grey.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    # The window from black to white, as PS3.3 C.11.2.1.2.1 counts.
    dataset.WindowCenter = _BLACK + 255 * _STEP / 2 + 0.5
    dataset.WindowWidth = 255 * _STEP + 1
    dataset.PixelData = (_BLACK + _STEP * grey.astype("<u2")).tobytes()
    dataset.save_as(path, enforce_file_format=True)


def _uid(name: str) -> UID:
    from pydicom.uid import UID

    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return UID(f"2.25.{uuid.UUID(bytes=digest).int}")


_ROCO = Layout("roco", _roco_image, _roco_texts)
_MIMIC_CXR = Layout(
    "mimic_cxr",
    image=lambda s: f"{_mimic_folder(s)}/{_dicom_id(s)}.jpg",
    texts=_mimic_texts,
    key=_dicom_id,
    study=_mimic_study,
    worded=_first_view,
    domain="medical",
)

LAYOUTS: dict[str, Layout] = {
    "roco": _ROCO,
    "roco_kaggle": replace(
        _ROCO, image=lambda s: f"{s.split}/radiology/images/{_figure(s)}", texts=_kaggle_texts
    ),
    "roco_json": replace(_ROCO, texts=_roco_json_texts, key=_roco_image),
    "pmc_oa": Layout(
        "pmc_oa", image=lambda s: f"images/{_figure(s)}", texts=_pmc_oa_texts, key=_figure
    ),
    "mimic_cxr": _MIMIC_CXR,
    "mimic_cxr_dicom": replace(
        _MIMIC_CXR,
        image=lambda s: f"{_mimic_folder(s)}/{_dicom_id(s)}.dcm",
        save=_save_dicom,
        package="pydicom",
    ),
    "quilt": Layout(
        "quilt",
        image=lambda s: f"quilt_1m/{_frame(s)}",
        texts=_quilt_texts,
        key=_frame,
        split=lambda s: quilt.split_of("val" if s.split == "test" else "train", _frame(s)),
        study=_frame,
    ),
    "csv": Layout(
        "csv",
        image=lambda s: f"images/{s.id}.jpg",
        texts=_table_texts,
        table="pairs.csv",
        key=lambda s: f"images/{s.id}.jpg",
    ),
    "folder": Layout(
        "folder",
        image=lambda s: f"{s.split}/{s.id}.jpg",
        texts=_folder_texts,
        key=lambda s: f"{s.split}/{s.id}.jpg",
    ),
}
