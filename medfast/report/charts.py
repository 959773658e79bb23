"""Charts as inline SVG whose colours are the style sheet's, so that they follow its scheme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from medfast.report.text import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES_COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")
"""Colours of the style sheet that tell one line from another."""

# matplotlib only knows fixed colours. Each colour of the style sheet is drawn in a placeholder that
# nothing else on the chart has, and the placeholder is then replaced by `var(--name)`.
_PLACEHOLDERS = {
    name: f"#0000{index:02x}"
    for index, name in enumerate(("ink", "muted", "line", *SERIES_COLOURS), start=1)
}

# On and off lengths in units of the line width.
_DASHES: dict[str, tuple[float, ...]] = {
    "solid": (),
    "dashed": (4, 2),
    "dotted": (1, 3),
    "dashdot": (5, 2, 1, 2),
}


@dataclass(frozen=True)
class Line:
    """A line of a chart; NaN values leave gaps. Without points it is a line of the legend alone."""

    name: str
    colour: str
    dash: str = "solid"
    width: float = 1.5
    x: Sequence[float] = ()
    y: Sequence[float] = ()


class Interval(NamedTuple):
    """A value with its interval, whose ends are NaN where there is none."""

    colour: str
    value: float
    low: float
    high: float


def line_chart(lines: Sequence[Line], *, alt: str, until: float, percent: bool = False) -> str:
    """Return `lines` over the training step as an `<svg>` element.

    Args:
        lines: What to draw, later lines on top.
        alt: What a reader who cannot see the chart is told; different for each chart of a page.
        until: Last step of the axis, so that charts side by side line up.
        percent: Whether the values are shares, to be shown in percent from 0.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    with _axes(alt, height=2.9) as (figure, axes):
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                color=_PLACEHOLDERS[line.colour],
                linewidth=line.width,
                linestyle=(0, _DASHES[line.dash]) if _DASHES[line.dash] else "solid",
                # A single point has no line at all.
                marker="o" if len(line.x) <= 30 and line.dash != "dotted" else "",
                markersize=line.width + 1.5,
                clip_on=False,
            )
        axes.set_xlabel("step", color=_PLACEHOLDERS["muted"])
        axes.set_xlim(0, max(until, 1))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if percent:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol="\u00a0%"))
        axes.grid(axis="y", color=_PLACEHOLDERS["line"], linewidth=0.8)
        axes.spines["bottom"].set_color(_PLACEHOLDERS["line"])
        return _as_element(figure, alt)


def interval_chart(rows: Sequence[tuple[str, Sequence[Interval]]], *, alt: str, unit: str) -> str:
    """Return values with their intervals, around a line at 0, as an `<svg>` element.

    Args:
        rows: Name and values of each, from top to bottom; a value without an interval is a ring.
        alt: As of `line_chart`.
        unit: What the axis says.
    """
    places = [place for _, values in rows for place in values]
    with _axes(alt, height=0.7 + 0.12 * len(rows) + 0.13 * len(places)) as (figure, axes):
        axes.axvline(0, color=_PLACEHOLDERS["muted"], linewidth=0.8)
        top, middles = 0.0, []
        for _, values in rows:
            middles.append(top + (len(values) - 1) / 2)
            for offset, (colour, value, low, high) in enumerate(values):
                ink, y = _PLACEHOLDERS[colour], top + offset
                sure = not math.isnan(high - low)
                if sure:
                    axes.plot([low, high], [y, y], color=ink, linewidth=2, solid_capstyle="round")
                face = ink if sure else "none"
                axes.plot(value, y, "o", color=ink, markerfacecolor=face, markersize=4.5)
            top += len(values) + 0.9
        axes.margins(x=0.08)
        axes.set_ylim(top - 0.9, -1)
        axes.set_yticks(middles, [name for name, _ in rows])
        axes.set_xlabel(unit, color=_PLACEHOLDERS["muted"])
        axes.grid(axis="x", color=_PLACEHOLDERS["line"], linewidth=0.8)
        axes.spines["bottom"].set_visible(False)
        return _as_element(figure, alt)


@contextmanager
def _axes(alt: str, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Give a figure as wide as a phone's page, and its axes, plain but for their labels."""
    import matplotlib
    from matplotlib.figure import Figure

    # The salt keeps the ids of two charts on one page apart, and makes them the same every time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": text(alt), "font.size": 9}):
        # A figure of its own, without pyplot: the caller's figures and backend stay as they are.
        figure = Figure(figsize=(4.8, height), layout="constrained")
        axes = figure.add_subplot()
        axes.tick_params(length=0, labelcolor=_PLACEHOLDERS["muted"])
        axes.set_axisbelow(True)
        axes.spines[["top", "left", "right"]].set_visible(False)
        yield figure, axes


def chart(svg: str, *, legend: Sequence[tuple[Line, str]], caption: str) -> str:
    """Return a drawing with its legend above and its caption below.

    Args:
        svg: The drawing.
        legend: Samples of its lines, and what is written in bold behind the name of each.
        caption: As plain text.
    """
    keys = "".join(
        f"<li>{_key(line)}{text(line.name)} <b>{text(value)}</b></li>" for line, value in legend
    )
    return (
        f'<figure><ul class="legend">{keys}</ul>{svg}'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def _key(line: Line) -> str:
    """Return a short sample of `line` as an `<svg>` element, to stand before its name."""
    dashes = " ".join(f"{length * line.width:g}" for length in _DASHES[line.dash])
    return (
        '<svg class="key" viewBox="0 0 24 8" aria-hidden="true"><line x1="0" y1="4" x2="24" y2="4"'
        f' stroke="var(--{line.colour})" stroke-width="{line.width}"'
        f' stroke-dasharray="{dashes or "none"}"/></svg>'
    )


def _as_element(figure: Figure, alt: str) -> str:
    """Return matplotlib's drawing as an element of an HTML page."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    _, view_box, body = re.split(r'viewBox="([^"]*)"[^>]*>', buffer.getvalue(), maxsplit=1)
    # Its style sheet would hold for the whole page and its groups have the same ids in every chart.
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    for name, placeholder in _PLACEHOLDERS.items():
        body = body.replace(placeholder, f"var(--{name})")
    return f'<svg viewBox="{view_box}" role="img" aria-label="{text(alt)}">{body.strip()}'
