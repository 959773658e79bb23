"""The pairs of one split of several sources, one source after another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medfast.data import read_split
from medfast.data.records import Record, Records
from medfast.data.skipped import Skipped
from medfast.errors import UsageError


@dataclass(frozen=True)
class Mixture:
    """One split of several sources.

    Attributes:
        records: The pairs; studies of different sources never have one name.
        sizes: Number of pairs of each source.
        skipped: Rows of caption files that could not be used.
        excluded: Number of pairs that exclusion lists left out.
    """

    records: Records
    sizes: list[int]
    skipped: list[Skipped]
    excluded: int = 0


def read_mixture(
    sources: Sequence[tuple[str, Path]],
    split: str,
    exclusions: Collection[tuple[str, str]] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Mixture:
    """Return one split of several sources.

    Args:
        sources: Key and folder of each.
        split: "train", "validation" or "test".
        exclusions: Source and key of every pair to leave out.
        options: As of `read_split`.

    Raises:
        UsageError: a source is missing, has no such split, or is excluded as a whole.
    """
    records: list[Record] = []
    sizes: list[int] = []
    skipped: list[Skipped] = []
    excluded = 0
    for source, root in sources:
        found = read_split(source, root, split, options)
        kept = [r for r in found.records if (source, r.key) not in exclusions]
        excluded += len(found.records) - len(kept)
        if not kept:
            raise UsageError(
                f"{source}: the exclusion lists leave out every {split} pair of {root}; see "
                "--exclude."
            )
        if len(sources) > 1:
            kept = [
                r if r.study is None else replace(r, study=f"{source}:{root} {r.study}")
                for r in kept
            ]
        records += kept
        sizes.append(len(kept))
        skipped += found.skipped
    return Mixture(Records(records), sizes, skipped, excluded)
