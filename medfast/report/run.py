"""The page of one run: its rows and pictures in, one HTML file out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfast.report.curves import curves, last_of_each_step
from medfast.report.page import commands, header, section, write_page
from medfast.report.pictures import LEAST_PEAK, colour_scale, data_uri, overlay, peak, thumbnail
from medfast.report.results import headline, last_of_each_evaluation, result_table
from medfast.report.table import table, words
from medfast.report.text import text

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# Longer side in pixels: about twice what the page shows, for dense screens.
_PICTURE_SIZE = 320
_OVERLAY_SIZE = 176

_TIMES = "\u00d7"


@dataclass(frozen=True)
class AttentionExample:
    """Where each word piece of a caption looks in its image.

    Args:
        image: RGB.
        words: Word pieces as shown to the reader.
        weights: [len(words), H, W], each word's weights summing to 1 over H and W.
    """

    image: Image.Image
    words: Sequence[str]
    weights: np.ndarray


@dataclass(frozen=True)
class ContactExample:
    """A held-out pair.

    Args:
        image: RGB.
        caption: The image's own caption.
        rank: Where retrieval put that caption; 0 = it came first, None = not measured.
    """

    image: Image.Image
    caption: str
    rank: int | None = None


def write_report(
    path: Path,
    *,
    name: str,
    params: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    contact: Sequence[ContactExample] = (),
    attention: Sequence[AttentionExample] = (),
    attention_title: str = "Word-to-patch attention",
    attention_note: str = "",
    note: str = "",
) -> Path:
    """Write one run's report as a single HTML file that requests nothing from outside.

    A figure that is missing or not finite is left out, so a run that stopped early has its report.

    Args:
        path: The file. It is written beside and renamed, so that it is never seen half written.
        name: Name of the run.
        params: The run's settings.
        history: Rows of `metrics.jsonl`. A resumed run repeats steps: the last row of each counts.
        results: Rows of `results.jsonl`. The last row of each evaluation counts.
        contact: Held-out pairs for the contact sheet.
        attention: Held-out images with the attention of every word.
        attention_title: Heading of these; its first word names the section's anchor.
        attention_note: What a weight on a patch is.
        note: What a reader must know before quoting a figure.

    Returns:
        `path`.
    """
    training = last_of_each_step(history, "train")
    validation = last_of_each_step(history, "validation")
    results = last_of_each_evaluation(results)
    return write_page(
        path,
        title=name,
        body=[
            _header(name, params, headline(results, validation), note),
            section("Results", result_table(results)),
            section("Curves", curves(training, validation)),
            section(attention_title, _attention(attention, attention_note)) if attention else "",
            section("Held-out images", _contact(contact)) if contact else "",
            section("Settings and provenance", _settings(params) + _provenance(results)),
            section("Note", f"<p>{text(note)}</p>") if note else "",
        ],
    )


def _header(name: str, params: Mapping[str, Any], summary: str, note: str) -> str:
    facts = {key: str(params[key]) for key in ("method", "model") if params.get(key)}
    see_note = ' <a href="#note">See the note.</a>' if note else ""
    return header(name, f"{text(summary[:1].upper() + summary[1:])}.{see_note}", facts)


def _attention(examples: Sequence[AttentionExample], note: str) -> str:
    strips = "".join(_strip(index, example) for index, example in enumerate(examples, start=1))
    about = f" {text(note)}" if note else ""
    return (
        "<p>Each small picture shows where one word piece of the caption looks, in reading order, "
        "function words too. The number is its peak: the greatest weight on one patch, in "
        "multiples of an even spread. Colours reach up to that peak, but at least up to "
        f"{LEAST_PEAK:g}{_TIMES}: a word that looks everywhere alike stays pale.{about}</p>"
        '<p class="scale quiet">no weight '
        f'<i style="background:linear-gradient(to right, {colour_scale()})"></i> peak</p>'
        f"{strips}"
    )


def _strip(index: int, example: AttentionExample) -> str:
    original = thumbnail(example.image, _PICTURE_SIZE)
    small = thumbnail(example.image, _OVERLAY_SIZE)
    caption = " ".join(example.words)
    tiles = "".join(
        f"<figure>{_img(overlay(small, weights), f'Image {index}: where “{word}” looks')}"
        f'<figcaption dir="auto">{text(word)} <small>{peak(weights):.1f}{_TIMES}</small>'
        "</figcaption></figure>"
        for word, weights in zip(example.words, example.weights, strict=True)
    )
    return (
        f'<div class="strip"><figure class="original">'
        f"{_img(original, f'Image {index}, as it is: {caption}')}"
        f"<figcaption>image {index}</figcaption></figure>{tiles}</div>"
    )


def _contact(examples: Sequence[ContactExample]) -> str:
    ranks = [example.rank for example in examples if example.rank is not None]
    legend = (
        "<p>Rank is the place that retrieval gave to the image's own caption among all held-out "
        f"captions. It came first for {ranks.count(0)} of these {len(ranks)}.</p>"
        if ranks
        else ""
    )
    cards = "".join(_card(index, example) for index, example in enumerate(examples, start=1))
    return f'{legend}<div class="contact">{cards}</div>'


def _card(index: int, example: ContactExample) -> str:
    rank = ""
    if example.rank is not None:
        mark = ' class="rank first"' if example.rank == 0 else ' class="rank"'
        rank = f"<span{mark}>rank {example.rank + 1:,}</span>"
    picture = _img(
        thumbnail(example.image, _PICTURE_SIZE), f"Held-out image {index}: {example.caption[:120]}"
    )
    return (
        f'<figure>{picture}<figcaption>{rank}<p dir="auto">{text(example.caption)}</p>'
        "</figcaption></figure>"
    )


def _img(image: Image.Image, alt: str) -> str:
    return (
        f'<img src="{data_uri(image)}" width="{image.width}" height="{image.height}" '
        f'alt="{text(alt)}">'
    )


def _settings(params: Mapping[str, Any]) -> str:
    if not params:
        return '<p class="empty">No settings were recorded.</p>'
    rows = ((words(key), words(_setting(value))) for key, value in params.items())
    shown = table("Settings", ("Setting", "Value"), rows, kind="settings")
    return f"<details><summary>All {len(params)} settings</summary>{shown}</details>"


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _provenance(results: Sequence[Mapping[str, Any]]) -> str:
    """Return every command and every set of versions that the results name."""
    lines = dict.fromkeys(row["command"] for row in results if row.get("command"))
    versions = dict.fromkeys(
        " · ".join(f"{key} {row[key]}" for key in ("medfast", "torch", "git") if row.get(key))
        for row in results
    )
    not_recorded = '<p class="empty">Not recorded.</p>'
    return f"<h3>Command</h3>{commands(lines) or not_recorded}<h3>Versions</h3>" + (
        "".join(f"<p>{text(line)}</p>" for line in versions if line) or not_recorded
    )
