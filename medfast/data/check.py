"""Checking data sets before they train: what is damaged, double, or on both sides of a split."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from medfast.data import SPLITS, distinct, identity, read_split
from medfast.data.check_report import as_markdown, contact_sheet, histograms
from medfast.data.decode import ImageError, decode
from medfast.data.exclude import exclusion_file, read_rows, reader_of, write_exclusions
from medfast.data.processes import each
from medfast.data.records import Record
from medfast.data.shards import is_credentialed
from medfast.data.skipped import Skipped
from medfast.data.sources import AbsentError
from medfast.errors import UsageError

WORD_BINS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
SIDE_BINS = (0, 64, 128, 224, 256, 384, 512, 1024, 2048, 4096)

_CHUNK = 64
# Two images look alike if at most so many of the 128 bits of their outlines differ.
_NEAR = 6
# Outlines that more images share than this, such as that of an even surface, say nothing.
_COMMON = 50
_LISTED = 200
_EXAMPLES = 20

Progress = Callable[[int, int], None]


class _Measured(NamedTuple):
    """What is kept of an image: hashes of its file and its pixels, its outline and its size."""

    file: bytes
    pixels: bytes
    outline: int
    width: int
    height: int


@dataclass
class _Part:
    """One split of one source."""

    source: str
    root: Path
    split: str
    against: bool
    records: list[Record]
    rows: list[Skipped]
    measured: list[_Measured | Skipped] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.source}:{self.root}"

    @property
    def identity(self) -> tuple[str, str]:
        return identity(self.source, self.root)


class _Pair(NamedTuple):
    """One pair of a part."""

    part: _Part
    record: Record
    measured: _Measured | Skipped


def check(
    sources: Sequence[tuple[str, Path]],
    out: Path,
    *,
    against: Sequence[tuple[str, Path]] = (),
    workers: int | None = None,
    show_images: bool = False,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read and decode every pair of some data sets and write what was found into `out`.

    Files: `report.md`, the same as `report.json`, `histograms.png`, `contact.png` (up to 24 images
    with the beginnings of their captions), `skipped.jsonl` (what cannot be used) and
    `exclude.jsonl`: every training pair whose patient (article, video), study or exact pixels are
    also in a validation or test split. The part of that list that concerns a source is copied into
    its folder as `medfast-exclude.jsonl`, where training finds it; what an earlier check has found
    there against splits that are not read now is kept. Images that only look alike are reported and
    not excluded.

    Memory: the records, and about 300 bytes per pair.

    Args:
        sources: Key and folder of each set that is to be trained on.
        out: Folder to write into; files of an earlier check in it are replaced.
        against: Key and folder of more sets whose validation and test splits must be kept out of
            the training splits of `sources`.
        workers: Processes that decode; None takes one per core.
        show_images: Whether to show images of credentialed sets in `contact.png` too.
        seed: Decides which images are shown.
        options: As of `read_split`.
        progress: Called with (pairs done, pairs in all).

    Returns:
        What `report.json` holds.

    Raises:
        UsageError: a set has no split or one that cannot be read, no pair of all can be used, or
            `out` cannot be written.
    """
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.md").write_text("The check has not finished.\n", encoding="utf-8")
    parts, notes = _read(sources, against, options)
    _measure_all(parts, workers, progress)
    pairs = [
        _Pair(part, record, measured)
        for part in parts
        for record, measured in zip(part.records, part.measured, strict=True)
    ]
    rows = _overlaps(pairs)
    report: dict[str, Any] = {
        "splits": [_describe(part) for part in parts],
        "duplicates": _duplicates(pairs),
        "near_identical": _near_identical(pairs),
        "overlap": dict(Counter(row["reason"] for row in rows)),
        "excluded": len(rows),
        "notes": notes,
    }
    with _writing(out):
        write_exclusions(out / "exclude.jsonl", rows)
        report["exclusion_lists"] = _copy_exclusions(parts, rows, out, notes)
        _write_skipped(out / "skipped.jsonl", parts)
        _draw(out, parts, show_images, seed, notes)
        report["verdict"] = _verdict(report)
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (out / "report.md").write_text(as_markdown(report), encoding="utf-8", errors="replace")
    if not any(isinstance(pair.measured, _Measured) and pair.record.caption for pair in pairs):
        bad = (s for p in parts for s in (*p.measured, *p.rows) if isinstance(s, Skipped))
        first = next(bad, None)
        why = f", as {first.path} ({first.reason})" if first else ""
        raise UsageError(
            f"check: no pair can be used{why}; {out / 'skipped.jsonl'} lists them all. Are the "
            "images where the captions say?"
        )
    return report


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"check: --out {out} cannot be written: {error.strerror or error}. Free the disk or "
            "name another folder."
        ) from None


