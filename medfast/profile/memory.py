"""How much memory there is, and what it looks like when there is not enough."""

from __future__ import annotations

import contextlib
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# What torch, C++ and the GPU's libraries say; torch has a class for the GPU's memory alone.
_LACK = re.compile("out of memory|not enough memory|allocate memory|bad_alloc|ALLOC_FAILED")


class OutOfMemoryError(Exception):
    """The steps need more memory than there is."""


@contextlib.contextmanager
def naming_lack() -> Iterator[None]:
    """Within the context, a lack of memory has one name.

    Raises:
        OutOfMemoryError: there was not enough.
    """
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError(str(error)) from None
    except RuntimeError as error:
        if not _LACK.search(str(error)):
            raise
        raise OutOfMemoryError(str(error)) from None


def free_memory() -> int:
    """Return the bytes that a process may still take of the machine, or of its container."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        # "max" where there is no limit.
        most = int((group / "memory.max").read_text(encoding="utf-8"))
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        free = min(free, most - used)
    return free


def memory_for_steps(device: torch.device) -> int:
    """Return the most bytes that steps of this process may have in use, with all that it holds.

    They are counted as `medfast.device.peak_memory` does; processes of one machine share its own.
    """
    import torch

    from medfast.device import forget_peak_memory

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    shares = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free_memory() // shares + forget_peak_memory(device)


def refuse_more_than_there_is() -> None:
    """Let an allocation fail that the machine has no memory for.

    The kernel would grant it, and end this process, or another one, once the memory is used.
    """
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (free_memory(), most))
