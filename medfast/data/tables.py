"""Rows of caption tables: CSV, TSV, JSON lines and Parquet, the text formats also as .gz."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from numbers import Number
from pathlib import Path, PurePath
from typing import Any

from medfast.data.skipped import Skipped
from medfast.errors import UsageError

Cells = dict[str, str | None]

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}

# What programs write where there is no value.
_NOTHING = frozenset({"", "nan", "NaN", "None", "null"})
# The most that csv takes on every system.
_LONGEST_CELL = 2**31 - 1
_BATCH_ROWS = 1024


def rows(
    path: Path,
    columns: Sequence[str],
    optional: Sequence[str] = (),
    separator: str | None = None,
) -> Iterator[tuple[str, Cells] | Skipped]:
    """Yield the name of each row ("line 17") and its cells, or why it cannot be read.

    Cells are text without white space around it; None stands for what is empty, missing or not a
    number. A row with a cell that is neither text nor a number is bad, as is one of CSV whose lines
    look like several rows that a stray quotation mark joins. Parquet is read in batches, the other
    formats line by line.

    Args:
        path: The table; its name tells the format.
        columns: Columns that must be there. Each line of JSON must have them, if only as null.
        optional: Columns to read where they are there.
        separator: Between the cells of a line; None for a tab in .tsv files and wherever the header
            holds one, else a comma.

    Raises:
        UsageError: the file cannot be read, is not UTF-8 text, or lacks a column or has it twice.
    """
    reader = {"csv": _csv_rows, "json": _json_rows, "parquet": _parquet_rows}[_format(path)]
    for name, values in reader(path, columns, optional, separator):
        row = values if isinstance(values, str) else _cells(values)
        yield Skipped(name, str(path), row) if isinstance(row, str) else (name, row)


def column_names(path: Path, separator: str | None = None) -> list[str]:
    """Return the columns of a table: of the header, or of all its JSON objects.

    Raises:
        UsageError: the file cannot be read, is not UTF-8 text, or holds no JSON object.
    """
    kind = _format(path)
    if kind == "parquet":
        return list(_parquet(path).schema_arrow.names)
    if kind == "csv":
        return _header(path, lines(path, newline=""), separator)[0]
    found = (_json_object(line) for line in lines(path))
    names = list(dict.fromkeys(name for row in found if isinstance(row, dict) for name in row))
    if not names:
        raise UsageError(
            f"{path} must hold a JSON object with the names of columns on each line; no line is "
            "one. Write an array as lines, without brackets and commas between them."
        )
    return names


def lines(path: Path, newline: str = "\n") -> Iterator[str]:
    """Yield the lines of a UTF-8 text, which may be a .gz file, without a mark of byte order.

    Args:
        path: The file.
        newline: What ends a line, as `open` takes it.

    Raises:
        UsageError: the file cannot be read or is not UTF-8 text.
    """
    # To open a named pipe would wait for ever.
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} must be a plain file; write it as one.")
    try:
        opened: Any = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None


def missing_column(path: Path, wanted: Sequence[str], columns: Sequence[str]) -> UsageError:
    """Return the error for a column that is not there, under none of its names."""
    names = " or ".join(map(repr, wanted))
    return UsageError(
        f"{path} has no column {names}; its columns are: {', '.join(columns) or 'none'}."
    )


def _format(path: Path) -> str:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    kind = FORMATS.get(suffix, "")
    if not kind or (kind == "parquet" and path.suffix == ".gz"):
        raise UsageError(
            f"{path} must be a table whose name ends in one of {', '.join(FORMATS)}, or for text "
            "in one of them and .gz; rename or convert it."
        )
    return kind


def _unreadable(path: Path, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or error
    return UsageError(f"{path} cannot be read ({reason}); get a whole copy of it.")


def _header(path: Path, text: Iterator[str], separator: str | None) -> tuple[list[str], str]:
    """Return the names in the first line, which is taken from `text`, and the separator."""
    line = next(text, "")
    if separator is None:
        suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
        separator = "\t" if suffix in (".tsv", ".tab") or "\t" in line else ","
    if "\0" in line:
        raise UsageError(f"{path} has a zero byte in its first line, so that it is no text.")
    names: list[str] = next(_csv_reader([line], separator), [])
    return [name.strip() for name in names], separator


def _csv_reader(text: Iterable[str], separator: str, strict: bool = False) -> Any:
    csv.field_size_limit(_LONGEST_CELL)
    return csv.reader(text, delimiter=separator, strict=strict)


def _wanted(
    path: Path, present: Sequence[str], columns: Sequence[str], optional: Sequence[str]
) -> dict[str, int]:
    """Return the columns to read, and which they are."""
    for column in columns:
        if column not in present:
            raise missing_column(path, [column], present)
    wanted = [name for name in (*columns, *optional) if name in present]
    twice = [name for name in wanted if present.count(name) > 1]
    if twice:
        raise UsageError(
            f"{path} has {present.count(twice[0])} columns {twice[0]!r}; leave one, or rename the "
            "others."
        )
    return {name: present.index(name) for name in wanted}


def _csv_rows(
    path: Path, columns: Sequence[str], optional: Sequence[str], separator: str | None
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    text = lines(path, newline="")
    header, separator = _header(path, text, separator)
    places = _wanted(path, header, columns, optional)
    ended = False
    raw: list[str] = []

    def to_the_end() -> Iterator[str]:
        nonlocal ended
        for line in text:
            raw.append(line)
            yield line
        ended = True

    reader = _csv_reader(to_the_end(), separator)
    while True:
        name = f"line {reader.line_num + 2}"
        raw.clear()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield name, f"the row cannot be read ({error})"
            continue
        if ended:
            # The reader asked for more lines, as it was still within a cell.
            yield name, "a quotation mark is opened and never closed, up to the end of the file"
        elif len(raw) > 1 and _are_rows(raw, header, [places[c] for c in columns], separator):
            last = f"line {reader.line_num + 1}"
            yield name, f"a stray quotation mark joins it with the rows up to {last}"
        elif len(row) == len(header):
            yield name, {column: row[place] for column, place in places.items()}
        elif row:
            yield name, f"the row must have {len(header)} cells, as the header has; got {len(row)}"


def _are_rows(
    raw: Sequence[str], header: Sequence[str], places: Sequence[int], separator: str
) -> bool:
    """Return whether the lines of one row look like rows that a stray quotation mark joins.

    They do where the marks do not pair up, and where each line has the cells of a row, with a file
    name of the same kind as the first one's: what goes on in a quoted cell has neither.
    """
    try:
        list(_csv_reader(raw, separator, strict=True))
    except csv.Error:
        return True
    found = [line.rstrip("\r\n").split(separator) for line in raw if line.strip()]
    if any(len(cells) != len(header) for cells in found):
        return False
    kinds = ([PurePath(cells[place].strip(' "')).suffix for cells in found] for place in places)
    return any(all(kind == own[0] for kind in own) for own in kinds if own[0])


def _json_rows(
    path: Path, columns: Sequence[str], optional: Sequence[str], separator: str | None
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        row = _json_object(line)
        if isinstance(row, dict):
            lacking = [repr(column) for column in columns if column not in row]
            if lacking:
                row = f"the JSON object has no {' and no '.join(lacking)}"
            else:
                row = {name: row[name] for name in (*columns, *optional) if name in row}
        yield f"line {number}", row


def _json_object(line: str) -> dict[str, Any] | str:
    """Return the object in a line of JSON, or what is wrong with the line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"the line is no JSON ({error})"
    return row if isinstance(row, dict) else "the line must be a JSON object"


def _parquet_rows(
    path: Path, columns: Sequence[str], optional: Sequence[str], separator: str | None
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    table = _parquet(path)
    wanted = list(_wanted(path, table.schema_arrow.names, columns, optional))
    number = 0
    try:
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
            for values in batch.to_pylist():
                number += 1
                yield f"row {number}", values
    # pyarrow's own errors are OSErrors and ValueErrors too; Python has no date after the year 9999.
    except (OSError, ValueError, OverflowError) as error:
        raise _unreadable(path, error) from None


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            f"{path} is a Parquet file, which needs pyarrow: pip install pyarrow."
        ) from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _cells(values: dict[str, Any]) -> Cells | str:
    """Return the cells of a row as text, or what is wrong with one of them."""
    cells: Cells = {}
    for column, value in values.items():
        if not isinstance(value, str | Number | None):
            return f"its {column!r} must be text or a number; got {type(value).__name__}"
        # Whole numbers with gaps among them are kept as floats by many programs.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = "" if value is None else str(value).strip()
        if "\0" in text:
            return f"its {column!r} holds a zero byte"
        # JSON can name halves of characters, which no file could be written with.
        text = text if text.isascii() else text.encode(errors="replace").decode()
        cells[column] = None if text in _NOTHING else text
    return cells
