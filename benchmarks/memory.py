"""Peak memory of one call: exact on a GPU, the growth of a fresh process's pages on a CPU."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# Processes are forked from a server that has imported these and computed nothing yet: what a call
# allocates and keeps (scratch of the matrix products) counts, what importing takes does not.
_PRELOAD = ["benchmarks.peers", "open_clip.loss"]


def cuda_growth(call: Callable[[], Any]) -> int:
    """Return by how many bytes the GPU's allocated memory rises at most during a call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident_growth(call: Callable[[], Any]) -> int:
    """Return by how many bytes this process's resident memory rises at most during a call.

    The kernel keeps the highest value, to a fraction of a MiB; writing 5 to clear_refs sets it back
    to the present one.
    Allocators, libraries and threads all count, as they do when a machine runs out of memory.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


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


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
