"""ROCO: radiology figures of PubMed Central with their captions, in the three layouts in use."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from medfast.data.pairs import pairs
from medfast.data.records import Record, clean_caption
from medfast.data.skipped import Skipped
from medfast.data.sources import About, missing
from medfast.data.tables import lines, rows

ABOUT = About(
    key="roco",
    title="ROCO: Radiology Objects in COntext",
    licence="the licence of each article, mostly Creative Commons",
    access="Get ROCO with the scripts of its authors, github.com/razorx89/roco-dataset",
    citation="Pelka et al. 2018, Radiology Objects in COntext (ROCO): A Multimodal Image Dataset, "
    "LABELS at MICCAI",
)

# The word for a split in the names of Kaggle's CSV files.
_SHORT = {"train": "train", "validation": "val", "test": "test"}
_ID = re.compile(r"[A-Za-z]+_\d+")
_ARTICLE = re.compile(r"PMC\d+")

# Of a pair's id: its article, and the name of its image in the article's archive.
_Links = dict[str, tuple[str | None, str]]


def read(root: Path, split: str) -> Iterator[Record | Skipped]:
    """Yield the radiology pairs of one split.

    The origin of a pair is its article, which `dlinks.txt` or `licences.txt` beside the captions
    names, or else the name of the image.

    Args:
        root: Folder that holds ROCO in one of its layouts: the original one
            (`train/radiology/captions.txt`), Kaggle's (`train/radiology/traindata.csv`) or JSON
            lines (`radiologytrain_dataset.json`).
        split: "train", "validation" or "test".

    Raises:
        UsageError: no layout is recognised, a column is missing, or there is no pair.
    """
    folder = root / split / "radiology"
    layouts: dict[Path, Callable[[Path], Iterator[Record | Skipped]]] = {
        folder / "captions.txt": _read_captions,
        folder / f"{_SHORT[split]}data.csv": _read_csv,
        folder / f"radiology{_SHORT[split]}data.csv": _read_csv,
        root / f"radiology{split}_dataset.json": _read_json_lines,
    }
    found = next((path for path in layouts if path.is_file()), None)
    if found is None:
        raise missing(ABOUT, root, [str(path.relative_to(root)) for path in layouts])
    yield from pairs(layouts[found](found), f"roco: {found}", split, root)


def _read_captions(path: Path) -> Iterator[Record | Skipped]:
    """Yield the pairs of `ID<TAB> caption` lines; a line without an id continues its caption."""
    links = _read_links(path.parent)
    images = path.parent / "images"
    names = frozenset(os.listdir(images)) if images.is_dir() else frozenset()

    def record(key: str, caption: str) -> Record:
        image = images / _image_name(key, links, names)
        return _record(key, image, caption, links)

    key = ""
    caption: list[str] = []
    for number, line in enumerate(lines(path), 1):
        head, tab, rest = line.partition("\t")
        if tab and _ID.fullmatch(head):
            if key:
                yield record(key, " ".join(caption))
            key, caption = head, [rest]
        elif key:
            caption.append(line)
        elif line.strip():
            yield Skipped(
                f"line {number}",
                str(path),
                f"it must be an id, a tab and a caption; got {line.strip()[:60]!r}",
            )
    if key:
        yield record(key, " ".join(caption))


def _read_csv(path: Path) -> Iterator[Record | Skipped]:
    links = _read_links(path.parent)
    for row in rows(path, ("id", "name", "caption")):
        if isinstance(row, Skipped):
            yield row
            continue
        line, cells = row
        name = cells["name"]
        if name is None:
            yield Skipped(cells["id"] or line, str(path), "it has no image name")
        else:
            key = cells["id"] or name
            yield _record(key, path.parent / "images" / name, cells["caption"], links)


def _read_json_lines(path: Path) -> Iterator[Record | Skipped]:
    for row in rows(path, ("image_path", "caption")):
        if isinstance(row, Skipped):
            yield row
            continue
        line, cells = row
        image = cells["image_path"]
        if image is None:
            yield Skipped(line, str(path), "its image_path is empty")
        else:
            yield _record(image, path.parent / image, cells["caption"], {})


def _record(key: str, image: Path, caption: str | None, links: _Links) -> Record:
    article, _ = links.get(key, (None, ""))
    if article is None:
        article = _article(image.name)
    return Record(
        key=key,
        image=image,
        caption=clean_caption(caption or ""),
        origin=None if article is None else f"article {article}",
    )


def _read_links(folder: Path) -> _Links:
    """Return what `dlinks.txt` says of each id, or without it the list of licences."""
    for name in ("dlinks.txt", "licences.txt"):
        path = folder / name
        if path.is_file():
            # "ID <tab> command with the archive's address <tab> name", "ID,PMC..._name,licence".
            parts = (re.split(r"\t" if name == "dlinks.txt" else ",", line) for line in lines(path))
            return {
                part[0]: (
                    _article("\t".join(part)),
                    part[-1 if name == "dlinks.txt" else 1].strip(),
                )
                for part in parts
                if len(part) > 1
            }
    return {}


def _image_name(key: str, links: _Links, names: frozenset[str]) -> str:
    """Return the name of an image file: by its id, or as the authors' script names it."""
    own = f"{key}.jpg"
    if own in names or key not in links:
        return own
    article, name = links[key]
    return next((n for n in (f"{article}_{name}", name) if n in names), own)


def _article(text: str) -> str | None:
    match = _ARTICLE.search(text)
    return match[0] if match else None
