"""Exclusion lists: training samples to leave out, because they are held out elsewhere."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medfast.data import SOURCES, identity
from medfast.errors import UsageError

NAME = "medfast-exclude.jsonl"


def exclusion_file(root: Path) -> Path:
    """Return where the exclusion list of the data set in `root` lies, whether or not it is there.

    That is `medfast-exclude.jsonl` in its folder; beside it, named after it, if the set is a file.
    """
    return root.with_name(f"{root.name}.{NAME}") if os.path.isfile(root) else root / NAME


def excluded_keys(sources: Sequence[tuple[str, Path]], path: Path | None = None) -> list[set[str]]:
    """Return, for each source, the keys of the training pairs to leave out.

    A list that lies with a source is about that source alone, wherever it lies by now. A list of
    all sources tells them apart by their keys (a phantom is read as ROCO, and is one), and those of
    one key by where they lie; a row that names no place is about all of its key.

    Args:
        sources: Key and folder of each.
        path: The list for all of them; None takes each one's own, where it has one.

    Raises:
        UsageError: the file is missing, or a line of it is damaged.
    """
    rows = None if path is None else read_rows(path)
    count = Counter(SOURCES[source] for source, _ in sources)
    found = []
    for source, root in sources:
        reader, lies = identity(source, root)
        own = exclusion_file(root)
        if rows is not None:
            mine = [r for r in rows if count[reader] == 1 or r.get("root") in (None, lies)]
        else:
            mine = read_rows(own) if os.path.isfile(own) else []
        found.append({row["key"] for row in mine if reader_of(row) == reader})
    return found


def reader_of(row: Mapping[str, Any]) -> str | None:
    """Return who reads the set that a row, or one side of it, is about; None if nobody does."""
    return SOURCES.get(row["source"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the lines of an exclusion list: source, root, key, reason, overlaps_with.

    Raises:
        UsageError: the file is missing, or a line of it is damaged.
    """
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = _row(line)
                if row is None:
                    raise UsageError(
                        f"line {number} of the exclusion list {path} must be a JSON object with "
                        f"'source' and 'key'; got {line.strip()[:60]!r}. Write the list again with "
                        "python -m medfast.data check."
                    )
                rows.append(row)
    except OSError as error:
        raise UsageError(f"the exclusion list {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the exclusion list {path} is not UTF-8 text ({error}). Write it again with "
            "python -m medfast.data check."
        ) from None
    return rows


def write_exclusions(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write an exclusion list, beside and renamed, so that there is never half a list.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(part, path)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    if not isinstance(row.get("source"), str) or not isinstance(row.get("key"), str):
        return None
    return row
