"""Image-caption data: readers, one file per data set, the loader, tokens and the phantom."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medfast.data.records import Record

# Key on the command line -> module with `read(root, split)`. Names only: no imports.
SOURCES = {"phantom": "medfast.data.roco", "roco": "medfast.data.roco"}
SPLITS = ("train", "validation", "test")


def read_split(source: str, root: Path, split: str) -> Sequence[Record]:
    """Return the records of one split of the data set `source` that lies in `root`.

    Raises:
        UsageError: the folder, a file or a column is missing, or the split holds no pair.
    """
    return importlib.import_module(SOURCES[source]).read(root, split)
