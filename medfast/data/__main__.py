"""`python -m medfast.data`: write the phantom data, check data sets, pack them into shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medfast.cli import Parser, run
from medfast.errors import UsageError, unknown_name

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


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m medfast.data ...`."""
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
    phantom.set_defaults(function=_phantom)

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
    check.set_defaults(function=_check)

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
    pack.set_defaults(function=_pack)
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
    arguments = parser.parse_args(argv)
    run(lambda: arguments.function(arguments), "medfast.data")


def _add(commands: argparse._SubParsersAction, name: str, line: str, text: str) -> Parser:
    return commands.add_parser(
        name,
        help=line,
        description=text,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


@contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that shows (done, total) on a terminal."""
    from tqdm import tqdm

    with tqdm(unit=unit, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _options(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return how the sources are to be read, as `read_split` takes it."""
    from medfast.data.table import Columns

    given = {
        "image": arguments.csv_img_key,
        "caption": arguments.csv_caption_key,
        "separator": arguments.csv_separator,
    }
    return {"csv": {"columns": Columns(**{k: v for k, v in given.items() if v is not None})}}


def _phantom(arguments: argparse.Namespace) -> None:
    from medfast.data.phantom import source, write_phantom

    layout, out, pairs = arguments.layout, arguments.out, arguments.pairs
    with _bar("image") as progress:
        write_phantom(
            out,
            layout=layout,
            pairs=pairs,
            seed=arguments.seed,
            domain=arguments.domain,
            progress=progress,
        )
    print(f"{pairs} pairs in {out}; train on them with --train-data {source(layout, out)}")


def _check(arguments: argparse.Namespace) -> None:
    from medfast.data import parse_source
    from medfast.data.check import check
    from medfast.data.check_report import summary

    sources = [parse_source(text) for text in arguments.sources]
    against = [parse_source(text) for text in arguments.against]
    out = arguments.out or Path("-".join(["check", *dict.fromkeys(key for key, _ in sources)]))
    with _bar("pair") as progress:
        report = check(
            sources,
            out,
            against=against,
            workers=arguments.workers,
            show_images=arguments.show_images,
            seed=arguments.seed,
            options=_options(arguments),
            progress=progress,
        )
    print(summary(report))
    print(f"More in {out / 'report.md'}")


def _pack(arguments: argparse.Namespace) -> None:
    from medfast.data import SPLITS, parse_source
    from medfast.data.pack import pack, read_sources

    for split in arguments.splits or ():
        if split not in SPLITS:
            raise UsageError(unknown_name("split", split, SPLITS))
    sources = [parse_source(text) for text in arguments.sources]
    read = read_sources(sources, arguments.splits, _options(arguments))
    with _bar("pair") as progress:
        packed = pack(
            read.records,
            arguments.out,
            roots=read.roots,
            credentialed=read.credentialed,
            skipped=read.skipped,
            samples_per_shard=arguments.samples_per_shard,
            short_side=arguments.short_side,
            seed=arguments.seed,
            workers=arguments.workers,
            progress=progress,
        )
    counts = ", ".join(f"{count:,} {split}" for split, count in packed.samples.items())
    kept = f", {packed.kept} of them from before" if packed.kept else ""
    print(f"{counts} pairs in {packed.shards} shards{kept}, {packed.size / 2**20:,.1f} MiB")
    if packed.skipped:
        print(f"{packed.skipped:,} rows or pairs left out, see {arguments.out / 'skipped.jsonl'}")
    print(f"Train on them with --train-data shards:{arguments.out}")


if __name__ == "__main__":
    main()
