"""The command line of `medfast results`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medfast.cli.commands import COMMANDS
from medfast.cli.parser import Parser
from medfast.evals.compare import Request


def parse_results(argv: Sequence[str] | None = None) -> Request:
    """Return which runs to compare, and what to write."""
    parser = Parser(prog="medfast results", description=COMMANDS["results"], allow_abbrev=False)
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="RUN",
        help="A run folder, a folder that medfast evaluate wrote, or a .json or .jsonl of results.",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["main"],
        metavar="NAME",
        help="Metrics of the table, or main, or all. (default: main)",
    )
    for name, text in (
        ("--csv", "Write one line per run and metric, of all metrics."),
        ("--markdown", "Write the table that is printed."),
        ("--png", "Draw the table as a heat map."),
    ):
        parser.add_argument(name, metavar="FILE", help=text)
    given = parser.parse_args(argv)
    files = {
        name: None if value is None else Path(value).expanduser()
        for name, value in (("csv", given.csv), ("markdown", given.markdown), ("png", given.png))
    }
    sources = tuple(Path(source).expanduser() for source in given.sources)
    return Request(sources, tuple(given.metrics), **files)
