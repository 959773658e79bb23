"""PMC-OA: 1.65 million figures and subfigures of PubMed Central's open access articles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from medfast.data.pairs import pairs
from medfast.data.records import Record, clean_caption
from medfast.data.skipped import Skipped
from medfast.data.sources import About, few_pairs, hash_split, missing
from medfast.data.tables import rows

ABOUT = About(
    key="pmc_oa",
    title="PMC-OA",
    licence="the licence of each article of PubMed Central's open access subset",
    access="Get PMC-OA from Hugging Face, axiong/pmc_oa, and unpack its images",
    citation="Lin et al. 2023, PMC-CLIP: Contrastive Language-Image Pre-training using Biomedical "
    "Documents, MICCAI",
)

_STEMS = {
    "train": ("train",),
    "validation": ("valid", "val", "validation"),
    "test": ("test",),
}
_WHOLE = ("pmc_oa.jsonl", "pmc_oa_beta.jsonl")
_SUBFIGURES = "caption_T060_filtered_top4_sep_v0_subfigures"
_ARTICLE = re.compile(r"PMC\d+")


def read(root: Path, split: str) -> Iterator[Record | Skipped]:
    """Yield the pairs of one split.

    The origin of a pair is its article, as the name of the image says. Where there is one file for
    all splits, 10 % of the articles are for validation and 10 % for test, by a hash of their ids.

    Args:
        root: Folder with `{train,valid,test}.jsonl` or `.csv`, or with the single `pmc_oa.jsonl` or
            `pmc_oa_beta.jsonl`; the images lie in `images`, in
            `caption_T060_filtered_top4_sep_v0_subfigures`, in the one within the other, or in
            `root` itself.
        split: "train", "validation" or "test".

    Raises:
        UsageError: there is no caption file, a column is missing, or there is no pair.
    """
    per_split = [f"{stem}.{kind}" for stem in _STEMS[split] for kind in ("jsonl", "csv")]
    table = next((root / name for name in (*per_split, *_WHOLE) if (root / name).is_file()), None)
    if table is None:
        raise missing(ABOUT, root, (*per_split, *_WHOLE))
    folders = (root / "images" / _SUBFIGURES, root / _SUBFIGURES, root / "images", root)
    images = next((folder for folder in folders if folder.is_dir()), root)
    shared = table if table.name in _WHOLE else None
    found = _read(table, images, split if shared else None)
    remedy = few_pairs(0.1, 0.1, f"write a file per split, {per_split[0]}") if shared else ""
    yield from pairs(found, f"pmc_oa: {table}", split, root, shared, remedy)


def _read(table: Path, images: Path, split: str | None) -> Iterator[Record | Skipped]:
    """Yield the pairs of a file, or of one split of it."""
    for row in rows(table, ("image", "caption")):
        if isinstance(row, Skipped):
            yield row
            continue
        line, cells = row
        name = cells["image"]
        if name is None:
            yield Skipped(line, str(table), "it has no image name")
            continue
        match = _ARTICLE.search(name)
        if split is None or hash_split(match[0] if match else name, 0.1, 0.1) == split:
            yield Record(
                key=name,
                image=images / name,
                caption=clean_caption(cells["caption"] or ""),
                origin=f"article {match[0]}" if match else None,
            )
