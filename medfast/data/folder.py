"""Pairs of the user's own: a folder of images, each with its caption in a text file beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from medfast.data.pairs import pairs
from medfast.data.records import Record, clean_caption
from medfast.data.shards import IMAGE_SUFFIXES
from medfast.data.skipped import Skipped
from medfast.data.sources import About, few_pairs, hash_split, missing
from medfast.errors import UsageError

ABOUT = About(
    key="folder",
    title="A folder of images and text files",
    licence="whatever licence the images have",
    access="Make a folder of images, each with its caption in a .txt file of the same name",
    citation="that of the images",
)

_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


def read(root: Path, split: str) -> Iterator[Record | Skipped]:
    """Yield the pairs of one split, sorted by their paths.

    The caption of `a/b.jpg` is `a/b.txt`. With a folder `train`, `validation` (or `val`) or `test`
    in `root` such folders are the splits; else 5 % of the pairs are for validation and 5 % for
    test, by a hash of their paths. Links that lead out of `root`, and links to folders, are not
    followed.

    Args:
        root: The folder.
        split: "train", "validation" or "test".

    Raises:
        UsageError: there is no such folder, or the split holds no pair.
    """
    if not root.exists():
        raise missing(ABOUT, root)
    if not root.is_dir():
        raise UsageError(
            f"folder: {root} is a file; name its folder, or use csv:{root} if it fits."
        )
    by_folder = any(_folders(root, name) for name in _FOLDERS)
    tops = _folders(root, split) if by_folder else [root]
    found = (
        item
        for top in tops
        for item in _read(root, top)
        if by_folder or hash_split(item.key.rpartition(".")[0], 0.05, 0.05) == split
    )
    remedy = few_pairs(0.05, 0.05, f"make folders {', '.join(_FOLDERS)} in it")
    if by_folder:
        remedy = f"Put images with their texts into {root / split}."
    yield from pairs(found, f"folder: {root}", split, root, remedy=remedy)


def _folders(root: Path, split: str) -> list[Path]:
    paths = (root / name for name in _FOLDERS[split])
    return [path for path in paths if path.is_dir() and not path.is_symlink()]


def _read(root: Path, top: Path) -> Iterator[Record | Skipped]:
    real_root = root.resolve()
    for folder, inner, names in os.walk(top, onerror=_refuse):
        inner.sort()
        for name in sorted(names):
            stem, dot, suffix = name.rpartition(".")
            if dot and suffix.lower() in IMAGE_SUFFIXES:
                image = Path(folder, name)
                yield _pair(image.relative_to(root).as_posix(), image, stem, real_root)


def _refuse(error: OSError) -> None:
    # A folder that may not be listed would else be an empty one.
    raise error


def _pair(key: str, image: Path, stem: str, root: Path) -> Record | Skipped:
    text = image.with_name(f"{stem}.txt")
    for path in (image, text):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            return Skipped(key, str(path), "it is a link that leads out of the folder")
    if not text.exists():
        return Skipped(key, str(image), f"there is no {text.name} beside it")
    # To open a named pipe would wait for ever.
    if not text.is_file():
        return Skipped(key, str(text), "the caption is no plain file")
    try:
        caption = text.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return Skipped(key, str(text), f"the caption cannot be read ({error})")
    return Record(key=key, image=image, caption=clean_caption(caption))
