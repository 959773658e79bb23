"""Samples that could not be used: listed, counted, and too many of them refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from medfast import json_lines
from medfast.errors import UsageError


class Skipped(NamedTuple):
    """A sample that could not be used."""

    key: str
    path: str
    reason: str


class SkippedSamples:
    """Lists samples that could not be used on disk, and stops a run that has too many.

    Args:
        path: The `skipped.jsonl` to write; made with the first such sample.
        total: Samples of all splits in use.
        limit: Share of `total` above which to stop.
        writes: Whether this process is the one that lists them.
    """

    def __init__(self, path: Path, total: int, limit: float, writes: bool = True) -> None:
        self._path = path
        self._writes = writes
        self._total = total
        self._limit = limit
        # A run that goes on keeps what it has listed before.
        if writes:
            json_lines.mend(path)
        self._seen = {(row["key"], row["path"]) for row in json_lines.read(path)}

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, samples: Iterable[Skipped]) -> None:
        """Record samples, each once however often it comes.

        Raises:
            UsageError: their share is over the limit.
        """
        new = [s for s in samples if (s.key, s.path) not in self._seen]
        if not new:
            return
        self._seen.update((s.key, s.path) for s in new)
        if self._writes:
            json_lines.append(self._path, (s._asdict() for s in new))
        if len(self) > self._limit * self._total:
            raise UsageError(
                f"{len(self)} of {self._total} samples could not be used, more than "
                f"--max-bad-samples {self._limit:g} allows; they are listed in {self._path}. "
                f"The last one: {new[-1].path} ({new[-1].reason})."
            )
