"""The command line of `medfast data`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from medfast.cli.parser import Parser

_SOURCE = "Data set and its folder, such as roco:/data/roco or shards:/data/packed."
_CHECK = """\
Read and decode every pair of one or more data sets: what is missing, damaged, empty or double, how
long the captions and how large the images are, and which training pairs are also in a validation or
test split (the same patient, article, video or study, or the same pixels).

Writes report.md, report.json, histograms.png, contact.png, skipped.jsonl and exclude.jsonl into
--out, and each set's part of exclude.jsonl into its folder as medfast-exclude.jsonl, which training
and pack apply on their own."""
_PACK = """\
Pack data sets into shards, OUT/{train,validation,test}/000000.tar: tar archives (WebDataset) of
image, caption and facts, with DALI's index beside each. The order is shuffled. Pairs that cannot be
used are left out and listed in OUT/skipped.jsonl, as are training pairs that a set's
medfast-exclude.jsonl lists.

A run that was stopped goes on where it was: the same command keeps every shard that is whole, byte
by byte, and writes the others."""


def parse_data(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what to do, `command`, and its arguments."""
    parser = Parser(prog="medfast.data", description="Prepare image-caption data.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    phantom = commands.add_parser(
        "phantom", help="Write generated, medical-like images with captions in a set's layout."
    )
    phantom.add_argument(
        "--domain",
        default="medical",
        help="What the images are like: medical, or general, photographs of everyday scenes "
        "(default: medical).",
    )
    phantom.add_argument(
        "--layout", default="roco", help="Layout to write; a wrong one lists them (default: roco)."
    )
    phantom.add_argument("--out", required=True, type=Path, metavar="DIR", help="A new folder.")
    phantom.add_argument("--pairs", default=6000, type=int, metavar="N", help="(default: 6000)")
    phantom.add_argument("--seed", default=0, type=int, metavar="S", help="(default: 0)")

    check = _add(
        commands, "check", "Find damaged, double and leaking pairs before training.", _CHECK
    )
    check.add_argument("sources", nargs="+", metavar="SOURCE", help=_SOURCE)
    check.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="More sets whose validation and test splits must be kept out of training.",
    )
    check.add_argument(
        "--out", type=Path, metavar="DIR", help="Folder of the report (default: check-SOURCE)."
    )
    check.add_argument(
        "--show-images",
        action="store_true",
        help="Show images of credentialed sets in contact.png too: keep that file where the set "
        "may be kept.",
    )

    pack = _add(commands, "pack", "Pack data sets into shards for training at scale.", _PACK)
    pack.add_argument("sources", nargs="+", metavar="SOURCE", help=_SOURCE)
    pack.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="A new folder, or one to go on with."
    )
    pack.add_argument(
        "--splits",
        nargs="+",
        metavar="SPLIT",
        help="Splits to pack: train, validation, test (default: all that the sets have).",
    )
    pack.add_argument(
        "--samples-per-shard",
        type=int,
        metavar="N",
        help="(default: as many as make 256 MiB, 10000 at most)",
    )
    pack.add_argument(
        "--short-side",
        type=int,
        metavar="N",
        help="Resize images whose short side is longer than N pixels, as JPEG of quality 95, or as "
        "PNG where the file is lossless (default: keep every file's bytes).",
    )
    for command in (check, pack):
        command.add_argument(
            "--workers", type=int, metavar="N", help="Processes (default: one per core)."
        )
        for flag, what in (
            ("--csv-img-key", "Column of image paths in a csv source (default: filepath)."),
            ("--csv-caption-key", "Column of captions in a csv source (default: title)."),
            ("--csv-separator", "Separator of a csv source (default: as in the file)."),
        ):
            command.add_argument(flag, metavar="VALUE", help=what)
        command.add_argument("--seed", default=0, type=int, metavar="S", help="(default: 0)")
    return parser.parse_args(argv)


def _add(commands: argparse._SubParsersAction, name: str, line: str, text: str) -> Parser:
    return commands.add_parser(
        name,
        help=line,
        description=text,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
