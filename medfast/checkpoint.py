"""Checkpoints: written beside and renamed, read without unpickling code, bitwise complete."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from medfast.errors import UsageError

# What a run needs to go on.
KEYS = {
    *("epoch", "batch", "step", "samples", "config", "data"),
    *("state_dict", "method", "optimizer", "scaler", "rng"),
}
_NAME = re.compile(r"epoch_(\d+)(?:_step_(\d+))?\.pt")


def save(folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint into `folder` and remove all but the newest `keep`.

    It is `epoch_N.pt` after N epochs, and `epoch_N_step_S.pt` at step S within the next one.

    Args:
        folder: The run's `checkpoints/`.
        state: Tensors and plain values, as `torch.load(weights_only=True)` takes them back.
        keep: How many checkpoints stay.
    """
    within = f"_step_{state['step']}" if state["batch"] else ""
    path = folder / f"epoch_{state['epoch']}{within}.pt"
    _write(path, state)
    for old in listing(folder)[:-keep]:
        old.unlink()
    return path


def save_best(folder: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint of the best epoch so far, beside the others."""
    _write(best(folder), state)


def best(folder: Path) -> Path:
    """Return the path of the best epoch's checkpoint."""
    return folder / "best.pt"


def _write(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".pt.part")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def listing(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = {path: _NAME.fullmatch(path.name) for path in folder.glob("epoch_*.pt")}
    numbers = {p: (int(m[1]), int(m[2] or 0)) for p, m in found.items() if m}
    return sorted(numbers, key=numbers.__getitem__)


def load(path: Path) -> dict[str, Any]:
    """Return what `save` wrote.

    Raises:
        UsageError: the file is missing, cut off or no checkpoint of medfast.
    """
    if path.is_dir():
        raise UsageError(f"--resume {path} is a folder; name a checkpoint file in it, or 'latest'.")
    if not path.is_file():
        raise UsageError(f"--resume {path}: there is no such checkpoint.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each have their own for damaged files
        older = [p.name for p in listing(path.parent) if p != path]
        remedy = f"name an older one: {', '.join(older)}" if older else "there is no older one"
        raise UsageError(
            f"--resume {path} is damaged or no checkpoint ({type(error).__name__}); {remedy}."
        ) from None
    missing = KEYS - state.keys() if isinstance(state, dict) else KEYS
    if missing:
        raise UsageError(
            f"--resume {path} is not a checkpoint of a medfast run: it lacks "
            f"{', '.join(sorted(missing))}."
        )
    return state


def find(resume: str, logs: Path, name: str | None) -> Path:
    """Return the checkpoint that --resume asks for.

    Args:
        resume: A file, or "latest".
        logs: Folder of the run folders.
        name: The run that "latest" means; None takes the one with the newest checkpoint.

    Raises:
        UsageError: there is no such run, or it has no checkpoint.
    """
    if resume != "latest":
        return Path(resume).expanduser()
    if name is not None:
        found = listing(logs / name / "checkpoints")
        where = f"the run {logs / name}"
    else:
        newest = (listing(folder)[-1:] for folder in logs.glob("*/checkpoints"))
        found = sorted((p for paths in newest for p in paths), key=lambda p: p.stat().st_mtime)
        where = f"any run in {logs}"
    if not found:
        raise UsageError(f"--resume latest: {where} has no checkpoint; start without --resume.")
    return found[-1]
