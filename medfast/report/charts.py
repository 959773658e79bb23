"""Line charts as inline SVG whose colours are the style sheet's, so that they follow its scheme."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from medfast.report.text import text

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


def line_chart(lines: Sequence[Line], *, alt: str, until: float, percent: bool = False) -> str:
    """Return `lines` over the training step as an `<svg>` element.

    Args:
        lines: What to draw, later lines on top.
        alt: What a reader who cannot see the chart is told; different for each chart of a page.
        until: Last step of the axis, so that charts side by side line up.
        percent: Whether the values are shares, to be shown in percent from 0.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    # The salt keeps the ids of two charts on one page apart, and makes them the same every time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": text(alt), "font.size": 9}):
        # A figure of its own, without pyplot: the caller's figures and backend stay as they are.
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes = figure.add_subplot()
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
        axes.tick_params(length=0, labelcolor=_PLACEHOLDERS["muted"])
        axes.grid(axis="y", color=_PLACEHOLDERS["line"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(_PLACEHOLDERS["line"])
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return _as_element(buffer.getvalue(), alt)


def legend_key(line: Line) -> str:
    """Return a short sample of `line` as an `<svg>` element, to stand before its name."""
    dashes = " ".join(f"{length * line.width:g}" for length in _DASHES[line.dash])
    return (
        '<svg class="key" viewBox="0 0 24 8" aria-hidden="true"><line x1="0" y1="4" x2="24" y2="4"'
        f' stroke="var(--{line.colour})" stroke-width="{line.width}"'
        f' stroke-dasharray="{dashes or "none"}"/></svg>'
    )


def _as_element(document: str, alt: str) -> str:
    """Return matplotlib's SVG document as an element of an HTML page."""
    _, view_box, body = re.split(r'viewBox="([^"]*)"[^>]*>', document, maxsplit=1)
    # Its style sheet would hold for the whole page and its groups have the same ids in every chart.
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    for name, placeholder in _PLACEHOLDERS.items():
        body = body.replace(placeholder, f"var(--{name})")
    return f'<svg viewBox="{view_box}" role="img" aria-label="{text(alt)}">{body.strip()}'
