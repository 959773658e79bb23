"""The command line of `medfast export`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from medfast.cli.commands import COMMANDS
from medfast.cli.parser import Parser
from medfast.errors import UsageError
from medfast.export import Request


def parse_export(argv: Sequence[str] | None = None) -> Request:
    """Return what to export, and where to.

    Raises:
        UsageError: there is no such run, or a name of the hub is none.
    """
    parser = Parser(prog="medfast.export", description=COMMANDS["export"], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="A run folder, or one of its checkpoints.")
    parser.add_argument(
        "--hf-folder", metavar="DIR", required=True, help="The folder to write, new or empty."
    )
    parser.add_argument(
        "--hub-name",
        metavar="ORG/NAME",
        help="Where it is to lie on the Hugging Face hub, for the files that name a place; without "
        "it they name DIR.",
    )
    given = parser.parse_args(argv)
    run = Path(given.run).expanduser()
    if not run.exists():
        raise UsageError(f"RUN {given.run}: there is no such run folder or checkpoint.")
    if given.hub_name is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", given.hub_name):
        raise UsageError(f"--hub-name must be ORG/NAME, as on the hub; got {given.hub_name!r}.")
    return Request(run, Path(given.hf_folder).expanduser().absolute(), given.hub_name)
