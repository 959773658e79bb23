"""The exceptions that the commands turn into a sentence and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """Something the user can mend: names what is wrong, what was expected and what to do."""


class SharedError(UsageError):
    """A `UsageError` that every process of a run raises at once, so that one of them tells it."""


class StoppedError(Exception):
    """The run was asked to stop, and has saved where it was."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence for a name that is not in `known`: the closest match, then the list."""
    choices = sorted(known)
    close = difflib.get_close_matches(name.lower(), choices, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{what} {name!r} is not known.{hint} Known: {', '.join(choices)}."
