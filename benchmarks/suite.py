"""`python -m benchmarks.suite`: all 25 evaluations, offline, on phantoms in their layouts.

A model is trained for a minute or two, the phantom writes every data set, and `medfast evaluate`
must give all 48 results. The figures say nothing of medicine; that all of it runs is the point.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from medfast.evals.suite import cells
from medfast.evals.suite.phantom import write_suite

TRAINING = ("--phantom-pairs", "1000", "--epochs", "5", "--force-image-size", "64")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the suite and print its tables and what it took."""
    parser = argparse.ArgumentParser(prog="benchmarks.suite", description=__doc__)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/suite"),
        help="Where everything goes; what is there is not done again (default: %(default)s)",
    )
    base = parser.parse_args(argv).folder
    data, logs = base / "data", base / "logs"
    started = time.perf_counter()
    if not data.exists():
        write_suite(data)
    print(f"the data are there after {time.perf_counter() - started:.0f} s", flush=True)
    if not (logs / "suite" / "report.html").exists():
        shutil.rmtree(logs, ignore_errors=True)
        _medfast("train", "--logs", str(logs), "--name", "suite", *TRAINING)
    print(f"the model is there after {time.perf_counter() - started:.0f} s", flush=True)
    _medfast(
        *("evaluate", "--checkpoint", str(logs / "suite"), "--suite", "medical25"),
        *("--data-root", str(data), "--cache-dir", str(base / "cache"), "--skip-existing"),
    )
    results = logs / "suite" / "evaluations"
    lacking = [f"{key} {task}" for key, task in cells() if not _json(results, key, task).exists()]
    if lacking:
        sys.exit(f"{len(lacking)} results are missing: {', '.join(lacking)}.")
    print((results / "results.md").read_text(encoding="utf-8"))
    print(f"{len(cells())} results after {time.perf_counter() - started:.0f} s: {results}")


def _json(results: Path, key: str, task: str) -> Path:
    return results / f"{key}.{task}.json"


def _medfast(command: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"medfast.{command}", *arguments], check=True)


if __name__ == "__main__":
    main()
