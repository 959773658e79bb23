"""What all readers do with the pairs and the bad rows that they find."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from medfast.data.records import Record, read_sidecar
from medfast.data.skipped import Skipped
from medfast.data.sources import AbsentError


def pairs(
    found: Iterable[Record | Skipped],
    what: str,
    split: str,
    root: Path | None = None,
    shared: Path | None = None,
    remedy: str = "",
) -> Iterator[Record | Skipped]:
    """Yield what a reader has found, and refuse a split that has no pair.

    Keys are made unique: the second pair of the key "a.jpg" is "a.jpg#2".

    Args:
        found: The pairs and the bad rows.
        what: The data set and its file or folder, for the error.
        split: Name of the split.
        root: Folder whose sidecar, if it is there, names the studies of pairs that have none.
        shared: A file that holds all splits: its bad rows belong to none, and come with "train".
        remedy: What to do about a split without a pair, as a sentence.

    Raises:
        AbsentError: there is no pair.
    """
    sidecar = (read_sidecar(root) or {}) if root else {}
    samples = sidecar.get("samples", {})
    count: dict[str, int] = {}
    first_bad: Skipped | None = None
    for item in found:
        if isinstance(item, Skipped):
            first_bad = first_bad or item
            if split == "train" or item.path != str(shared):
                yield item
            continue
        key = item.key
        while key in count:
            count[item.key] += 1
            key = f"{item.key}#{count[item.key]}"
        count[key] = 1
        if key != item.key:
            item = replace(item, key=key)
        if item.study is None and item.key in samples:
            item = replace(item, study=samples[item.key]["study"])
        yield item
    if not count:
        why = f". {remedy}" if remedy else "."
        if first_bad:
            why = f"; what it holds cannot be used, as {first_bad.key}: {first_bad.reason}."
        raise AbsentError(f"{what} holds no {split} pair{why}")
