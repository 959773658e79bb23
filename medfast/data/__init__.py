"""Image-caption data: readers, one file per data set, loaders, tokens and the phantom."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfast.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from medfast.data.records import Record
    from medfast.data.skipped import Skipped

# Key on the command line -> module with `ABOUT` and `read(root, split)`. Names only: no imports.
SOURCES = {
    "phantom": "medfast.data.roco",
    "roco": "medfast.data.roco",
    "pmc_oa": "medfast.data.pmc_oa",
    "mimic_cxr": "medfast.data.mimic_cxr",
    "quilt": "medfast.data.quilt",
    "csv": "medfast.data.table",
    "folder": "medfast.data.folder",
    "shards": "medfast.data.shards",
}
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        records: Its pairs.
        skipped: Rows of its caption file that could not be used.
    """

    records: list[Record]
    skipped: list[Skipped]


def parse_source(text: str) -> tuple[str, Path]:
    """Return the key and the folder of a source such as "roco:/data/roco".

    Raises:
        UsageError: the key is not known, or there is no folder.
    """
    key, _, folder = text.partition(":")
    if key not in SOURCES and ("/" in key or os.path.exists(key)):
        raise UsageError(
            f"a data source must be NAME:FOLDER; got {text}. Say which data set the folder holds, "
            f"such as roco:{text}."
        )
    if key not in SOURCES:
        raise UsageError(unknown_name("data source", key, SOURCES))
    if not folder:
        raise UsageError(f"the data source {key} needs a folder: {key}:FOLDER.")
    return key, Path(folder).expanduser()


def identity(source: str, root: Path) -> tuple[str, str]:
    """Return what tells a data set from every other: who reads it, and where it really lies.

    A phantom that is read as ROCO is the same set.
    """
    return SOURCES[source], os.path.realpath(root)


def distinct(sources: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Return sources without those that are an earlier one under another name or path."""
    found: dict[tuple[str, str], tuple[str, Path]] = {}
    for source, root in sources:
        found.setdefault(identity(source, root), (source, root))
    return list(found.values())


def read_split(
    source: str, root: Path, split: str, options: Mapping[str, Mapping[str, Any]] | None = None
) -> Split:
    """Return one split of the data set `source` that lies in `root`.

    Args:
        source: A key of `SOURCES`.
        root: Its folder, or for some its file.
        split: One of `SPLITS`.
        options: What the `read` of some sources takes beyond folder and split, by their keys.

    Raises:
        UsageError: the folder, a file or a column is missing or cannot be read, or the split holds
            no pair.
    """
    from medfast.data.records import Record

    module = importlib.import_module(SOURCES[source])
    records: list[Record] = []
    skipped: list[Skipped] = []
    try:
        for item in module.read(root, split, **(options or {}).get(source, {})):
            if isinstance(item, Record):
                records.append(item)
            else:
                skipped.append(item)
    # Of all that a reader opens, lists or looks for: what it may not, or what has no such name.
    except OSError as error:
        raise UsageError(
            f"{source}: {error.filename or root} cannot be read ({error.strerror or error}); check "
            "the name and the permissions."
        ) from None
    return Split(records, skipped)
