"""Labelled images: what a data set says of its classes, what its reader finds, and one split."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple, overload

import numpy as np

from medfast.data.containers import (
    Container,
    ImageRow,
    ParquetImages,
    class_names,
)
from medfast.data.records import Record, Records
from medfast.data.shards import IMAGE_SUFFIXES
from medfast.data.skipped import Skipped
from medfast.data.sources import About, AbsentError
from medfast.data.tables import rows
from medfast.errors import UsageError

_COUNTED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")

# The part of a set that holds everything, where upstream fixes no split.
ALL = "all"


@dataclass(frozen=True)
class ClassificationSet:
    """Facts of a classification set.

    Attributes:
        about: Of the data set.
        modality: What its images are, a key of the prompts' templates.
        classes: Their names in plain English, in the order of their indices.
        folder: Name of its folder where all sets lie in one folder.
        upstream: The splits that upstream fixes; a missing "validation" is cut from "train", and
            without any all three are cut.
        test_share: Share of the images or patients in "test", where upstream fixes no split.
        zero_shot: The split for zero-shot figures: "test", or "all" where nothing is trained on it.
        graded: Whether the classes are grades, in order.
        multi_label: Whether an image may have any number of the classes.
        overlaps: Other sets with the same images.
        notes: What every figure must be read with.
    """

    about: About
    modality: str
    classes: tuple[str, ...]
    folder: str
    upstream: tuple[str, ...] = ()
    test_share: float = 0.2
    zero_shot: str = "test"
    graded: bool = False
    multi_label: bool = False
    overlaps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Labelled(NamedTuple):
    """An image that a reader has found: its record, still without a caption, and its label.

    The label is an index into the classes, or, for multi-label sets, a tuple with 0 or 1 for each.
    """

    record: Record
    label: int | tuple[int, ...]


class Note(NamedTuple):
    """Something a reader has found that every figure must be read with."""

    text: str


# What readers yield.
Items = Iterator[Labelled | Skipped | Note]


@dataclass
class Found:
    """What a reader has found.

    Attributes:
        samples: N images.
        parts: The part of upstream that each is from, or `ALL`.
        skipped: What could not be used, with its part.
        notes: What every figure must be read with.
    """

    samples: list[Labelled] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    skipped: list[tuple[str, Skipped]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class LabelledRecords(Records):
    """Records in one block of memory, those within containers included.

    Args:
        records: What to keep.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        kept = list(records)
        super().__init__(kept)
        self._containers: list[Container] = []
        places: dict[int, int] = {}
        # Of each record which container, -1 for a file of its own, and which row of it.
        self._which, self._row = array("q"), array("q")
        for record in kept:
            container = record.container if isinstance(record, ImageRow) else None
            if container is not None and id(container) not in places:
                places[id(container)] = len(self._containers)
                self._containers.append(container)
            self._which.append(-1 if container is None else places[id(container)])
            self._row.append(record.row if isinstance(record, ImageRow) else -1)

    @overload
    def __getitem__(self, at: int) -> Record: ...
    @overload
    def __getitem__(self, at: slice) -> list[Record]: ...
    def __getitem__(self, at: int | slice) -> Record | list[Record]:
        if isinstance(at, slice):
            return super().__getitem__(at)
        record = super().__getitem__(at)
        if self._which[at] < 0:
            return record
        return ImageRow(
            record.key,
            record.image,
            record.caption,
            record.study,
            record.origin,
            container=self._containers[self._which[at]],
            row=self._row[at],
        )


@dataclass(frozen=True)
class LabelledSplit:
    """One split of a classification set.

    Attributes:
        samples: N images as records, for the same loaders as pairs. Their captions name their
            classes; `study` and `origin` are both the patient, lesion or slide, where known.
        labels: Class indices int64 [N], or for multi-label sets 0 and 1, int64 [N, K].
        classes: Names of the K classes.
        skipped: Rows that could not be used and images that were left out, and why.
        notes: What every figure must be read with.
    """

    samples: LabelledRecords
    labels: np.ndarray
    classes: tuple[str, ...]
    skipped: list[Skipped]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.samples)


