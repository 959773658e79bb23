"""A process beside this one that computes: what hangs or spoils the GPU is lost with it alone."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class CallError(Exception):
    """What was asked for raised; says what."""


class LostError(CallError):
    """The process is lost over it: it hung, ended, or can use the GPU no more."""


class Worker:
    """Calls functions one after the other in another process, a new one after each that was lost.

    A kernel that waits for what never comes cannot be interrupted, and after one that reads where
    it must not, no call to the GPU in the same process works.
    """

    def __init__(self) -> None:
        self._process: Any = None

    def __enter__(self) -> Worker:
        """Return it; the process starts with the first call."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._stop(patience_s=5)

    def call(
        self, limit_s: float, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what a function of a module returns, within a limit.

        Raises:
            LostError: There was no answer, or none is to be had from the process any more.
            CallError: The function raised.
        """
        if self._process is None:
            self._start()
        self._here.send((function, args, kwargs))
        if not self._here.poll(limit_s):
            self._stop()
            raise LostError(f"no answer within {limit_s:.0f} s")
        try:
            result, error, is_spoiled = self._here.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self._stop()
            raise LostError(f"it ended its process with code {code}") from None
        if is_spoiled:
            self._stop()
            raise LostError(error)
        if error is not None:
            raise CallError(error)
        return result

    def _stop(self, patience_s: float = 0) -> None:
        if self._process is not None:
            # Who has nothing to do ends by itself.
            self._here.close()
            self._process.join(patience_s)
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        # A forked process cannot use the GPU.
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there,))
        self._process.start()
        there.close()


def _serve(there: Connection) -> None:
    while True:
        try:
            function, args, kwargs = there.recv()
        except EOFError:  # whoever asks has ended
            return
        result, error, is_spoiled = None, None, False
        try:
            result = function(*args, **kwargs)
            _finish()
        except Exception as raised:
            error = f"{type(raised).__name__}: {str(raised).strip().partition(chr(10))[0]}"
            is_spoiled = _is_spoiled()
        there.send((result, error, is_spoiled))


def _finish() -> None:
    """Wait for the GPU, whose errors show only then."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _is_spoiled() -> bool:
    try:
        _finish()
    except RuntimeError:
        return True
    return False
