"""Where a number comes from: versions, revision and command."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import medfast


def provenance() -> dict[str, str | None]:
    """Return what every result row says of the code and the command that made it."""
    return {
        "medfast": medfast.__version__,
        "torch": version("torch"),
        "git": git_revision(),
        "command": command(),
    }


def command() -> str:
    """Return the command line of this process as a user would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.startswith("medfast"):
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    else:
        program = [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])


def git_revision() -> str | None:
    """Return the commit of medfast's own checkout, with "+" for local changes, if it is one."""
    folder = Path(medfast.__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        revision, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
            for arguments in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+" if changes else "")