def _read(
    sources: Sequence[tuple[str, Path]],
    against: Sequence[tuple[str, Path]],
    options: Mapping[str, Mapping[str, Any]] | None,
) -> tuple[list[_Part], list[str]]:
    """Return the splits of all sources, and a note for each that cannot be read."""
    parts: list[_Part] = []
    notes: list[str] = []
    wanted: list[tuple[tuple[str, Path], tuple[str, ...], bool]]
    trained = distinct(sources)
    held_out = tuple(split for split in SPLITS if split != "train")
    wanted = [(source, SPLITS, False) for source in trained]
    more = distinct([*trained, *against])[len(trained) :]
    wanted += [(source, held_out, True) for source in more]
    for (source, root), splits, is_against in wanted:
        errors = []
        for split in splits:
            try:
                found = read_split(source, root, split, options)
            except AbsentError as error:
                errors.append(error)
                continue
            parts.append(_Part(source, root, split, is_against, list(found.records), found.skipped))
        if len(errors) == len(splits):
            raise errors[0]
        notes += [f"Not read: {error}" for error in errors]
    return parts, notes


def _measure_all(parts: Sequence[_Part], workers: int | None, progress: Progress | None) -> None:
    places = [(part, start) for part in parts for start in range(0, len(part.records), _CHUNK)]
    chunks = [part.records[start : start + _CHUNK] for part, start in places]
    total = sum(len(part.records) for part in parts)
    done = 0
    with closing(each(_measure_chunk, chunks, workers)) as results:
        for (part, _), measured in zip(places, results, strict=True):
            part.measured += measured
            done += len(measured)
            if progress is not None:
                progress(done, total)


def _measure_chunk(records: Sequence[Record]) -> list[_Measured | Skipped]:
    return [_measure(record) for record in records]


def _measure(record: Record) -> _Measured | Skipped:
    try:
        data = record.read()
        if record.sha256 not in (None, hashlib.sha256(data).hexdigest()):
            raise ImageError("its bytes are not those that were packed")
        image = decode(data)
    except FileNotFoundError:
        return Skipped(record.key, record.place, "missing")
    except (OSError, ImageError) as error:
        return Skipped(record.key, record.place, f"unreadable ({error})")
    # The size as well: the same bytes in other rows are another image.
    pixels = hashlib.blake2b(f"{image.size}".encode(), digest_size=16)
    pixels.update(image.tobytes())
    file = hashlib.blake2b(data, digest_size=16)
    return _Measured(file.digest(), pixels.digest(), _outline(image), *image.size)


def _outline(image: Any) -> int:
    """Return 128 bits that say where a small grey copy of an image gets brighter.

    64 say it from left to right, 64 from top to bottom.
    """
    import numpy as np
    from PIL import Image

    grey = image.convert("L").resize((9, 9), Image.Resampling.BOX)
    values = np.asarray(grey, dtype=np.int16)
    # More than noise: an even surface has no outline, however it was compressed.
    across = np.diff(values[:8], axis=1) > 2
    down = np.diff(values[:, :8], axis=0) > 2
    bits = np.packbits(np.concatenate([across.ravel(), down.ravel()]))
    return int.from_bytes(bits.tobytes(), "big")


def _describe(part: _Part) -> dict[str, Any]:
    """Return the counts of a split, its caption lengths and its image sizes."""
    bad = [m.reason for m in part.measured if isinstance(m, Skipped)]
    good = [m for m in part.measured if isinstance(m, _Measured)]
    studies = {record.study for record in part.records} - {None}
    origins = {record.origin for record in part.records} - {None}
    return {
        "source": part.name,
        "split": part.split,
        "against": part.against,
        "pairs": len(part.records),
        "bad_rows": len(part.rows),
        "missing": bad.count("missing"),
        "unreadable": len(bad) - bad.count("missing"),
        "empty_captions": sum(not record.caption for record in part.records),
        "studies": len(studies),
        "origins": len(origins),
        "words": _spread([len(r.caption.split()) for r in part.records], WORD_BINS),
        "short_side": _spread([min(m.width, m.height) for m in good], SIDE_BINS),
    }


