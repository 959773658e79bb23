"""Labelled image sets for zero-shot classification and linear probes, one file per data set."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfast.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from medfast.data.classification.labelled import ClassificationSet, Found, LabelledSplit

# Key -> module with `SETS` and `read(key, root, part)`. Names only: no imports.
CLASSIFICATION = {
    "bach": "medfast.data.classification.bach",
    "ham10000": "medfast.data.classification.ham10000",
    "lc25000_lung": "medfast.data.classification.lc25000",
    "lc25000_colon": "medfast.data.classification.lc25000",
    "nct_crc": "medfast.data.classification.nct_crc",
    "pad_ufes_20": "medfast.data.classification.pad_ufes_20",
    "pcam": "medfast.data.classification.pcam",
    "sicap": "medfast.data.classification.sicap",
    "vindr_mammo": "medfast.data.classification.vindr_mammo",
    "pathmnist": "medfast.data.classification.medmnist",
    "dermamnist": "medfast.data.classification.medmnist",
    "octmnist": "medfast.data.classification.medmnist",
    "pneumoniamnist": "medfast.data.classification.medmnist",
    "retinamnist": "medfast.data.classification.medmnist",
    "breastmnist": "medfast.data.classification.medmnist",
    "bloodmnist": "medfast.data.classification.medmnist",
    "tissuemnist": "medfast.data.classification.medmnist",
    "organamnist": "medfast.data.classification.medmnist",
    "organcmnist": "medfast.data.classification.medmnist",
    "organsmnist": "medfast.data.classification.medmnist",
}
# Beyond the suite: many labels per image.
EXTRA = {"chestmnist": "medfast.data.classification.medmnist"}
SPLITS = ("train", "validation", "test")


def facts(key: str) -> ClassificationSet:
    """Return the facts of a set.

    Raises:
        UsageError: the key is not known.
    """
    return _module(key).SETS[key]


def read(key: str, root: Path, split: str, without: Sequence[str] = ()) -> LabelledSplit:
    """Return one split; see `read_splits`, which reads several of a set at the cost of one."""
    return read_splits(key, root, (split,), without)[split]


def read_splits(
    key: str, root: Path, splits: Sequence[str] = SPLITS, without: Sequence[str] = ()
) -> dict[str, LabelledSplit]:
    """Return splits of the classification set `key` that lies in `root`.

    No patient, lesion or slide, where known, and no two images that are equal byte for byte are in
    different splits. Upstream's splits are kept, but for images of "train" and "validation" that
    break this rule: they are left out and listed. See `divide` for what upstream leaves open, and
    for the cost; upstream's "test" alone, and "all", cost no more than the tables.

    Args:
        key: A key of `CLASSIFICATION` or `EXTRA`.
        root: Folder of the set.
        splits: Any of "train", "validation" and "test", or "all" for every image in one.
        without: Names of classes to leave out; the others are numbered anew, in their order.

    Raises:
        UsageError: a name is not known, a folder, a file, a column or a package is missing or a
            table cannot be read, or a split holds no image.
    """
    from medfast.data.classification.apart import divide
    from medfast.data.classification.labelled import ALL, labelled_split

    of = facts(key)
    for split in splits:
        if split not in (*SPLITS, ALL):
            raise UsageError(unknown_name("split", split, (*SPLITS, ALL)))
    for name in without:
        if name not in of.classes:
            raise UsageError(unknown_name(f"class of {key}", name, of.classes))
    alone = set(splits) == {"test"} and "test" in of.upstream
    try:
        found = _found(key, root, ("test",) if alone else of.upstream or (ALL,))
        # Upstream's test split does not depend on the others.
        divided = found.parts if alone or set(splits) == {ALL} else divide(found, of)
    # Of all that a reader opens, lists or looks for: what it may not, or what has no such name.
    except OSError as error:
        raise UsageError(
            f"{key}: {error.filename or root} cannot be read ({error.strerror or error}); check "
            "the name and the permissions."
        ) from None
    return {
        split: labelled_split(f"{key}: {root}", split, found, divided, of, without)
        for split in splits
    }


def _module(key: str) -> Any:
    known = CLASSIFICATION | EXTRA
    if key not in known:
        raise UsageError(unknown_name("classification set", key, known))
    return importlib.import_module(known[key])


def _found(key: str, root: Path, parts: Sequence[str]) -> Found:
    """Return what a set's reader finds in some parts of upstream."""
    from medfast.data.classification.labelled import Found, Labelled, Note, left_out

    found = Found()
    for part in parts:
        keys: set[str] = set()
        for item in _module(key).read(key, root, part):
            if isinstance(item, Note):
                found.notes.append(item.text)
            elif not isinstance(item, Labelled):
                found.skipped.append((part, item))
            elif item.record.key in keys:
                found.skipped.append((part, left_out(item.record, "it is listed before")))
            else:
                keys.add(item.record.key)
                found.samples.append(item)
                found.parts.append(part)
    return found
