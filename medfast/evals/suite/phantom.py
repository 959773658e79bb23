"""`python -m medfast.evals.suite.phantom`: the phantom as every data set of the suite."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from medfast.data.phantom.classification import write_classification
from medfast.data.phantom.vqa import write_vqa
from medfast.data.phantom.write import write_phantom
from medfast.errors import UsageError
from medfast.evals.suite import EVALUATIONS, folder

PER_CLASS = 20
PAIRS = 600
IMAGES = 120


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m medfast.evals.suite.phantom ...`."""
    from medfast.cli import Parser, run

    parser = Parser(
        prog="medfast.evals.suite.phantom",
        description="Write small phantoms in the layouts of all 25 data sets of the suite.",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="A new folder.")
    given = parser.parse_args(argv)
    run(lambda: write_suite(given.out), "medfast.evals.suite.phantom")


def write_suite(out: Path) -> None:
    """Write small phantoms in the layouts of all 25 data sets, for `medfast evaluate --data-root`.

    Args:
        out: The folder to make, with a folder for each data set. It is written beside and renamed,
            so that one that is there is whole.

    Raises:
        UsageError: it exists, or a package that a layout needs is missing.
    """
    if out.exists():
        raise UsageError(f"--out {out} must be a new folder; it exists. Name another.")
    beside = out.with_name(f"{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    for key, kind in EVALUATIONS.items():
        place = beside / folder(key)
        if kind == "classification":
            write_classification(place, key, per_class=PER_CLASS)
        elif kind == "retrieval":
            write_phantom(place, layout=key, pairs=PAIRS, seed=1)
        else:
            write_vqa(place, layout=key, images=IMAGES, seed=1)
    beside.rename(out)


if __name__ == "__main__":
    main()
