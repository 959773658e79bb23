"""Heat maps of shares: every value coloured by how far it is from chance to perfect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from medfast.report.table import Cell, table, words


class Share(NamedTuple):
    """A value between 0 and 1, and the value of guessing; NaN where they are not known."""

    value: float
    chance: float

    @property
    def strength(self) -> float:
        """How far the value is from chance (0) to perfect (1); NaN where chance is perfect."""
        # Guessing that is not known is taken for 0.
        chance = 0.0 if math.isnan(self.chance) else self.chance
        return (self.value - chance) / (1 - chance) if chance < 1 else math.nan


MISSING = Share(math.nan, math.nan)


def draw_heat_map(
    path: Path,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    shares: Sequence[Sequence[Share]],
    title: str,
) -> None:
    """Draw a heat map as a PNG file, of values in percent.

    Args:
        path: The file.
        rows: Their names, from top to bottom.
        columns: Their names.
        shares: The values of each row.
        title: What stands above.
    """
    import numpy as np
    from matplotlib.figure import Figure

    colours = np.array([[share.strength for share in row] for row in shares])
    # A figure of its own, without pyplot: the caller's figures and backend stay as they are.
    size = 4.5 + 1.1 * len(columns), 1.6 + 0.26 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(colours, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    for (row, column), strength in np.ndenumerate(colours):
        value = shares[row][column].value
        if not math.isnan(value):
            # Where there is no colour, the paper is white.
            colour = "white" if strength <= 1 / 2 else "black"
            words = f"{100 * value:.1f}"
            axes.text(column, row, words, ha="center", va="center", color=colour, fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image).set_label("chance (0) to perfect (1)", fontsize=8)
    # Without the version of matplotlib, so that equal results are equal files.
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def heat_table(
    label: str,
    corner: str,
    rows: Sequence[tuple[str, Sequence[Share]]],
    columns: Sequence[str],
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """Return a heat map as a table in HTML, of values in percent.

    Args:
        label: What it holds, for those who cannot see it.
        corner: What the rows are.
        rows: Name and values of each.
        columns: Their names.
        groups: Names over several columns each, and over how many.
    """
    over = [("", 1), *groups] if groups else ()
    lines = ([words(name), *map(_cell, values)] for name, values in rows)
    return table(label, (corner, *columns), lines, kind="heat", groups=over)


def _cell(share: Share) -> Cell:
    if math.isnan(share.value):
        return Cell("\u2013", math.nan)
    strength = share.strength
    colour = "" if math.isnan(strength) else f'style="--s:{min(1.0, max(0.0, strength)):.3f}"'
    return Cell(f"{100 * share.value:.1f}", share.value, colour)
