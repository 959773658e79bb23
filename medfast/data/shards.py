"""Shards: tar archives of image, caption and facts (WebDataset) with DALI's index beside each.

A set lies in `ROOT/{train,validation,test}/000000.tar`; a shard holds `KEY.jpg` (or another image),
`KEY.txt` and `KEY.json`, sample after sample. What others wrote works too: `ROOT/*.tar` without
folders of splits, or a single tar file.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from medfast.data import SOURCES, SPLITS
from medfast.data.records import Record, clean_caption
from medfast.data.skipped import Skipped
from medfast.data.sources import About, AbsentError, few_pairs, hash_split
from medfast.errors import UsageError

ABOUT = About(
    key="shards",
    title="Packed shards (WebDataset)",
    licence="the licence of the set that was packed",
    access="Pack a set with python -m medfast.data pack SOURCE --out FOLDER",
    citation="that of the set that was packed",
)
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "png", "tif", "tiff", "webp", "bmp", "gif", "jp2", "j2k"),
    *("dcm", "dicom"),
)
MANIFEST = "pack.json"
BLOCK = 512

_INDEX_VERSION = "v1.2"
# Writers fill the end of an archive up to a record of this size, or of twice that.
_LONGEST_END = 2 * tarfile.RECORDSIZE
_FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_CHUNK = 2**20
_JOINED = "more follows the end of the archive, as where two were joined: pack them again"


class Member(NamedTuple):
    """A file within a shard: its name, and where its bytes are."""

    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """Name of the sample: what stands before the first dot of the file's name."""
        return _split_name(self.name)[0]

    @property
    def extension(self) -> str:
        """What stands after the first dot of the file's name, in small letters."""
        return _split_name(self.name)[1].lower()


def read(root: Path, split: str) -> Iterator[Record | Skipped]:
    """Yield the pairs of one split.

    An image is read later by one seek. Shards that do not lie in folders of splits are split by
    a hash of the patient, else the study, else the key: 5 % validation and 5 % test. A key that
    comes in several shards is given the name of its shard. What `pack.json` lists and is not there
    comes as a bad row.

    Args:
        root: Folder of shards, or one tar file.
        split: "train", "validation" or "test".

    Raises:
        UsageError: there is no shard, a shard has a member that would be written outside of its
            folder, or the split holds no pair.
    """
    shards, whole = _find(root, split)
    expected = _packed_counts(root, split) if whole else {}
    for name in sorted(expected.keys() - {shard.name for shard in shards}):
        reason = f"the shard is missing: {MANIFEST} lists it with {expected[name]} samples"
        yield Skipped(name, str(root / split / name), reason)
    empty = True
    keys: set[str] = set()
    for shard in shards:
        items = _read_shard(shard)
        is_broken = any(item.key == shard.name for item in items)
        if len(items) < expected.get(shard.name, 0) and not is_broken:
            reason = f"the shard has {len(items)} samples; {MANIFEST} lists {expected[shard.name]}"
            yield Skipped(shard.name, str(shard), reason)
        for item in items:
            if isinstance(item, Record):
                if item.key in keys:
                    item = replace(item, key=f"{shard.stem}/{item.key}")
                if item.key in keys:
                    item = Skipped(item.key, item.place, "a second sample of this name")
                keys.add(item.key)
            if whole or _split_of(item, shard) == split:
                empty = False
                yield item
    if empty:
        remedy = few_pairs(0.05, 0.05, f"put shards into {root / split}")
        raise AbsentError(f"shards: {root} holds no {split} pair.{'' if whole else ' ' + remedy}")


