"""Quilt-1M: histopathology images from videos, articles and the web, with their captions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from medfast.data.pairs import pairs
from medfast.data.records import Record, clean_caption
from medfast.data.skipped import Skipped
from medfast.data.sources import About, few_pairs, hash_split, missing
from medfast.data.tables import rows

ABOUT = About(
    key="quilt",
    title="Quilt-1M",
    licence="given for research, on request",
    access="Ask for Quilt-1M with the form at quilt1m.github.io",
    citation="Ikezogwo et al. 2023, Quilt-1M: One Million Image-Text Pairs for Histopathology, "
    "NeurIPS Datasets and Benchmarks",
)

_TABLES = ("quilt_1M_lookup.csv", "quilt_1M_entries.csv")
_FOLDERS = ("quilt_1m", "images")
# Frames of a video are named after the id that YouTube gives it, which has 11 characters.
_FRAME = re.compile(r"([A-Za-z0-9_-]{11})_image_")


def read(root: Path, split: str) -> Iterator[Record | Skipped]:
    """Yield the pairs of one split.

    Upstream's split "val", on which retrieval is reported, is "test" here; of its "train", 1 % is
    "validation", by a hash of the origin, and the rest is "train". The captions of one image are
    one study. The origin of a frame, `VIDEO_image_*.jpg`, is its video, and that of any other image
    the image itself.

    Args:
        root: Folder with `quilt_1M_lookup.csv` or `quilt_1M_entries.csv`; the images lie in
            `quilt_1m`, in `images`, or in `root` itself.
        split: "train", "validation" or "test".

    Raises:
        UsageError: there is no caption file, a column is missing, or there is no pair.
    """
    table = next((root / name for name in _TABLES if (root / name).is_file()), None)
    if table is None:
        raise missing(ABOUT, root, _TABLES)
    images = next((root / name for name in _FOLDERS if (root / name).is_dir()), root)
    found = _read(table, images, split)
    remedy = ""
    if split == "validation":
        remedy = few_pairs(0.01, 0, "read it as csv, with 'validation' in its column 'split'")
    yield from pairs(found, f"quilt: {table}", split, shared=table, remedy=remedy)


def split_of(upstream: str, image: str) -> str:
    """Return the split of an image, by upstream's split ("train" or "val") and its path."""
    return "test" if upstream == "val" else hash_split(_origin(image), validation=0.01)


def _read(table: Path, images: Path, split: str) -> Iterator[Record | Skipped]:
    for row in rows(table, ("split", "image_path", "caption")):
        if isinstance(row, Skipped):
            yield row
            continue
        line, cells = row
        image = cells["image_path"]
        if image is None:
            yield Skipped(line, str(table), "it has no image_path")
        elif cells["split"] not in ("train", "val"):
            reason = f"its split must be train or val; got {cells['split'] or 'nothing'}"
            yield Skipped(line, str(table), reason)
        elif split_of(cells["split"], image) == split:
            yield Record(
                key=image,
                image=images / image,
                caption=clean_caption(cells["caption"] or ""),
                study=image,
                origin=_origin(image),
            )


def _origin(image: str) -> str:
    match = _FRAME.match(PurePosixPath(image).name)
    return f"video {match[1]}" if match else f"image {image}"
