"""Which split an image is in: no patient, lesion or identical image is ever in two of them."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

from medfast.data.classification.labelled import ClassificationSet, Found
from medfast.data.containers import ImageRow
from medfast.data.records import Record
from medfast.data.sources import hash_split

# Of the patients or images that upstream leaves to be divided.
VALIDATION_SHARE = 0.1

_SAMPLED_BYTES = 4096


def divide(found: Found, of: ClassificationSet) -> list[str | None]:
    """Return the split of each of N images, None for one that must be left out.

    Images of one origin, and images that are equal byte for byte, are a group. A group with an
    image in upstream's "test" is test, and its images in other parts of upstream are left out; so
    it is with "validation" before "train". Groups that upstream leaves open are divided by a hash
    of their origin, or without one within each class, in the order of a hash of their keys: that
    depends on nothing but names and bytes.

    Cost: files of a size that no other has are not read. Rows of containers are all read, once.

    Args:
        found: The images.
        of: What upstream fixes.
    """
    records = [sample.record for sample in found.samples]
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups(records)):
        members[group].append(index)
    splits: list[str | None] = [None] * len(records)
    test = 0.0 if of.upstream else of.test_share
    by_class: dict[Hashable, list[tuple[str, list[int]]]] = defaultdict(list)
    for own in members.values():
        held = {found.parts[i] for i in own}
        fixed = next((name for name in ("test", "validation") if name in held), "")
        if not fixed and "validation" in of.upstream:
            fixed = "train"
        origins = [origin for i in own if (origin := records[i].origin) is not None]
        if not fixed and not origins:
            by_class[found.samples[own[0]].label].append((min(records[i].key for i in own), own))
            continue
        split = fixed or hash_split(min(origins), VALIDATION_SHARE, test)
        for i in own:
            if not fixed or found.parts[i] == fixed:
                splits[i] = split
    for units in by_class.values():
        for own, split in _stratified(units, test):
            for i in own:
                splits[i] = split
    return splits


def groups(records: Sequence[Record]) -> list[int]:
    """Return an id for each of N images, equal for one origin or equal bytes, however linked."""
    parent = list(range(len(records)))

    def top(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    first: dict[Hashable, int] = {}
    for index, (record, image) in enumerate(zip(records, _images(records), strict=True)):
        for shared in (record.origin, image):
            if shared is not None:
                parent[top(index)] = top(first.setdefault(shared, index))
    return [top(index) for index in range(len(records))]


def _images(records: Sequence[Record]) -> list[tuple[Hashable, ...]]:
    """Return what is equal for images that are equal byte for byte, and for no others.

    More and more of an image is looked at, while another one looks the same.
    """
    looks: tuple[Callable[[Record], Hashable], ...] = (_size, _middle, _digest)
    found: list[tuple[Hashable, ...]] = [()] * len(records)
    for look in looks:
        count = Counter(found)
        found = [
            (*seen, look(record)) if count[seen] > 1 else seen
            for seen, record in zip(found, records, strict=True)
        ]
    return found


def _size(record: Record) -> Hashable:
    if isinstance(record, ImageRow):
        return None
    try:
        return record.image.stat().st_size
    except OSError:
        return record.key


def _middle(record: Record) -> Hashable:
    if isinstance(record, ImageRow):
        return None
    # To open a named pipe would wait for ever.
    if not record.image.is_file():
        return record.key
    try:
        with record.image.open("rb") as file:
            file.seek(max(0, record.image.stat().st_size - _SAMPLED_BYTES) // 2)
            return hash(file.read(_SAMPLED_BYTES))
    except OSError:
        return record.key


def _digest(record: Record) -> Hashable:
    try:
        return hashlib.blake2b(record.read(), digest_size=16).digest()
    except OSError:
        # It will be skipped when its turn comes; it is like no other.
        return record.key


def _stratified(units: Sequence[tuple[str, list[int]]], test: float) -> list[tuple[list[int], str]]:
    """Return the split of each group of one class: the first are test, the next validation."""
    ordered = sorted(
        units, key=lambda unit: hashlib.blake2b(unit[0].encode("utf-8", "surrogatepass")).digest()
    )
    total = sum(len(own) for _, own in ordered)
    ends = itertools.accumulate(len(own) for _, own in ordered)
    divided = []
    for (_, own), end in zip(ordered, ends, strict=True):
        middle = (end - len(own) / 2) / total
        split = "test" if middle < test else "train"
        if test <= middle < test + VALIDATION_SHARE:
            split = "validation"
        divided.append((own, split))
    return divided
