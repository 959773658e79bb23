"""`python -m medfast.data`: write the phantom data, check data sets, pack them into shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medfast.cli import parse_data, run
from medfast.errors import UsageError, unknown_name


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m medfast.data ...`."""
    arguments = parse_data(argv)
    functions = {"phantom": _phantom, "check": _check, "pack": _pack}
    run(lambda: functions[arguments.command](arguments), "medfast.data")


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
