"""What a check of data sets shows: the table, the page, the histograms and the contact sheet."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from medfast.data.decode import ImageError, decode
from medfast.data.records import Record

PICTURES = 24

# Columns of the table of splits, beside source and split.
_COUNTS = ("pairs", "bad_rows", "missing", "unreadable", "empty_captions", "studies", "origins")


def summary(report: dict[str, Any]) -> str:
    """Return the table of a check, and its verdict, as text for a terminal."""
    columns = ("source", "split", *_COUNTS)
    rows = [[_shown(split, column) for column in columns] for split in report["splits"]]
    titles = [column.replace("_", " ") for column in columns]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = [
        "  ".join(
            # Names to the left, numbers to the right.
            word.ljust(width) if number < 2 else word.rjust(width)
            for number, (word, width) in enumerate(zip(words, widths, strict=True))
        ).rstrip()
        for words in [titles, *rows]
    ]
    return "\n".join([*lines, "", *report["notes"], report["verdict"]])


def _shown(split: dict[str, Any], column: str) -> str:
    value = split[column]
    return f"{value:,}" if isinstance(value, int) else str(value)


def as_markdown(report: dict[str, Any]) -> str:
    """Return what a check found as a page of Markdown."""
    lines = ["# Check", "", report["verdict"], "", *(f"- {note}" for note in report["notes"])]
    lines += ["", "## Splits", ""]
    lines += _table(("source", "split", *_COUNTS), report["splits"])
    lines += ["", "## Captions and images", ""]
    lines += _table(
        ("source", "split", "shortest", "median", "longest", "smallest", "middle", "largest"),
        [
            {
                "source": split["source"],
                "split": split["split"],
                **dict(zip(("shortest", "median", "longest"), _three(split["words"]), strict=True)),
                **dict(
                    zip(("smallest", "middle", "largest"), _three(split["short_side"]), strict=True)
                ),
            }
            for split in report["splits"]
        ],
    )
    lines += ["", "Captions in words, images by their short side in pixels; see histograms.png."]
    lines += ["", "## Duplicates", ""]
    counts = ("groups", "within_a_split", "groups_across_splits", "groups_across_sources")
    rows = [{"equal": name, **found} for name, found in report["duplicates"].items()]
    lines += _table(("equal", *counts), rows)
    for name, found in report["duplicates"].items():
        lines += ["", f"Equal {name}, the first groups:", ""] if found["examples"] else []
        lines += [f"- {' = '.join(group)}" for group in found["examples"]]
    near = report["near_identical"]
    lines += ["", "## Images that look alike", ""]
    lines += [
        f"{near['pairs']} pairs of images look alike without being the same pixels, "
        f"{near['across_splits']} of them across splits. They are not excluded.",
        "",
        *(f"- {a} ~ {b}" for a, b in near["listed"]),
    ]
    lines += ["", "## Overlap of training with held-out splits", ""]
    lines += [f"- {reason}: {count}" for reason, count in report["overlap"].items()] or ["None."]
    return "\n".join(lines) + "\n"


def _three(spread: dict[str, Any]) -> tuple[Any, Any, Any]:
    return spread["min"], spread["median"], spread["max"]


def _table(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> list[str]:
    lines = [
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    for row in rows:
        # A bar would end the cell.
        cells = [_shown(row, column).replace("|", "\\|") for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def contact_sheet(path: Path, sources: Mapping[str, Sequence[Record]], seed: int) -> None:
    """Draw up to 24 images with the beginnings of their captions, as many of each source.

    Args:
        path: The PNG file to write; none is written where there is nothing to show.
        sources: The records of each source whose images can be decoded.
        seed: Decides which of them are shown.

    Raises:
        OSError: the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    rng = random.Random(seed)
    share = max(1, PICTURES // max(len(sources), 1))
    chosen = [r for rows in sources.values() for r in rng.sample(rows, min(len(rows), share))]
    chosen = chosen[:PICTURES]
    if not chosen:
        return
    side, text, gap, letters = 200, 48, 8, 34
    columns = min(6, len(chosen))
    rows = -(-len(chosen) // columns)
    size = (columns * (side + gap) + gap, rows * (side + text + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for number, record in enumerate(chosen):
        left = gap + number % columns * (side + gap)
        top = gap + number // columns * (side + text + gap)
        # The file may have gone since it was checked.
        with suppress(OSError, ImageError):
            image = ImageOps.contain(decode(record.read()), (side, side))
            sheet.paste(image, (left + (side - image.width) // 2, top))
        lines = textwrap.wrap(record.caption, letters, max_lines=3, placeholder=" ...")
        draw.multiline_text((left, top + side + 2), "\n".join(lines), fill="black", font=font)
    sheet.save(path)


def histograms(
    path: Path, words: Mapping[str, Sequence[int]], sides: Mapping[str, Sequence[int]]
) -> None:
    """Draw how long the captions and how large the images of each source are.

    Args:
        path: The PNG file to write.
        words: Words of every caption.
        sides: Short side of every image, in pixels.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    # A figure of its own, without pyplot, needs no display.
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = {"words of the caption": words, "short side of the image in pixels": sides}
    for axes, (title, sources) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name, values in sources.items():
            if values:
                step = 1 + (max(values) - min(values)) // 50
                edges = range(min(values), max(values) + step + 1, step)
                axes.hist(values, bins=list(edges), histtype="step", label=name)
        axes.set(xlabel=title, ylabel="pairs")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)