def _spread(values: Sequence[int], bins: Sequence[int]) -> dict[str, Any]:
    """Return least, middle and greatest value, and how many values are in each bin."""
    if not values:
        return {"min": None, "median": None, "max": None, "bins": list(bins), "counts": []}
    counts = Counter(sum(value >= start for start in bins[1:]) for value in values)
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
        "bins": list(bins),
        "counts": [counts[number] for number in range(len(bins))],
    }


def _duplicates(pairs: Sequence[_Pair]) -> dict[str, Any]:
    """Count equal files, equal pixels and equal captions."""
    features: dict[str, Callable[[_Pair], object]] = {
        "file": lambda p: p.measured.file if isinstance(p.measured, _Measured) else None,
        "pixels": lambda p: p.measured.pixels if isinstance(p.measured, _Measured) else None,
        "caption": lambda p: p.record.caption or None,
    }
    return {name: _equal(pairs, feature) for name, feature in features.items()}


def _equal(pairs: Sequence[_Pair], feature: Callable[[_Pair], object]) -> dict[str, Any]:
    """Return how often a feature comes twice within a split, across splits, across sources."""
    first: dict[object, _Pair] = {}
    groups: dict[object, list[_Pair]] = {}
    for pair in pairs:
        value = feature(pair)
        if value is None:
            continue
        if value in first:
            groups.setdefault(value, [first[value]]).append(pair)
        else:
            first[value] = pair
    within = splits = sources = 0
    for group in groups.values():
        places = Counter((p.part.name, p.part.split) for p in group)
        within += sum(count - 1 for count in places.values())
        splits += len(places) > len({name for name, _ in places})
        sources += len({name for name, _ in places}) > 1
    examples = [[_where(pair) for pair in group[:4]] for group in groups.values()][:_EXAMPLES]
    return {
        "groups": len(groups),
        "within_a_split": within,
        "groups_across_splits": splits,
        "groups_across_sources": sources,
        "examples": examples,
    }


def _where(pair: _Pair) -> str:
    return f"{pair.part.name} {pair.part.split} {pair.record.key}"


def _near_identical(pairs: Sequence[_Pair]) -> dict[str, Any]:
    """Count pairs of images that look alike and are not the same pixels."""
    images = [(p, p.measured) for p in pairs if isinstance(p.measured, _Measured)]
    total = across = 0
    listed: list[list[str]] = []
    for a, b in _alike(images):
        total += 1
        across += a.part.split != b.part.split
        if len(listed) < _LISTED:
            listed.append([_where(a), _where(b)])
    return {"pairs": total, "across_splits": across, "listed": listed}


def _alike(
    images: Sequence[tuple[_Pair, _Measured]],
) -> Iterator[tuple[_Pair, _Pair]]:
    """Yield every two images that share half of their outline and nearly the other half."""
    half = 2**64 - 1
    for shift in (0, 64):
        buckets: dict[int, list[tuple[_Pair, _Measured]]] = defaultdict(list)
        for image in images:
            if part := (image[1].outline >> shift) & half:
                buckets[part].append(image)
        for bucket in buckets.values():
            if not 2 <= len(bucket) <= _COMMON:
                continue
            for a, b in combinations(bucket, 2):
                differ = a[1].outline ^ b[1].outline
                # Those that share the lower half as well have come before.
                seen = shift > 0 and not differ & half and a[1].outline & half
                if a[1].pixels != b[1].pixels and differ.bit_count() <= _NEAR and not seen:
                    yield a[0], b[0]


def _overlaps(pairs: Iterable[_Pair]) -> list[dict[str, Any]]:
    """Return a line of the exclusion list for every training pair that is held out elsewhere."""
    pairs = list(pairs)
    held_out: dict[tuple[object, ...], _Pair] = {}
    for pair in pairs:
        if pair.part.split != "train":
            for _, value in _traits(pair):
                held_out.setdefault(value, pair)
    rows = []
    for pair in pairs:
        if pair.part.split != "train":
            continue
        for reason, value in _traits(pair):
            if value in held_out:
                other = held_out[value]
                rows.append(
                    {
                        "source": pair.part.source,
                        "root": pair.part.identity[1],
                        "key": pair.record.key,
                        "reason": reason,
                        "overlaps_with": {
                            "source": other.part.source,
                            "root": other.part.identity[1],
                            "split": other.part.split,
                            "key": other.record.key,
                        },
                    }
                )
                break
    return rows


def _traits(pair: _Pair) -> Iterator[tuple[str, tuple[object, ...]]]:
    """Yield what must not be on both sides of a split: reason and value."""
    if pair.record.origin is not None:
        kind = pair.record.origin.partition(" ")[0]
        yield f"same {kind}", ("origin", pair.record.origin)
    if pair.record.study is not None:
        # Names of studies mean nothing outside of their set.
        yield "same study", ("study", pair.part.name, pair.record.study)
    if isinstance(pair.measured, _Measured):
        yield "same pixels", ("pixels", pair.measured.pixels)


