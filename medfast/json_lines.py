"""Files of JSON lines that a run appends to, and that it may have been stopped in the midst of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medfast.errors import UsageError


def mend(path: Path) -> None:
    """Cut a half-written last row off a file, before a run that goes on adds to it."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a file, which is made with the first; NaN and infinity become null.

    What is not ASCII is escaped: paths need not be UTF-8.

    Raises:
        UsageError: it cannot be written, as on a full disk.
    """
    try:
        with path.open("a", encoding="ascii") as file:
            file.writelines(json.dumps(_finite(row)) + "\n" for row in rows)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}). Make room or give the right to write "
            "there, and start again; a run goes on with --resume latest."
        ) from None


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, none if there is none, without a half-written last row.

    Raises:
        UsageError: another line is damaged.
    """
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is no JSON object")
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"line {number} of {path} is damaged ({error}); delete that line, and start again."
            ) from None
        rows.append(row)
    return rows


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
