"""The JSON files in `benchmarks/results/`: one per benchmark, machine and day."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.conditions import machine

FOLDER = Path(__file__).parent / "results"


def write(name: str, conditions: dict[str, Any], folder: Path = FOLDER, **content: Any) -> Path:
    """Write `<name>_<machine>_<date>.json`; a second run on the same day replaces the first."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(name, conditions)
    save(path, name, conditions, **content)
    return path


def file_name(name: str, conditions: dict[str, Any]) -> str:
    """Return the file name of a result."""
    return f"{name}_{machine(conditions)}_{conditions['date'][:10]}.json"


def save(path: Path, name: str, conditions: dict[str, Any], **content: Any) -> None:
    """Write one result to a file of any name."""
    result = {"name": name, "conditions": conditions, **content}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def newest(folder: Path = FOLDER) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the newest result of each name and machine, by the date that it carries."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        result = load(path)
        key = (result["name"], machine(result["conditions"]))
        if key not in found or _date(result) > _date(found[key]):
            found[key] = result
    return found


def load(path: Path) -> dict[str, Any]:
    """Return what a file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def _date(result: dict[str, Any]) -> str:
    return result["conditions"]["date"]