def _copy_exclusions(
    parts: Sequence[_Part], rows: Sequence[dict[str, Any]], out: Path, notes: list[str]
) -> list[str]:
    """Write each source's part of the exclusion list into its folder; return the files."""
    checked = {(*part.identity, part.split) for part in parts}
    # Two readers of one folder have one list.
    files = {exclusion_file(part.root): part.root for part in parts if not part.against}
    written = []
    for path, root in files.items():
        lies = os.path.realpath(root)
        own = {(row["source"], row["key"]): row for row in rows if row["root"] == lies}
        try:
            for row in read_rows(path) if os.path.isfile(path) else []:
                if not _was_checked(row, lies, checked):
                    own.setdefault((row["source"], row["key"]), row)
        except UsageError as error:
            notes.append(f"Replaced a damaged list: {error}")
        try:
            if own:
                write_exclusions(path, own.values())
                written.append(str(path))
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            notes.append(
                f"{path} cannot be written ({error.strerror}): give medfast train "
                f"--exclude {out / 'exclude.jsonl'}."
            )
    if written:
        notes.append(f"Training leaves out what is listed in {', '.join(written)}.")
    return written


def _was_checked(row: Mapping[str, Any], lies: str, checked: Collection[tuple[Any, ...]]) -> bool:
    """Return whether both sides of an earlier row were read now: what still holds is found again.

    Args:
        row: The row of a list.
        lies: Where the set is of which it is the list.
        checked: Reader, place and split of what was read now.
    """
    other = row.get("overlaps_with")
    if not isinstance(other, dict) or not isinstance(other.get("source"), str):
        return False
    # What a set has on both sides of its own splits it has wherever it lies by now.
    within = "root" in row and row["root"] == other.get("root")
    place = lies if within else other.get("root")
    return {
        (reader_of(row), lies, "train"),
        (reader_of(other), str(place), str(other.get("split"))),
    } <= set(checked)


def _write_skipped(path: Path, parts: Sequence[_Part]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for part in parts:
            bad = [m for m in part.measured if isinstance(m, Skipped)]
            empty = [
                Skipped(r.key, r.place, "the caption is empty")
                for r in part.records
                if not r.caption
            ]
            for sample in (*part.rows, *bad, *empty):
                row = {"source": part.source, "split": part.split, **sample._asdict()}
                file.write(json.dumps(row) + "\n")


def _draw(
    out: Path, parts: Sequence[_Part], show_images: bool, seed: int, notes: list[str]
) -> None:
    """Write contact.png and histograms.png; images of credentialed sets only where asked to."""
    shown: dict[str, list[Record]] = defaultdict(list)
    words: dict[str, list[int]] = defaultdict(list)
    sides: dict[str, list[int]] = defaultdict(list)
    for part in parts:
        good = [
            (record, measured)
            for record, measured in zip(part.records, part.measured, strict=True)
            if isinstance(measured, _Measured)
        ]
        words[part.name] += [len(record.caption.split()) for record in part.records]
        sides[part.name] += [min(measured.width, measured.height) for _, measured in good]
        if not part.against and (show_images or not is_credentialed(part.source, part.root)):
            shown[part.name] += [record for record, _ in good]
    # One of an earlier check may show what this one must not.
    (out / "contact.png").unlink(missing_ok=True)
    contact_sheet(out / "contact.png", shown, seed)
    histograms(out / "histograms.png", words, sides)
    if not show_images and any(
        is_credentialed(part.source, part.root) for part in parts if not part.against
    ):
        notes.append("Images of credentialed sets are not shown; --show-images shows them.")


def _verdict(report: dict[str, Any]) -> str:
    pairs = sum(split["pairs"] for split in report["splits"])
    unusable = sum(
        split["bad_rows"] + split["missing"] + split["unreadable"] + split["empty_captions"]
        for split in report["splits"]
    )
    findings = []
    if unusable:
        findings.append(f"{unusable} rows or pairs cannot be used (skipped.jsonl)")
    if report["excluded"]:
        findings.append(
            f"{report['excluded']} training pairs are also held out and must be left out of "
            "training (exclude.jsonl)"
        )
    if not findings:
        return f"All {pairs} pairs can be used, and none for training is held out elsewhere."
    return f"Of {pairs} pairs, " + " and ".join(findings) + "."