def labelled_split(
    what: str,
    split: str,
    found: Found,
    divided: Sequence[str | None],
    of: ClassificationSet,
    without: Sequence[str],
) -> LabelledSplit:
    """Return one split of what has been found.

    Rows of a table of all splits that cannot be used belong to none of them: they are listed with
    "test", which every evaluation reads.

    Args:
        what: The data set and its folder, for the error.
        split: Name of the split, or `ALL`.
        found: What its reader has found.
        divided: The split of each image, None for those that are left out.
        of: Facts of the set.
        without: Names of the classes to leave out.

    Raises:
        AbsentError: the split holds no image.
        UsageError: it holds none that can be used.
    """
    skipped = [
        bad
        for part, bad in found.skipped
        if split in (part, ALL) or (split == "test" and part == ALL)
    ]
    kept = [index for index, name in enumerate(of.classes) if name not in without]
    records, labels = [], []
    for sample, part, own in zip(found.samples, found.parts, divided, strict=True):
        record, label = sample
        classes = (
            [label] if isinstance(label, int) else [index for index in kept if label[index] == 1]
        )
        if own is None and split == part:
            reason = "its patient, lesion or slide, or an identical image, is in another split"
            skipped.append(left_out(record, reason))
        elif split in (own, ALL) and set(classes) <= set(kept):
            names = ", ".join(of.classes[index] for index in classes) or "none of the classes"
            records.append(replace(record, caption=names, study=record.origin))
            labels.append(
                kept.index(label)
                if isinstance(label, int)
                else [int(index in classes) for index in kept]
            )
    if not records and skipped:
        raise UsageError(
            f"{what} holds no {split} image; what it holds cannot be used, as {skipped[0].key}: "
            f"{skipped[0].reason}."
        )
    if not records:
        raise AbsentError(f"{what} holds no {split} image.")
    dropped = (f"without the class {name}" for name in without)
    return LabelledSplit(
        LabelledRecords(records),
        np.array(labels, np.int64),
        tuple(of.classes[index] for index in kept),
        skipped,
        tuple(dict.fromkeys((*of.notes, *found.notes, *dropped))),
    )


def left_out(record: Record, reason: str) -> Skipped:
    """Return the entry of an image that is not used though it could be read."""
    return Skipped(record.key, record.place, reason)


def absent(about: About, root: Path, looked_for: Iterable[str]) -> AbsentError:
    """Return the error for a folder or a file of the data set that is not there.

    It says what to get, under which licence, and where to put it.
    """
    what = f"{root} lacks {', '.join(looked_for)}" if root.exists() else f"there is no {root}"
    return AbsentError(
        f"{about.key}: {what}. {about.access} ({about.licence}) and put it there, unpacked."
    )


def find(about: About, root: Path, inner: Iterable[str], names: Iterable[str]) -> Path:
    """Return the first path that exists, of any of the names in `root` or in a folder within it.

    Args:
        about: Of the data set, for the error.
        root: The data set's folder.
        inner: Folders within it, as archives unpack to.
        names: Files or folders, of which one must be there.

    Raises:
        AbsentError: there is none.
    """
    names = list(names)
    for folder in (root, *(root / name for name in inner)):
        for name in names:
            if (folder / name).exists():
                return folder / name
    raise absent(about, root, [" or ".join(names)])


