"""`medfast results`: evaluations of several runs in one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medfast import cli, json_lines
from medfast.errors import UsageError
from medfast.evals import compare as side_by_side
from medfast.evals.compare import Request
from medfast.evals.suite.clip_benchmark import without_names


def main(argv: Sequence[str] | None = None) -> None:
    """Run `medfast results ...`."""

    def command() -> None:
        print(compare(cli.parse_results(argv)), end="")

    cli.run(command, "medfast results")


def compare(request: Request) -> str:
    """Write the files that are asked for, and return the table.

    Raises:
        UsageError: a source holds no results, or a file cannot be written.
    """
    runs = read_runs(request.sources)
    try:
        every = side_by_side.compare(runs)
        some = every.only(request.metrics)
        table = side_by_side.markdown(some)
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"the results of {', '.join(runs)} are not as medfast writes them ({error}); evaluate "
            "again, or leave out the files of other programs."
        ) from None
    if request.csv is not None:
        _write(request.csv, "--csv", lambda path: _put(path, side_by_side.csv_text(every)))
    if request.markdown is not None:
        _write(request.markdown, "--markdown", lambda path: _put(path, table))
    if request.png is not None:
        _write(request.png, "--png", lambda path: side_by_side.heat_map(some, path))
    return table


def read_runs(sources: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Return the result rows of runs by their names.

    A run is named after its folder. Where a folder holds results of several models, each is a run
    of its own; what lies in different folders of one name is told apart by their paths.

    Args:
        sources: Of each, evaluations/*.json and results.jsonl are read, or else its own *.json; a
            file is of the run in whose folder it lies.

    Raises:
        UsageError: a source is missing or damaged, or holds no results.
    """
    by_folder: dict[Path, list[dict[str, Any]]] = {}
    for source in sources:
        rows = [row for file in _files(source) for row in _rows(file)]
        if not rows:
            raise UsageError(
                f"{source} holds no results; name a run folder (with evaluations/ or "
                "results.jsonl), or files that medfast evaluate or medfast train wrote."
            )
        by_folder.setdefault(_run_folder(source), []).extend(rows)
    names = [folder.absolute().name for folder in by_folder]
    runs: dict[str, list[dict[str, Any]]] = {}
    for folder, rows in by_folder.items():
        name = folder.absolute().name
        name = str(folder) if names.count(name) > 1 else name
        several = len({row["model"] for row in rows if row.get("model")}) > 1
        for row in rows:
            model = str(row.get("model") or name)
            runs.setdefault(model if several else name, []).append(row)
    return runs


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UsageError(f"{source}: there is no such run folder or file of results.")
    found = sorted((source / "evaluations").glob("*.json"))
    if (source / "results.jsonl").is_file():
        found.append(source / "results.jsonl")
    return found or sorted(source.glob("*.json"))


def _run_folder(source: Path) -> Path:
    folder = source.parent if source.is_file() else source
    return folder.parent if folder.absolute().name == "evaluations" else folder


def _rows(file: Path) -> list[dict[str, Any]]:
    """Return the results in a file; other JSON is none."""
    if file.suffix not in (".json", ".jsonl"):
        raise UsageError(f"{file}: a file of results is .json or .jsonl; name one, or its run.")
    if file.suffix == ".jsonl":
        found: Any = json_lines.read(file)
    else:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}.") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{file} is damaged ({error}); delete it, and evaluate again."
            ) from None
    rows = found if isinstance(found, list) else [found]
    return [
        without_names(row)
        for row in rows
        if isinstance(row, dict) and isinstance(row.get("metrics"), dict)
    ]


def _put(path: Path, words: str) -> None:
    # Paths, which name runs, need not be UTF-8.
    path.write_text(words, encoding="utf-8", errors="backslashreplace", newline="")


def _write(path: Path, flag: str, write: Callable[[Path], None]) -> None:
    """Write a file beside its place, and move it there."""
    beside = path.with_name(path.name + ".part")
    try:
        write(beside)
        beside.replace(path)
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be written: {error.strerror}.") from None


if __name__ == "__main__":
    main()
