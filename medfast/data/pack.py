"""Packing data sets into shards: parallel, checked, and able to go on after an interruption."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from medfast.data import SPLITS, distinct, read_split
from medfast.data.decode import ImageError, decode
from medfast.data.exclude import excluded_keys, exclusion_file
from medfast.data.processes import each
from medfast.data.records import Record
from medfast.data.shards import (
    BLOCK,
    IMAGE_SUFFIXES,
    MANIFEST,
    Member,
    end_of_archive,
    frame,
    is_credentialed,
    read_index,
    write_index,
)
from medfast.data.skipped import Skipped
from medfast.data.sources import AbsentError
from medfast.errors import UsageError

# A quarter of a gigabyte is read at one go from disks and object stores alike, and a shard that is
# lost or half written costs little.
SHARD_BYTES = 256 * 2**20
MOST_SAMPLES = 10_000
JPEG_QUALITY = 95

_FORMAT = 1
_LOSSY = ("jpg", "webp", "jp2")
_SIGNATURES = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"\0\0\0\x0cjP": "jp2",
}
# The name of a member must fit into the 100 bytes of a tar header.
_LONGEST_KEY = 80
# Samples whose images are read to see how large they are.
_TRIED = 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Packed:
    """What `pack` did.

    Attributes:
        shards: Shards in the folder.
        kept: Those of them that were whole from an earlier call.
        samples: Pairs in them, by split.
        size: Bytes in them.
        skipped: Pairs that were left out, listed in `skipped.jsonl`.
    """

    shards: int
    kept: int
    samples: dict[str, int]
    size: int
    skipped: int


@dataclass(frozen=True)
class Sources:
    """Data sets to pack, as `pack` takes them.

    Attributes:
        records: Their pairs, by split and by name of the source.
        roots: Folder of each source.
        skipped: Bad rows of their caption files, and pairs that exclusion lists leave out.
        credentialed: Whether a credentialed set is among them.
    """

    records: dict[str, dict[str, list[Record]]]
    roots: dict[str, Path]
    skipped: list[Skipped]
    credentialed: bool


class _Planned(NamedTuple):
    """A sample on its way into a shard."""

    key: str
    source: str
    path: str
    study: str | None
    record: Record


class _Task(NamedTuple):
    path: Path
    samples: list[_Planned]


class _Done(NamedTuple):
    split: str
    name: str
    planned: int
    samples: int
    size: int
    kept: bool
    skipped: list[Skipped]


def read_sources(
    sources: Sequence[tuple[str, Path]],
    splits: Sequence[str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Sources:
    """Return data sets to pack, less the training pairs in their `medfast-exclude.jsonl`.

    Exclusion lists name pairs by their keys, which shards do not keep: so they are applied here.

    Args:
        sources: Key and folder of each; a second source of one key is named "KEY2".
        splits: The splits that every source must have; None takes those that it has.
        options: As of `read_split`.

    Raises:
        UsageError: a source has none of the splits, or its exclusion list is damaged.
    """
    read = Sources({}, {}, [], any(is_credentialed(source, root) for source, root in sources))
    count = Counter[str]()
    sources = distinct(sources)
    for (source, root), excluded in zip(sources, excluded_keys(sources), strict=True):
        count[source] += 1
        name = source if count[source] == 1 else f"{source}{count[source]}"
        read.roots[name] = root
        errors = []
        for split in splits or SPLITS:
            try:
                found = read_split(source, root, split, options)
            except AbsentError as error:
                if splits:
                    raise
                errors.append(error)
                continue
            kept = []
            for record in found.records:
                if split == "train" and record.key in excluded:
                    reason = f"listed in {exclusion_file(root)}"
                    read.skipped.append(Skipped(record.key, record.place, reason))
                else:
                    kept.append(record)
            read.records.setdefault(split, {})[name] = kept
            read.skipped.extend(found.skipped)
        if len(errors) == len(SPLITS):
            raise errors[0]
    return read


def pack(
    records: Mapping[str, Mapping[str, Sequence[Record]]],
    out: Path,
    *,
    roots: Mapping[str, Path],
    credentialed: bool = False,
    skipped: Sequence[Skipped] = (),
    samples_per_shard: int | None = None,
    short_side: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Write pairs into shards below `out`, in shuffled order.

    Called again, with the same arguments, after an interruption, it keeps every shard that is whole
    and writes the others. Whole means that every byte is as it should be: a shard in which a bit
    has flipped is written again. Images that have been changed in place since are not noticed. The
    bytes of the shards depend on the pairs, `samples_per_shard`, `short_side` and `seed` alone, not
    on `workers` or on interruptions.

    A sample is named SOURCE_KEY, with "-" for whatever is no letter, digit, "-" or "_"; names that
    become equal by that end with a hash of the key. The studies of several sources are told apart
    by the name of the source. Pairs whose caption is empty or whose image cannot be decoded are
    left out and listed in `out/skipped.jsonl`. Memory: the records, no images.

    Args:
        records: The pairs, by split and by name of the source.
        out: A new or empty folder, or one that an earlier call has begun.
        roots: Folder of each source; paths in the shards are relative to it.
        credentialed: Whether a credentialed set is among the sources, which `pack.json` notes.
        skipped: More samples to list in `skipped.jsonl`, such as bad rows of caption files.
        samples_per_shard: Pairs in a shard; None chooses as many as make 256 MiB, 10,000 at most.
        short_side: Images whose short side is longer are resized to it, as JPEG of quality 95 or,
            where the file was lossless, as PNG; None keeps every file's bytes.
        seed: Decides the order.
        workers: Processes; None takes one per core.
        progress: Called with (pairs done, pairs in all) after every shard.

    Raises:
        UsageError: a number is out of range, there is no pair or none that can be used, `out` holds
            other files or what was begun with other settings or pairs, or it cannot be written.
    """
    numbers = {"--samples-per-shard": samples_per_shard, "--short-side": short_side}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UsageError(f"pack: {name} must be at least 1; got {value}.")
    lost = list(skipped)
    plan = {split: _plan(split, records[split], roots, seed, lost) for split in records}
    if not any(plan.values()):
        raise UsageError("pack: there is no pair with a caption to pack.")
    try:
        begun = _read_manifest(out)
        samples_per_shard = (
            samples_per_shard
            or (begun or {}).get("samples_per_shard")
            or _samples_per_shard(next(filter(None, plan.values())), short_side)
        )
        manifest = {
            "format": _FORMAT,
            "splits": sorted(plan),
            "sources": sorted({source for sources in records.values() for source in sources}),
            "samples_per_shard": samples_per_shard,
            "short_side": short_side,
            "seed": seed,
            "credentialed": credentialed,
            "samples": _digest(plan),
        }
        if begun is None:
            out.mkdir(parents=True, exist_ok=True)
            _write(out / MANIFEST, _as_json(manifest))
        else:
            _check_begun(out, begun, manifest)
        _remove_parts(out)
        tasks = _tasks(out, plan, samples_per_shard)
        try:
            done = _write_shards(tasks, short_side, workers, progress)
        finally:
            _remove_parts(out)
        lost += [sample for shard in done for sample in shard.skipped]
        lines = [json.dumps(sample._asdict()) + "\n" for sample in lost]
        _write(out / "skipped.jsonl", "".join(lines))
        # By these counts the reader misses shards and samples that got lost on the way.
        counts = {f"{s.split}/{s.name}": s.samples for s in done if s.samples}
        _write(out / MANIFEST, _as_json({**manifest, "shards": counts}))
    except OSError as error:
        raise _unwritable(out, error) from None
    samples = Counter[str]()
    for shard in done:
        samples[shard.split] += shard.samples
    written = [shard for shard in done if shard.samples]
    if not written:
        first = lost[-1]
        raise UsageError(
            f"pack: no pair can be used, as {first.path} ({first.reason}); "
            f"{out / 'skipped.jsonl'} lists them all. Are the images where the captions say?"
        )
    return Packed(
        shards=len(written),
        kept=sum(shard.kept for shard in written),
        samples={split: samples[split] for split in plan},
        size=sum(shard.size for shard in written),
        skipped=len(lost),
    )


