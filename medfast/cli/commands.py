"""All commands, and `medfast COMMAND`, which runs one of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from medfast.cli.parser import Parser
from medfast.errors import unknown_name

COMMANDS = {
    "train": "Train one model, evaluate it and write its report.",
    "data": "Check and pack image-caption data, or write the phantom.",
    "env": "Print versions, devices and which implementations can run here.",
    "profile": "Say where the time and memory of training steps go, with a fused loss and without.",
    "study": "Train methods, seeds and initialisations under one budget, and compare them.",
    "evaluate": "Evaluate a model on what is there of 25 data sets.",
    "results": "Compare evaluations of several runs in one table.",
    "export": "Write a run as a folder that open_clip and transformers load.",
}
# What has the `main` of each.
MODULES = {
    "train": "medfast.train",
    "data": "medfast.data.__main__",
    "env": "medfast.env",
    "profile": "medfast.profile",
    "study": "medfast.study.__main__",
    "evaluate": "medfast.evaluate",
    "results": "medfast.results",
    "export": "medfast.export.__main__",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `medfast COMMAND ...`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog="medfast",
        description="Fused contrastive losses and fast training for medical vision-language "
        "models.",
        epilog="commands:\n" + "".join(f"  {n:8} {text}\n" for n, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", nargs="?", help="one of those below")
    name = parser.parse_args(arguments[:1]).command
    if name is None:
        parser.error(f"COMMAND is missing; it is one of: {', '.join(COMMANDS)}.")
    if name not in COMMANDS:
        parser.error(unknown_name("command", name, COMMANDS))
    import_module(MODULES[name]).main(arguments[1:])
