"""Peak memory of one call: exact on a GPU, the growth of a fresh process's pages on a CPU."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from medfast.device import forget_peak_memory, peak_memory

# Processes are forked from a server that has imported these and computed nothing yet: what a call
# allocates and keeps (scratch of the matrix products) counts, what importing takes does not.
_PRELOAD = ["benchmarks.peers", "open_clip.loss"]


def cuda_growth(call: Callable[[], Any]) -> int:
    """Return by how many bytes the GPU's allocated memory rises at most during a call."""
    torch.cuda.synchronize()
    growth = _growth(call, torch.device("cuda"))
    torch.cuda.synchronize()
    return growth


def resident_growth(call: Callable[[], Any]) -> int:
    """Return by how many bytes this process's resident memory rises at most during a call."""
    return _growth(call, torch.device("cpu"))


def _growth(call: Callable[[], Any], device: torch.device) -> int:
    before = forget_peak_memory(device)
    call()
    return peak_memory(device) - before


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of a module returns in a process of its own.

    Raises:
        RuntimeError: The process ended without a result, as when it takes too much memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} ended its process without a result") from None
    finally:
        process.join()


def _send(there: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    there.send(function(*arguments))
