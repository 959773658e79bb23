"""MIMIC-CXR: chest radiographs with the findings and impression of their reports."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from medfast.data.pairs import pairs
from medfast.data.records import Record, clean_caption
from medfast.data.skipped import Skipped
from medfast.data.sources import About, missing
from medfast.data.tables import Cells, rows

ABOUT = About(
    key="mimic_cxr",
    title="MIMIC-CXR 2.0.0 and 2.1.0, as JPEG (MIMIC-CXR-JPG) or DICOM",
    licence="PhysioNet Credentialed Health Data License 1.5.0, after training in human-subjects "
    "research",
    access="Get MIMIC-CXR-JPG or MIMIC-CXR from physionet.org, and the reports, "
    "mimic-cxr-reports.zip, and the splits, mimic-cxr-2.0.0-split.csv.gz",
    citation="Johnson et al. 2019, MIMIC-CXR, a de-identified publicly available database of chest "
    "radiographs with free-text reports, Scientific Data",
    credentialed=True,
)

_TABLES = ("mimic-cxr-2.0.0-split.csv.gz", "mimic-cxr-2.0.0-split.csv")
_SPLITS = {"train": "train", "validate": "validation", "test": "test"}
_REPORTS = (
    "files",
    "mimic-cxr-reports/files",
    "mimic-cxr-reports",
    "reports/files",
    "reports",
    "../mimic-cxr-reports/files",
)
_COLUMNS = ("dicom_id", "study_id", "subject_id", "split")
# As many rows tell which kind of images there is, and where the reports are.
_FIRST_ROWS = 200

_NAME = r"(?:FINDINGS?|IMPRESSIONS?|CONCLUSIONS?)"
_KEPT = rf"(?:FINAL |OVERALL )?{_NAME}(?:\s*(?:AND|&|/|,)\s*(?:{_NAME}|RECOMMENDATIONS?))?"
_LEFT_OUT = "|".join(
    (
        "(?:TYPE OF )?EXAM(?:INATION)?S?",
        "STUDY",
        "PROCEDURE",
        "VIEWS?",
        "(?:IMAGING )?TECHNIQUE",
        "(?:CLINICAL |PATIENT )?(?:INDICATIONS?|HISTORY|INFORMATION)",
        "(?:INDICATION|REASON)S? FOR (?:THE |THIS )?(?:EXAM(?:INATION)?|STUDY)",
        r"(?:COMPARISONS?|REFERENCE)(?: (?:STUDY|STUDIES|EXAM(?:INATION)?S?))?(?:\(S\))?",
        r"RECOMMENDATIONS?(?:\(S\))?",
        r"NOTIFICATIONS?(?:\(S\))?",
        "ADDENDUM",
        "WET READ",
        r"(?:PROVISIONAL|PRELIMINARY) (?:FINDINGS(?:,? IMPRESSION)?|IMPRESSION)(?: \(PFI\))?",
    )
)
# What starts a section, each by a group of its name.
_HEADER = re.compile(
    "|".join(
        (
            # A known name at the start of a line with a colon, or in capitals and alone.
            rf"^[ \t]*(?P<start>(?i:{_KEPT}|{_LEFT_OUT}))[ \t]*:",
            rf"^[ \t]*(?P<alone>{_KEPT}|{_LEFT_OUT})[ \t]*$",
            # An unknown name in capitals at the start of a line: "AP CHEST, 5:13 A.M.:".
            r"^[ \t]*(?P<unknown>[A-Z][A-Z0-9 ,.()/&_:-]{2,70}?):(?=\s|$)",
            # A known name in capitals within a line.
            rf"\b(?P<inside>{_KEPT}|{_LEFT_OUT})[ \t]*:",
            r"^[ \t]*(?P<ruler>[_=-]{10,})[ \t]*$",
        )
    ),
    re.MULTILINE,
)
_FINAL_REPORT = re.compile(r"^[ \t]*FINAL REPORT\b", re.MULTILINE)
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_BLANK = re.compile("_{2,}")


def read(root: Path, split: str) -> Iterator[Record | Skipped]:
    """Yield the pairs of one split: every image with the caption of its study.

    The splits are upstream's, "validate" being "validation". The images of one study share its
    caption; the origin is the patient. An image whose study has no report is skipped.

    Args:
        root: Folder with `mimic-cxr-2.0.0-split.csv.gz` (or unpacked) and the images
            `files/p10/p10000032/s50414267/ID.jpg`, or `.dcm`. The reports,
            `p10/p10000032/s50414267.txt`, lie in `files`, `mimic-cxr-reports/files`,
            `mimic-cxr-reports`, `reports/files`, `reports`, or in `mimic-cxr-reports/files` beside
            `root`.
        split: "train", "validation" or "test".

    Raises:
        UsageError: there is no table of splits, no report, a column is missing, or there is no
            pair.
    """
    table = next((root / name for name in _TABLES if (root / name).is_file()), None)
    if table is None:
        raise missing(ABOUT, root, _TABLES)
    found = _read(root, table, split)
    yield from pairs(found, f"mimic_cxr: {table}", split, shared=table)


def caption_of_report(text: str) -> str:
    """Return the findings and the impression of a report, in the order in which they stand.

    A section starts with its name, and a colon or the end of the line; FINDINGS, IMPRESSION and
    CONCLUSION, also joined by AND, count, every time they come. Without them it is the longest of
    the sections that tell neither of the order (indication, technique, comparison, ...) nor of who
    was told what, or if there is no other, of those. Such a section ends with its first paragraph,
    as what follows often is a report without a name. What stands above the line FINAL REPORT, wet
    reads and addenda, is left out. Whatever was removed to hide who the patient is stays as "___",
    as a word that is not known: without it sentences would say something else.

    Args:
        text: The report.

    Returns:
        The caption with white space squeezed; empty if the report is.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    report = _FINAL_REPORT.split(text)[-1]
    sections = list(_sections(report)) or list(_sections(_FINAL_REPORT.sub("", text)))
    found = {
        kind: dict.fromkeys(body for k, body in sections if k == kind)
        for kind in ("kept", "other", "left out")
    }
    if found["kept"]:
        return " ".join(found["kept"])
    return max(found["other"] or found["left out"], key=len, default="")


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """Yield "kept", "left out" or "other" and the text of each section that is not empty."""
    kind, start = "other", 0
    parts: list[tuple[str, str]] = []
    for header in _HEADER.finditer(text):
        # Findings may have headings of their own, such as "LUNGS:".
        if header.lastgroup == "unknown" and kind == "kept":
            continue
        parts.append((kind, text[start : header.start()]))
        kind, start = _kind(header), header.end()
    parts.append((kind, text[start:]))
    for kind, body in parts:
        first, rest = body, ""
        if kind == "left out":
            first, rest = (*_PARAGRAPH.split(body.lstrip(), maxsplit=1), "")[:2]
        for part_kind, part in ((kind, first), ("other", rest)):
            part = _BLANK.sub("___", clean_caption(part))
            if part:
                yield part_kind, part


