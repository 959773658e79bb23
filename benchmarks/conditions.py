"""What a measurement depends on: machine, versions, threads, allocator."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from medfast.device import has_bf16

_PACKAGES = ("torch", "triton", "open_clip_torch", "scikit-learn", "medfast")


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Return what to know about a run, as JSON takes it."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "revision": _revision(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "bf16_in_hardware": has_bf16(torch.device("cpu")),
        "allocator": allocator(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found["gpu"] = card.name
        found["gpu_memory_bytes"] = card.total_memory
        found["l2_bytes"] = card.L2_cache_size
        found["capability"] = f"{card.major}.{card.minor}"
        found["cuda"] = torch.version.cuda
        found["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return found


def machine(found: dict[str, Any]) -> str:
    """Return a file name's word for the machine: its GPU's name, or its CPU's and the cores."""
    name = found.get("gpu") or f"{found['cpu']} {found['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"\((R|TM)\)", "", name).lower()).strip("_")


def version(package: str) -> str | None:
    """Return a package's version, or None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def allocator() -> str:
    """Return the C library's name and version, and what changes its allocation."""
    library = " ".join(platform.libc_ver()).strip() or "unknown C library"
    changes = filter(None, map(os.environ.get, ("GLIBC_TUNABLES", "LD_PRELOAD")))
    return f"{library}, {', '.join(changes) or 'default settings'}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _revision() -> str | None:
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return asked.stdout.strip()