def class_folders(about: About, root: Path, base: Path, folders: Mapping[str, int]) -> Items:
    """Yield the images that lie in one folder per class, sorted by their names.

    Links that lead out of `root` are skipped.

    Args:
        about: Of the data set, for the error.
        root: The data set's folder, to which the keys of the images are relative.
        base: Where the folders of the classes are.
        folders: Their names, and the indices of their classes.

    Raises:
        AbsentError: a folder is not there.
    """
    lacking = [name for name in folders if not (base / name).is_dir()]
    if lacking:
        raise absent(about, base, lacking)
    real_root = root.resolve()
    for name, label in folders.items():
        with os.scandir(base / name) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            if entry.name.rpartition(".")[2].lower() not in IMAGE_SUFFIXES or entry.is_dir():
                continue
            image = Path(entry.path)
            key = image.relative_to(root).as_posix()
            if entry.is_symlink() and not image.resolve().is_relative_to(real_root):
                yield Skipped(key, str(image), "it is a link that leads out of the folder")
            else:
                yield Labelled(Record(key, image, ""), label)


def image_index(folders: Iterable[Path], suffix: str = "") -> dict[str, Path]:
    """Return the files of some folders by their names, less the suffix; the first of each name."""
    found: dict[str, Path] = {}
    for folder in folders:
        if folder.is_dir():
            for name in sorted(os.listdir(folder)):
                if name.endswith(suffix):
                    found.setdefault(name.removesuffix(suffix), folder / name)
    return found


def inside(folder: Path, name: str) -> Path | None:
    """Return the path of a file that a table names, None if it would lead out of the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    return None if path.is_absolute() or ".." in path.parts else folder / path


def not_a_class(cell: str | None, known: Iterable[str]) -> str:
    """Return the reason to skip a row whose label is none of the known ones."""
    return f"its label must be one of {', '.join(known)}; got {cell or 'nothing'}"


def parquet_files(root: Path) -> list[Path]:
    """Return the Parquet files in a folder or in `data` within it.

    Raises:
        UsageError: one of the files that their names count, as "train-00000-of-00004", is missing.
    """
    files = sorted(root.glob("*.parquet")) or sorted(root.glob("data/*.parquet"))
    counted = [match for file in files if (match := _COUNTED.match(file.name))]
    for stem, count in dict.fromkeys((match["stem"], match["count"]) for match in counted):
        held = {match["number"] for match in counted if match["stem"] == stem}
        # The classes come one after the other, so that a part of the files lacks some.
        if len(held) < int(count):
            raise UsageError(
                f"{files[0].parent} must hold {int(count)} files {stem}-*-of-{count}; it holds "
                f"{len(held)}. Get the others."
            )
    return files


def parquet_images(
    path: Path, columns: Mapping[str, Mapping[str, int]], label_of: Callable[..., int | None]
) -> Items:
    """Yield the images in the column "image" of a Parquet file.

    Args:
        path: The file.
        columns: Columns of classes, each with the names of its classes and their indices. A cell
            is a name, or a number that the file's metadata name, or without them an index.
        label_of: The label for a row's indices, None for rows of another set.

    Raises:
        UsageError: the file cannot be read or lacks a column, or pyarrow is not installed.
    """
    images = ParquetImages(path)
    names = {column: class_names(path, column) for column in columns}
    for number, row in enumerate(rows(path, list(columns))):
        if isinstance(row, Skipped):
            yield row
            continue
        key = f"{path.name}/{number}"
        indices = []
        for column, known in columns.items():
            cell = row[1][column]
            index = _class_index(cell, names[column], known)
            if index is None:
                yield Skipped(key, str(path), f"{column}: {not_a_class(cell, known)}")
                break
            indices.append(index)
        else:
            if (label := label_of(*indices)) is not None:
                yield Labelled(ImageRow(key, path, "", container=images, row=number), label)


def _class_index(cell: str | None, names: Sequence[str], known: Mapping[str, int]) -> int | None:
    """Return the index of a class that a cell gives by name or number, None if it is none."""
    folded = {name.lower(): index for name, index in known.items()}
    if cell is not None and cell.isdecimal() and len(cell) < 4:
        if not names:
            return int(cell) if int(cell) in known.values() else None
        cell = names[int(cell)] if int(cell) < len(names) else None
    return folded.get((cell or "").lower())
