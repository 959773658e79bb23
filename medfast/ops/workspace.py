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
# Memory that waits for a loan, by address, what has waited longest first. A loan that needs less
# than the inverse of this does not get it.
_idle: dict[int, Tensor] = {}
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

    On a CPU what is given back, when the last reference to the tensor goes, is lent again: for
    tensors of megabytes the allocator may ask the system anew each time, and the page faults of the
    first write cost as much as a good part of the products that go there. What stays is no more
    than the workspace.
    """
    size, most = count * dtype.itemsize, workspace_bytes()
    if like.device.type != "cpu" or not 0 < size <= most:
        return like.new_empty(count, dtype=dtype)
    sizes = {place: len(memory) for place, memory in _idle.copy().items()}
    suitable = [place for place in sizes if size <= sizes[place] <= _MOST_SPARE * size]
    # Another thread may take it first.
    memory = _idle.pop(min(suitable, key=sizes.__getitem__), None) if suitable else None
    if memory is None:
        _let_go(most - size)
        memory = torch.empty(size, dtype=torch.uint8)
    loan = (ctypes.c_char * size).from_address(memory.data_ptr())
    weakref.finalize(loan, _give_back, memory, most).atexit = False
    return torch.frombuffer(loan, dtype=dtype)


def _give_back(memory: Tensor, most: int) -> None:
    _idle[memory.data_ptr()] = memory
    _let_go(most)


def _let_go(most: int) -> None:
    """Leave no more than so many bytes idle."""
    waiting = _idle.copy()  # in one step: loans end at any time, in any thread
    excess = sum(len(memory) for memory in waiting.values()) - most
    for place, memory in waiting.items():
        if excess <= 0:
            return
        _idle.pop(place, None)
        excess -= len(memory)
