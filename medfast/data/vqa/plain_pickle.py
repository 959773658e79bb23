"""Pickles of others, of which nothing is executed: plain values or a refusal."""

from __future__ import annotations

import io
import pickle
from typing import Any, NoReturn


def loads(data: bytes) -> Any:
    """Return the plain value in a pickle: dicts, lists, tuples, text, numbers, True, False, None.

    All that a pickle can run, it first looks up by a name; here no name is known.

    Raises:
        pickle.UnpicklingError: it holds something else, or is damaged.
    """
    try:
        return _Unpickler(io.BytesIO(data), encoding="utf-8").load()
    except pickle.UnpicklingError:
        raise
    # A damaged one makes the reader stumble in many ways, memory and recursion errors included.
    except Exception as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(
            f"it holds an object of {module}.{name}, which is not read, as it could run anything"
        )
