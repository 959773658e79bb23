"""Checkpoints: written beside and renamed, read without unpickling code, bitwise complete."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from medfast.errors import UsageError

log = logging.getLogger(__name__)

# What a run needs to go on.
KEYS = {
    *("epoch", "epoch_step", "step", "samples", "config", "world", "data"),
    *("state_dict", "method", "optimizer", "scaler", "random"),
}
_NAME = re.compile(r"epoch_(\d+)(?:_step_(\d+))?\.pt")


def save(folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint into `folder` and remove all others but the newest `keep`.

    It is `epoch_N.pt` after N epochs, and `epoch_N_step_S.pt` at step S within the next one. It
    stays also where a run that went back to an older one has later ones.

    Args:
        folder: The run's `checkpoints/`.
        state: Tensors and plain values, as `torch.load(weights_only=True)` takes them back.
        keep: How many checkpoints stay.
    """
    within = f"_step_{state['step']}" if state["epoch_step"] else ""
    path = folder / f"epoch_{state['epoch']}{within}.pt"
    _write(path, state)
    for old in listing(folder)[:-keep]:
        if old != path:
            old.unlink()
    return path


def save_best(folder: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint of the best epoch so far, beside the others."""
    _write(best(folder), state)


def best(folder: Path) -> Path:
    """Return the path of the best epoch's checkpoint."""
    return folder / "best.pt"


def _write(path: Path, state: dict[str, Any]) -> None:
    beside = path.with_suffix(".pt.part")
    try:
        path.parent.mkdir(exist_ok=True)
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    # torch's writer has an error of its own for what the file said.
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        older = listing(path.parent)[-1:]
        left = f"{older[0].name} is whole" if older else "there is no older one"
        raise UsageError(
            f"--logs: the checkpoint {path} cannot be written ({reason}); {left}. Make room, and "
            "go on with --resume latest."
        ) from None


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


def find(resume: str, logs: Path, name: str | None) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint that --resume asks for, and what it holds.

    Args:
        resume: A file; "latest", the newest that is whole; "auto", the same, or None without any.
        logs: Folder of the run folders.
        name: The run that "latest" means; None takes the one with the newest checkpoint.

    Raises:
        UsageError: there is no such run, or it has no checkpoint that can be read.
    """
    if resume not in ("latest", "auto"):
        path = Path(resume).expanduser()
        return path, load(path)
    if name is not None:
        found = listing(logs / name / "checkpoints")
        where = f"the run {logs / name}"
    else:
        runs = (listing(folder) for folder in logs.glob("*/checkpoints"))
        newest = {path.stat().st_mtime: own for own in runs for path in own}
        found = newest[max(newest)] if newest else []
        where = f"any run in {logs}"
    if not found and resume == "auto":
        return None
    if not found:
        raise UsageError(f"--resume latest: {where} has no checkpoint; start without --resume.")
    for path in reversed(found[1:]):
        try:
            return path, load(path)
        except UsageError as error:
            log.warning("the newest checkpoint cannot be used, but the one before it: %s", error)
    return found[0], load(found[0])