def _plan(
    split: str,
    sources: Mapping[str, Sequence[Record]],
    roots: Mapping[str, Path],
    seed: int,
    lost: list[Skipped],
) -> list[_Planned]:
    """Return the samples of a split in the order in which they are packed."""
    names = {source: [_clean(source, r.key) for r in rows] for source, rows in sources.items()}
    count = Counter(name for rows in names.values() for name in rows)
    several = len(roots) > 1
    planned = []
    used: set[str] = set()
    for source, rows in sources.items():
        for name, record in zip(names[source], rows, strict=True):
            if not record.caption:
                lost.append(Skipped(record.key, record.place, "the caption is empty"))
                continue
            if count[name] > 1:
                digest = _short_hash(f"{source} {record.key}")
                name = f"{name}-{digest}"
            if name in used:
                lost.append(Skipped(record.key, record.place, "a second sample of this key"))
                continue
            used.add(name)
            study = f"{source} {record.study}" if several and record.study else record.study
            path = _relative(record, roots[source])
            planned.append(_Planned(name, source, path, study, record))
    random.Random(f"{seed} {split}").shuffle(planned)
    return planned


def _clean(source: str, key: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{source}_{key}")
    if len(name) <= _LONGEST_KEY:
        return name
    return f"{name[: _LONGEST_KEY - 13]}-{_short_hash(key)}"


def _short_hash(key: str) -> str:
    return hashlib.blake2b(repr(key).encode(), digest_size=6).hexdigest()


def _relative(record: Record, root: Path) -> str:
    image = record.image
    return image.relative_to(root).as_posix() if image.is_relative_to(root) else str(image)


def _digest(plan: Mapping[str, Sequence[_Planned]]) -> str:
    """Return a hash of all that decides the shards' contents but the images' own bytes."""
    digest = hashlib.sha256()
    for split, samples in sorted(plan.items()):
        for key, source, path, study, record in samples:
            names = (split, key, source, path, study)
            digest.update(
                repr((names, record.key, record.caption, record.origin, record.span)).encode()
            )
    return digest.hexdigest()


def _samples_per_shard(samples: Sequence[_Planned], short_side: int | None) -> int:
    """Return how many samples make a shard of about `SHARD_BYTES`."""
    sizes = []
    for sample in samples[:_TRIED]:
        with suppress(OSError, ImageError):
            sizes.append(len(_image(sample.record, short_side)[1]))
    mean = sum(sizes) / len(sizes) if sizes else 0
    return max(1, min(MOST_SAMPLES, int(SHARD_BYTES / max(mean, 1))))


def _read_manifest(out: Path) -> dict[str, Any] | None:
    """Return what an earlier call has noted of its settings; None where `out` is new or empty."""
    path = out / MANIFEST
    if not path.exists():
        # A killed process may leave half of this very file.
        if out.exists() and (not out.is_dir() or set(out.iterdir()) - {_part(path)}):
            raise UsageError(
                f"pack: --out {out} must be a new or empty folder, or one that pack has begun; it "
                "holds something else. Name another."
            )
        return None
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(begun, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise UsageError(
            f"pack: {path} is damaged ({error}); delete {out} and pack again."
        ) from None
    return begun


def _check_begun(out: Path, begun: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    for name, value in manifest.items():
        if begun.get(name) == value:
            continue
        if name == "samples":
            raise UsageError(
                f"pack: {out} was begun with other pairs: captions, studies or the list of images "
                "have changed since. Name another folder, or delete this one."
            )
        raise UsageError(
            f"pack: {out} was begun with {name} {begun.get(name)}; got {value}. Name another "
            "folder, or pack with the settings that it was begun with."
        )


def _tasks(
    out: Path, plan: Mapping[str, Sequence[_Planned]], samples_per_shard: int
) -> list[_Task]:
    tasks = []
    for split, samples in plan.items():
        if samples:
            (out / split).mkdir(exist_ok=True)
        for number, start in enumerate(range(0, len(samples), samples_per_shard)):
            chunk = list(samples[start : start + samples_per_shard])
            tasks.append(_Task(out / split / f"{number:06d}.tar", chunk))
    return tasks


def _remove_parts(out: Path) -> None:
    """Remove what a process that was ended left half written."""
    for part in out.glob("*/*.part"):
        part.unlink(missing_ok=True)


def _write_shards(
    tasks: Sequence[_Task],
    short_side: int | None,
    workers: int | None,
    progress: Progress | None,
) -> list[_Done]:
    done: list[_Done] = []
    total = sum(len(task.samples) for task in tasks)
    finished = 0
    with closing(each(partial(_make, short_side), tasks, workers)) as results:
        for result in results:
            done.append(result)
            finished += result.planned
            if progress is not None:
                progress(finished, total)
    return done


def _make(short_side: int | None, task: _Task) -> _Done:
    """Write one shard and check it, unless it is there and whole."""
    try:
        return _keep(short_side, task) or _write_shard(short_side, task)
    except OSError as error:
        raise _unwritable(task.path, error) from None


def _keep(short_side: int | None, task: _Task) -> _Done | None:
    """Return what is in a shard if it is there, whole, and lacks only what cannot be used."""
    keys = _verified(task.path, task.path.with_suffix(".idx"), task.samples)
    if keys is None:
        return None
    skipped = []
    for sample in task.samples:
        if sample.key not in keys:
            reason = _try_image(sample.record, short_side)
            if not isinstance(reason, str):
                return None
            skipped.append(Skipped(sample.record.key, sample.record.place, reason))
    return _done(task, len(keys), skipped, kept=True)


def _write_shard(short_side: int | None, task: _Task) -> _Done:
    part = task.path.with_name(f"{task.path.name}.{os.getpid()}.part")
    index = task.path.with_name(f"{task.path.stem}.idx.{os.getpid()}.part")
    members: list[list[Member]] = []
    skipped: list[Skipped] = []
    try:
        with part.open("wb") as file:
            for sample in task.samples:
                image = _try_image(sample.record, short_side)
                if isinstance(image, str):
                    skipped.append(Skipped(sample.record.key, sample.record.place, image))
                    continue
                members.append([])
                for name, data in _files(sample, *image):
                    members[-1].append(Member(name, file.tell() + BLOCK, len(data)))
                    file.write(frame(name, data))
            file.write(end_of_archive(file.tell()))
            file.flush()
            os.fsync(file.fileno())
        if members:
            write_index(index, members)
            if _verified(part, index, task.samples) is None:
                raise UsageError(
                    f"pack: {task.path} does not read back as it was written; check the disk, then "
                    "start again."
                )
            # The archive comes last: where it is, its index is.
            os.replace(index, task.path.with_suffix(".idx"))
            os.replace(part, task.path)
    finally:
        part.unlink(missing_ok=True)
        index.unlink(missing_ok=True)
    return _done(task, len(members), skipped)


def _done(task: _Task, samples: int, skipped: list[Skipped], kept: bool = False) -> _Done:
    size = task.path.stat().st_size if samples else 0
    place = task.path.parent.name, task.path.name
    return _Done(*place, len(task.samples), samples, size, kept, skipped)


def _verified(tar: Path, index: Path, samples: Sequence[_Planned]) -> set[str] | None:
    """Return the keys in a shard; None if it is missing or a byte of it is not as it should be.

    Every image is read through the index and hashed; all else follows from that and the plan.
    """
    entries = read_index(index)
    if entries is None or not tar.is_file():
        return None
    planned = {sample.key: sample for sample in samples}
    order = {key: number for number, key in enumerate(planned)}
    keys = [members[0].key for members in entries]
    numbers = [order.get(key, -1) for key in keys]
    if -1 in numbers or any(a >= b for a, b in pairwise(numbers)):
        return None
    end = 0
    with tar.open("rb") as file:
        for members in entries:
            first = members[0]
            file.seek(first.offset)
            image = file.read(first.size)
            expected = _files(planned[first.key], first.extension, image)
            if [(m.name, m.size) for m in members] != [(n, len(d)) for n, d in expected]:
                return None
            file.seek(end)
            for member, (name, data) in zip(members, expected, strict=True):
                whole = frame(name, data)
                if member.offset != end + BLOCK or file.read(len(whole)) != whole:
                    return None
                end += len(whole)
        if file.read() != end_of_archive(end):
            return None
    return set(keys)


def _files(sample: _Planned, suffix: str, image: bytes) -> list[tuple[str, bytes]]:
    """Return name and bytes of the three files of a sample."""
    facts = {
        "key": sample.record.key,
        "study": sample.study,
        "origin": sample.record.origin,
        "source": sample.source,
        "path": sample.path,
        "sha256": hashlib.sha256(image).hexdigest(),
    }
    return [
        (f"{sample.key}.{suffix}", image),
        (f"{sample.key}.txt", sample.record.caption.encode(errors="replace")),
        (f"{sample.key}.json", json.dumps(facts).encode()),
    ]


def _try_image(record: Record, short_side: int | None) -> tuple[str, bytes] | str:
    """Return suffix and bytes of the image as it is packed, or why it cannot be used."""
    try:
        return _image(record, short_side)
    except (OSError, ImageError) as error:
        return f"{type(error).__name__}: {error}"


def _image(record: Record, short_side: int | None) -> tuple[str, bytes]:
    from PIL import Image

    data = record.read()
    pixels = decode(data)
    suffix = _suffix(data, record)
    if short_side is None or min(pixels.size) <= short_side:
        return suffix, data
    scale = short_side / min(pixels.size)
    width, height = (max(short_side, round(side * scale)) for side in pixels.size)
    resized = pixels.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if suffix in _LOSSY:
        resized.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
        return "jpg", buffer.getvalue()
    resized.save(buffer, "PNG")
    return "png", buffer.getvalue()


def _suffix(data: bytes, record: Record) -> str:
    """Return the suffix of an image by what it is, whatever its file is called."""
    for signature, suffix in _SIGNATURES.items():
        if data.startswith(signature):
            return suffix
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[128:132] == b"DICM":
        return "dcm"
    named = record.image.suffix.lower().removeprefix(".")
    # DICOM files may lack the signature.
    return named if named in IMAGE_SUFFIXES else "dcm"


def _as_json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1) + "\n"


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _write(path: Path, text: str) -> None:
    part = _part(path)
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"pack: {path} cannot be written: {error.strerror or error}. Free the disk or name another "
        "folder; what is done is kept, and the same command goes on from there."
    )
