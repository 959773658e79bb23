"""Work on many samples in several processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from medfast.errors import UsageError

Task = TypeVar("Task")
Result = TypeVar("Result")


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None = None
) -> Generator[Result, None, None]:
    """Yield `function(task)` of every task, in their order.

    Args:
        function: A function of a module, which a new process can import.
        tasks: What to call it with.
        workers: Processes; None takes one per core, 1 works in this one.

    Raises:
        UsageError: `workers` is below 1, or a process was killed.
    """
    workers = cores() if workers is None else workers
    if workers < 1:
        raise UsageError(f"--workers must be at least 1; got {workers}.")
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(
        workers,
        # New processes, not copies: a copied one may wait for ever for a lock of a thread that
        # was not copied with it.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(os.getpid(),),
    )
    try:
        waiting = deque(pool.submit(function, task) for task in tasks)
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UsageError(
            "a worker process was killed, most likely because memory ran out; start again with "
            f"fewer than --workers {workers}."
        ) from None
    except BaseException:
        terminate(pool)
        raise
    finally:
        pool.shutdown()


def terminate(pool: ProcessPoolExecutor) -> None:
    """End the workers of a pool: whoever stops does not want to wait for what they have in hand.

    What is waiting must not be cancelled as well: the pool's own thread fails on that.
    """
    for process in list((pool._processes or {}).values()):
        process.terminate()


def _start(parent: int) -> None:
    """Leave Ctrl-C, which reaches the whole process group, to the parent; end when that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
