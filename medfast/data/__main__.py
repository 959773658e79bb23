"""`python -m medfast.data`: write the phantom data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from medfast.cli import Parser, run


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m medfast.data ...`."""
    parser = Parser(prog="medfast.data", description="Prepare image-caption data.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    phantom = commands.add_parser(
        "phantom", help="Write generated, medical-like images with captions in a set's layout."
    )
    phantom.add_argument("--layout", default="roco", help="Layout to write (default: roco).")
    phantom.add_argument("--out", required=True, type=Path, metavar="DIR", help="A new folder.")
    phantom.add_argument("--pairs", default=6000, type=int, metavar="N", help="(default: 6000)")
    phantom.add_argument("--seed", default=0, type=int, metavar="S", help="(default: 0)")
    arguments = parser.parse_args(argv)
    run(
        lambda: _phantom(arguments.layout, arguments.out, arguments.pairs, arguments.seed),
        "medfast.data",
    )


def _phantom(layout: str, out: Path, pairs: int, seed: int) -> None:
    from tqdm import tqdm

    from medfast.data.phantom import write_phantom

    with tqdm(total=pairs, unit="image", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.update(done - bar.n)

        write_phantom(out, layout=layout, pairs=pairs, seed=seed, progress=progress)
    print(f"{pairs} pairs in {out}; train on them with --train-data {layout}:{out}")


if __name__ == "__main__":
    main()