def is_credentialed(source: str, root: Path) -> bool:
    """Return whether a data set, or one that was packed into shards, is credentialed.

    Shards that `pack` has written count as such where it cannot be told: their manifest is missing
    or damaged.
    """
    if source != ABOUT.key:
        return importlib.import_module(SOURCES[source]).ABOUT.credentialed
    # It lies above the folders of splits; the source may be the set, one of these, or a shard.
    real = Path(os.path.realpath(root))
    folder = real.parent if os.path.isfile(real) else real
    for path in (folder / MANIFEST, folder.parent / MANIFEST):
        if os.path.lexists(path):
            try:
                return _manifest(path)["credentialed"] is not False
            except (OSError, ValueError, KeyError, RecursionError):
                return True
    shards = (path for pattern in ("*.tar", "*/*.tar") for path in root.glob(pattern))
    first = root if os.path.isfile(root) else next(shards, None)
    return first is not None and _is_packed(first)


def _manifest(path: Path) -> dict[str, Any]:
    # To open a named pipe would wait for ever.
    if not path.is_file():
        raise OSError("it is no plain file")
    found = json.loads(path.read_text("utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _packed_counts(root: Path, split: str) -> dict[str, int]:
    """Return how many samples `pack` has written into each shard of a split, if it is known."""
    try:
        counts = _manifest(root / MANIFEST)["shards"]
        return {
            name.removeprefix(f"{split}/"): int(count)
            for name, count in counts.items()
            if name.startswith(f"{split}/")
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_packed(shard: Path) -> bool:
    """Return whether `pack` has written a shard, as the facts of its first sample tell."""
    try:
        with shard.open("rb") as file:
            for member in islice(_headers(shard, os.fstat(file.fileno()).st_size), 3):
                if isinstance(member, Member) and member.extension == "json":
                    facts = json.loads(os.pread(file.fileno(), member.size, member.offset))
                    return isinstance(facts, dict) and _are_packs(facts)
    except (OSError, ValueError, RecursionError, UsageError):
        pass
    return False


def _are_packs(facts: dict[str, Any]) -> bool:
    """Return whether facts are as `pack` writes them; of other tools' the hash may mean else."""
    return {"source", "path", "sha256"} <= facts.keys()


def frame(name: str, data: bytes) -> bytes:
    """Return a member of a shard: its header, its bytes, and zeros up to a whole block.

    Nothing in it depends on when, where or by whom it is written.
    """
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def end_of_archive(size: int) -> bytes:
    """Return the zeros that end an archive whose members take `size` bytes."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % tarfile.RECORDSIZE)


def write_index(path: Path, samples: Sequence[Sequence[Member]]) -> None:
    """Write the index of a shard, as DALI's wds2idx does (format v1.2)."""
    lines = [f"{_INDEX_VERSION} {len(samples)}"]
    for members in samples:
        words = [f"{_split_name(m.name)[1]} {m.offset} {m.size} {m.name}" for m in members]
        lines.append(" ".join(words))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_index(path: Path) -> list[list[Member]] | None:
    """Return the samples that an index names; None where it is missing or not as DALI writes it."""
    try:
        first, *lines = path.read_text("utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError):
        return None
    if first.split(" ") != [_INDEX_VERSION, str(len(lines))]:
        return None
    samples = []
    for line in lines:
        words = line.split(" ")
        # A name with a space in it makes the line ambiguous; the archive's headers are not.
        if len(words) % 4 or not all(w.isdecimal() for w in words[1::4] + words[2::4]):
            return None
        samples.append(
            [
                Member(name, int(offset), int(size))
                for offset, size, name in zip(words[1::4], words[2::4], words[3::4], strict=True)
            ]
        )
    return samples


def _find(root: Path, split: str) -> tuple[list[Path], bool]:
    """Return the shards to read, and whether all that is in them belongs to the split."""
    if root.is_file():
        return [root], False
    if any((root / name).is_dir() for name in SPLITS):
        if shards := sorted((root / split).glob("*.tar")):
            return shards, True
        raise AbsentError(f"shards: {root} holds no {split} shards; looked for {split}/*.tar.")
    if shards := sorted(root.glob("*.tar")):
        return shards, False
    if root.is_dir() and any(root.rglob("*.tar.gz")):
        raise UsageError(
            f"shards: the archives in {root} are compressed, so no sample in them can be read on "
            "its own; unpack them with gunzip."
        )
    what = f"{root} holds no {split}/*.tar and no *.tar" if root.exists() else f"there is no {root}"
    raise AbsentError(f"shards: {what}. {ABOUT.access} and name it as --train-data shards:FOLDER.")


def _split_of(item: Record | Skipped, shard: Path) -> str:
    """Return the split of a sample; a shard that is broken is reported with the training split."""
    if isinstance(item, Record):
        return hash_split(item.origin or item.study or item.key, validation=0.05, test=0.05)
    return "train" if item.key == shard.name else hash_split(item.key, validation=0.05, test=0.05)


def _read_shard(path: Path) -> list[Record | Skipped]:
    # To open a named pipe would wait for ever.
    if not path.is_file():
        return [Skipped(path.name, str(path), "the shard is no plain file")]
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size

            def text(member: Member) -> bytes:
                return os.pread(file.fileno(), member.size, member.offset)

            indexed = _indexed(path, size, file.fileno())
            if indexed is not None:
                return [_sample(path, members, text) for members in indexed]
            found: list[Record | Skipped] = []
            for item in _scan(path, size):
                if isinstance(item, Skipped):
                    found.append(item)
                else:
                    found.append(_sample(path, item, text))
            return found or [Skipped(path.name, str(path), "the shard holds no sample")]
    except OSError as error:
        return [Skipped(path.name, str(path), f"the shard cannot be read ({error})")]


def _indexed(path: Path, size: int, file: int) -> list[list[Member]] | None:
    """Return the samples of the index beside a shard; None where it is not this shard's."""
    samples = read_index(path.with_suffix(".idx"))
    if not samples:
        return None
    members = [member for sample in samples for member in sample]
    for member in members:
        _refuse_escape(path, member.name)
    end = max(-(-(m.offset + m.size) // BLOCK) * BLOCK for m in members)
    if not end + 2 * BLOCK <= size <= end + _LONGEST_END:
        return None
    end = 0
    for member in members:
        # What an index leaves out it must not leave out silently.
        if member.offset != end + BLOCK and _is_file(os.pread(file, BLOCK, end)):
            return None
        if not _is_at(file, member):
            return None
        end = -(-(member.offset + member.size) // BLOCK) * BLOCK
    return None if os.pread(file, BLOCK, end).strip(b"\0") else samples


def _is_file(header: bytes) -> bool:
    """Return whether a header is that of a file, and not of a folder, or of a long name."""
    return header[156:157] in _FILE_TYPES


def _is_at(file: int, member: Member) -> bool:
    """Return whether the header before a member's bytes is that member's."""
    header = os.pread(file, BLOCK, member.offset - BLOCK) if member.offset >= BLOCK else b""
    name = header[:100].partition(b"\0")[0]
    # A long name stands elsewhere in full, and here in part.
    full = member.name.encode()
    return (
        bool(name)
        and (full.endswith(name) or full.startswith(name))
        and header[124:136].strip(b" \0") == f"{member.size:011o}".encode()
    )


def _scan(path: Path, size: int) -> Iterator[list[Member] | Skipped]:
    """Yield the samples of a shard by its headers, and what is wrong with it, once."""
    members: list[Member] = []
    broken = None
    for item in _headers(path, size):
        if isinstance(item, Member):
            members.append(item)
        else:
            broken = item
    # Two samples of one name in a row are told apart by an extension that comes twice.
    samples: list[list[Member]] = []
    for _, group in groupby(members, key=lambda member: member.key):
        seen: set[str] = set()
        samples.append([])
        for member in group:
            if member.extension in seen:
                seen.clear()
                samples.append([])
            seen.add(member.extension)
            samples[-1].append(member)
    is_cut = broken not in (None, _JOINED)
    if is_cut and len(samples) > 1 and len(samples[-1]) < len(samples[-2]):
        # The rest of this sample is what is missing; it is not a second thing that is wrong.
        del samples[-1]
    yield from samples
    if broken is not None:
        where = "" if broken == _JOINED else f" after {len(samples)} samples"
        yield Skipped(path.name, str(path), f"{broken}{where}")


def _headers(path: Path, size: int) -> Iterator[Member | str]:
    """Yield the files of a tar archive; then, if it is damaged, the reason."""
    if size == 0:
        yield "the shard is empty (0 bytes), cut off"
        return
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="replace") as archive:
            while True:
                start = archive.offset
                info = archive.next()
                if info is None:
                    break
                # A header may lie about its size, and even lead back to where it stands.
                if info.size < 0 or archive.offset < start:
                    yield "a header is damaged"
                    return
                if info.isdir():
                    continue
                _refuse_escape(path, info.name)
                if not info.isreg() or info.issparse():
                    raise UsageError(
                        f"shards: {path} holds {info.name}, which is a link or a device and no "
                        "ordinary file; delete this shard, or get it from a source you trust."
                    )
                if info.offset_data + info.size > size:
                    yield "the shard is cut off"
                    return
                # Files whose names begin with a dot are no samples to WebDataset either.
                if _split_name(info.name)[0].rpartition("/")[2]:
                    yield Member(info.name, info.offset_data, info.size)
            end = archive.offset
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        yield f"the shard is damaged or cut off ({error})"
        return
    with path.open("rb") as file:
        file.seek(end)
        mark = file.read(BLOCK)
        if len(mark) < BLOCK:
            yield "the shard is cut off"
        elif mark.strip(b"\0"):
            yield "a header is damaged"
        elif any(chunk.strip(b"\0") for chunk in iter(partial(file.read, _CHUNK), b"")):
            yield _JOINED


def _refuse_escape(path: Path, name: str) -> None:
    parts = re.split(r"[/\\]", name)
    if parts[0] == "" or ".." in parts:
        raise UsageError(
            f"shards: {path} holds {name}, a name that leads outside of the archive's folder; "
            "delete this shard, or get it from a source you trust."
        )


def _split_name(name: str) -> tuple[str, str]:
    """Return key and extension of a member by WebDataset's rule: up to and after the first dot."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension


def _sample(
    path: Path, members: Sequence[Member], text: Callable[[Member], bytes]
) -> Record | Skipped:
    """Return the pair of the members of one sample, or why there is none."""
    key = members[0].key
    by_extension = {member.extension: member for member in members}

    def skipped(reason: str) -> Skipped:
        return Skipped(key, f"{path}, {key}", reason)

    images = [name for name in by_extension if name.rpartition(".")[2] in IMAGE_SUFFIXES]
    if not images:
        return skipped("the sample has no image")
    # "a.jpg" before "a.mask.png", which is something else about it.
    image = by_extension[min(images, key=lambda name: name.count("."))]
    facts: dict[str, Any] = {}
    try:
        if "json" in by_extension:
            facts = json.loads(text(by_extension["json"]))
        caption = text(by_extension["txt"]).decode() if "txt" in by_extension else None
    except UnicodeDecodeError as error:
        return skipped(f"the text is not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:
        return skipped(f"its .json cannot be read ({error})")
    if not isinstance(facts, dict):
        return skipped("its .json is no object")
    if caption is None and isinstance(facts.get("caption"), str):
        caption = _words(facts["caption"])
    if caption is None:
        return skipped("the sample has no text")
    return Record(
        key=key,
        image=path,
        caption=clean_caption(caption),
        study=_words(facts.get("study")),
        origin=_words(facts.get("origin")),
        span=(image.offset, image.size),
        sha256=_words(facts["sha256"]) if _are_packs(facts) else None,
    )


def _words(value: object) -> str | None:
    """Return a value of a JSON file as text that can be written; it may hold half a character."""
    return None if value is None else str(value).encode(errors="replace").decode()