def _kind(header: re.Match[str]) -> str:
    if header.lastgroup in ("unknown", "ruler"):
        return "other"
    name = header[header.lastgroup or 0]
    return "kept" if re.fullmatch(_KEPT, name, re.IGNORECASE) else "left out"


def _read(root: Path, table: Path, split: str) -> Iterator[Record | Skipped]:
    first = [
        row[1] for row in islice(rows(table, _COLUMNS), _FIRST_ROWS) if not isinstance(row, Skipped)
    ]
    studies = [study for study in map(_study, first) if study is not None]
    reports = _reports(root, studies)
    suffix = _suffix(root, first)
    captions: dict[str, str | None] = {}
    for row in rows(table, _COLUMNS):
        if isinstance(row, Skipped):
            yield row
            continue
        line, cells = row
        dicom, study = cells["dicom_id"], _study(cells)
        if dicom is None or study is None or cells["split"] not in _SPLITS:
            reason = "it must have a dicom_id, numbers as study_id and subject_id, and a split "
            yield Skipped(dicom or line, str(table), f"{reason}of {', '.join(_SPLITS)}")
            continue
        if _SPLITS[cells["split"]] != split:
            continue
        report = reports / f"{study}.txt"
        if study not in captions:
            captions[study] = _caption(report)
        caption = captions[study]
        if caption is None:
            yield Skipped(dicom, str(report), "the study has no report")
        else:
            yield Record(
                key=dicom,
                image=root / "files" / study / f"{dicom}{suffix}",
                caption=caption,
                study=f"s{cells['study_id']}",
                origin=f"patient mimic:{cells['subject_id']}",
            )


def _study(cells: Cells) -> str | None:
    """Return the folder of a row's study, such as "p10/p10000032/s50414267"."""
    subject, study = cells["subject_id"] or "", cells["study_id"] or ""
    if not (subject.isdecimal() and study.isdecimal()):
        return None
    return f"p{subject[:2]}/p{subject}/s{study}"


def _reports(root: Path, studies: list[str]) -> Path:
    """Return the folder that holds the reports."""
    for study in studies:
        for name in _REPORTS:
            if os.path.isfile(root / name / f"{study}.txt"):
                return root / name
    raise missing(
        ABOUT, root, [f"{name}/{study}.txt" for name in _REPORTS for study in studies[:1]]
    )


def _suffix(root: Path, rows: list[Cells]) -> str:
    """Return whether the images are JPEG or DICOM files, by the first of them that is there."""
    for cells in rows:
        for suffix in (".jpg", ".dcm"):
            if os.path.isfile(root / f"files/{_study(cells)}/{cells['dicom_id']}{suffix}"):
                return suffix
    return ".jpg"


def _caption(report: Path) -> str | None:
    # To open a named pipe would wait for ever.
    if not os.path.isfile(report):
        return None
    try:
        return caption_of_report(report.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
