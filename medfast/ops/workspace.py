"""How much memory a chunked implementation may use for what it recomputes."""

from __future__ import annotations

import ctypes
import math
import os
import weakref

import torch
from torch import Tensor

_VARIABLE = "MEDFAST_WORKSPACE_MB"
_DEFAULT_MB = "256"
# Memory that waits for the next loan, unless that needs less than the inverse of this.
_idle: list[Tensor] = []
_MOST_SPARE = 2


def workspace_bytes() -> int:
    """Return the limit, in bytes, on the tiles that one call keeps at a time.

    It is read from the environment variable `MEDFAST_WORKSPACE_MB` (default 256; fractions are
    allowed). Results do not depend on it beyond rounding, speed hardly does.

    Raises:
        ValueError: The variable is not a positive number.
    """
    text = os.environ.get(_VARIABLE, _DEFAULT_MB)
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = math.nan
    if not 0 < megabytes < math.inf:
        raise ValueError(
            f"{_VARIABLE} must be a positive number of MiB; got {text!r}. "
            f"Unset it for the default of {_DEFAULT_MB}."
        )
    return int(megabytes * 2**20)


def lend(count: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory for `count` entries on the device of `like`, not initialised.

    On a CPU what is given back, when the last reference to the tensor goes, is lent again: of
    tensors this large the allocator asks the system anew each time, and the page faults of the
    first write cost as much as a good part of the products that go there. One piece at most stays,
    no larger than the workspace.
    """
    size = count * dtype.itemsize
    if like.device.type != "cpu" or not 0 < size <= workspace_bytes():
        return like.new_empty(count, dtype=dtype)
    try:
        memory = _idle.pop()
    except IndexError:
        memory = None
    if memory is None or not size <= len(memory) <= _MOST_SPARE * size:
        memory = torch.empty(size, dtype=torch.uint8)
    loan = (ctypes.c_char * size).from_address(memory.data_ptr())
    weakref.finalize(loan, _give_back, memory).atexit = False
    return torch.frombuffer(loan, dtype=dtype)


def _give_back(memory: Tensor) -> None:
    if not _idle:
        _idle.append(memory)
