"""Tables that a reader can sort, by the numbers behind what is shown or by words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from medfast.report.text import text


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        html: What it shows.
        number: What it is sorted by, NaN where there is none; None sorts it by its words. All
            cells of a column have a number, or none of them has.
        attributes: More attributes of its element, as HTML.
    """

    html: str
    number: float | None = None
    attributes: str = ""


def words(value: object) -> Cell:
    """Return a cell of plain text."""
    return Cell(text(value))


def table(
    label: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    kind: str = "results",
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """Return a table in a region of its own, which scrolls where the table is wider than the page.

    Args:
        label: What it holds, for those who cannot see it.
        columns: Their heads, as plain text.
        rows: Their cells; the first one is the row's head.
        kind: Class in the style sheet.
        groups: Heads over several columns each, empty for none, and over how many.
    """
    over = "".join(
        f'<th scope="colgroup" colspan="{n}">{text(name)}</th>'
        if name
        else f'<td colspan="{n}"></td>'
        for name, n in groups
    )
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" role="region" aria-label="{text(label)}" tabindex="0">'
        f'<table class="{kind}"><thead>{f"<tr>{over}</tr>" if groups else ""}<tr>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _cells(row: Sequence[Cell]) -> str:
    return _cell("th", row[0], ' scope="row"') + "".join(_cell("td", cell) for cell in row[1:])


def _cell(tag: str, cell: Cell, scope: str = "") -> str:
    key = ""
    if cell.number is not None:
        key = f' data-sort="{"" if math.isnan(cell.number) else repr(float(cell.number))}"'
    more = f" {cell.attributes}" if cell.attributes else ""
    return f"<{tag}{scope}{key}{more}>{cell.html}</{tag}>"
