"""What commands print: log lines, and the table of a run's results."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from medfast.cli.process import rank


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return result rows as a text table, one line per metric."""
    lines = [f"{'task':<32} {'n':>6} {'value':>8}   {'95 % interval':<17} {'chance':>7}"]
    for row in rows:
        for name, value in row["metrics"].items():
            low, high = row["ci95"][name]
            title = " ".join(part for part in (row["task"], row["name"], name) if part)
            lines.append(
                f"{title:<32} {row['n']:>6} {value:>8.1%}   {low:>6.1%} to {high:<7.1%} "
                f"{row['chance'][name]:>7.1%}"
            )
    return "\n".join(lines)


class ConsoleHandler(logging.Handler):
    """Prints log lines to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if getattr(record, "progress", False) and sys.stderr.isatty():
            return  # the bar says it
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_console() -> None:
    """Let medfast's log lines appear on stderr, of several processes those of the first."""
    logger = logging.getLogger("medfast")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    kind = logging.NullHandler if rank() else ConsoleHandler
    if not any(isinstance(handler, kind) for handler in logger.handlers):
        logger.addHandler(kind())
