"""The pairs of one split of several sources, one source after another."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medfast.data import read_split
from medfast.data.records import Record, Records, study_or_key
from medfast.data.skipped import Skipped
from medfast.errors import UsageError


@dataclass(frozen=True)
class Mixture:
    """One split of several sources.

    Attributes:
        sources: Key of each source.
        records: The pairs; of several sources all have a study, and no two sources have one in
            common.
        sizes: Number of pairs of each source.
        skipped: Rows of caption files that could not be used.
        excluded: Number of pairs of each source that exclusion lists left out.
    """

    sources: list[str]
    records: Records
    sizes: list[int]
    skipped: list[Skipped]
    excluded: list[int]

    def fingerprint(self) -> dict[str, Any]:
        """Return what another list of pairs would not have: their number and a hash.

        The hash is of the sources' and the pairs' keys, in order, so that folders may move.
        """
        digest = hashlib.sha256()
        at = iter(self.records)
        for source, size in zip(self.sources, self.sizes, strict=True):
            digest.update(f"{source} {size}\n".encode())
            for _ in range(size):
                # repr shows where a key ends, and escapes what is no UTF-8.
                digest.update(repr(next(at).key).encode())
        return {"pairs": len(self.records), "sha256": digest.hexdigest()}


def read_mixture(
    sources: Sequence[tuple[str, Path]],
    split: str,
    exclusions: Sequence[Collection[str]] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Mixture:
    """Return one split of several sources.

    Args:
        sources: Key and folder of each.
        split: "train", "validation" or "test".
        exclusions: For each source, the keys of the pairs to leave out.
        options: As of `read_split`.

    Raises:
        UsageError: a source is missing, has no such split, or is excluded as a whole.
    """
    records: list[Record] = []
    sizes: list[int] = []
    skipped: list[Skipped] = []
    excluded: list[int] = []
    left_out = [()] * len(sources) if exclusions is None else exclusions
    for number, ((source, root), keys) in enumerate(zip(sources, left_out, strict=True)):
        found = read_split(source, root, split, options)
        kept = [r for r in found.records if r.key not in keys]
        excluded.append(len(found.records) - len(kept))
        if not kept:
            raise UsageError(
                f"{source}: the exclusion lists leave out every {split} pair of {root}; see "
                "--exclude."
            )
        if len(sources) > 1:
            kept = [replace(r, study=f"{number} {study_or_key(r)}") for r in kept]
        records += kept
        sizes.append(len(kept))
        skipped += found.skipped
    return Mixture([key for key, _ in sources], Records(records), sizes, skipped, excluded)
