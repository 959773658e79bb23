"""The record: one image and its caption, as every reader returns it."""

from __future__ import annotations

import itertools
import json
import marshal
import stat
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from medfast.errors import UsageError

# No image of these data sets comes near; it keeps a wrong file from filling the memory.
MOST_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Record:
    """One pair on disk.

    Attributes:
        key: Name of the sample, unique within its split.
        image: Path of the image file, which may be missing or damaged; with `span` the tar archive
            that holds it.
        caption: Caption with white space squeezed; may be empty.
        study: Images and captions of one study belong together; None stands for itself alone.
        origin: Patient, article or video, as "KIND ID" ("article PMC4083729"): what must not be on
            both sides of a split. It is comparable between data sets; None where nothing is known.
        span: Offset and size in bytes of the image within the archive `image`.
        sha256: Of the image's bytes, where the set tells; `Records` do not keep it.
    """

    key: str
    image: Path
    caption: str
    study: str | None = None
    origin: str | None = None
    span: tuple[int, int] | None = None
    sha256: str | None = field(default=None, compare=False)

    @property
    def place(self) -> str:
        """Where the image is, as a person would look for it."""
        return str(self.image) if self.span is None else f"{self.image}, {self.key}"

    def read(self) -> bytes:
        """Return the encoded image.

        Raises:
            OSError: the file is missing, no plain file, too large, or ends before the image does.
        """
        status = self.image.stat()
        # To open a named pipe would wait for ever.
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no plain file")
        offset, size = self.span or (0, status.st_size)
        if size > MOST_BYTES:
            raise OSError(f"it has {size} bytes, more than {MOST_BYTES}")
        with self.image.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"the archive ends within the image ({len(data)} of {size} bytes)")
        return data


class Records(Sequence[Record]):
    """Records in one block of memory, a few hundred bytes each.

    A list of millions of objects takes several times that, and in processes that were forked it is
    copied little by little, as Python counts the references to what they look at.

    Args:
        records: What to keep.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        blocks = [
            marshal.dumps((r.key, str(r.image), r.caption, r.study, r.origin, r.span))
            for r in records
        ]
        self._ends = array("q", itertools.accumulate(map(len, blocks), initial=0))
        self._data = b"".join(blocks)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, at: int) -> Record: ...
    @overload
    def __getitem__(self, at: slice) -> list[Record]: ...
    def __getitem__(self, at: int | slice) -> Record | list[Record]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        start, end = self._ends[range(len(self))[at] : range(len(self))[at] + 2]
        key, image, caption, study, origin, span = marshal.loads(self._data[start:end])
        return Record(key, Path(image), caption, study, origin, span)


def clean_caption(text: str) -> str:
    """Return `text` with every run of white space, line breaks included, as one space.

    Halves of surrogate pairs, which JSON can spell and no encoding holds, become "?".
    """
    return " ".join(text.split()).encode("utf-8", "replace").decode()


def group_ids(records: Iterable[Record]) -> array[int]:
    """Return one integer per record, in 64 bits, equal where the study is equal."""
    ids: dict[str, int] = {}
    return array("q", (ids.setdefault(study_or_key(r), len(ids)) for r in records))


def study_or_key(record: Record) -> str:
    """Return the name of a record's study, or of the record, which stands for itself alone."""
    return f"study {record.study}" if record.study is not None else f"key {record.key}"


def read_sidecar(root: Path) -> dict[str, Any] | None:
    """Return what `phantom.json` says of labels, studies and questions, if it is there.

    Args:
        root: The data set's folder; where it is a single file, `phantom.json` lies beside it.

    Raises:
        UsageError: the file is damaged.
    """
    path = (root.parent if root.is_file() else root) / "phantom.json"
    if not path.is_file():
        return None
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        if not _is_sidecar(sidecar):
            raise ValueError("it is not what the phantom command writes")
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is damaged ({error}): delete {root} and write it again, or rename the file if "
            "it is another program's."
        ) from None
    return sidecar


def _is_sidecar(found: Any) -> bool:
    parts = {"label_sets": dict, "samples": dict, "questions": list}
    return (
        isinstance(found, dict)
        and all(isinstance(found.get(name), kind) for name, kind in parts.items())
        and all(
            isinstance(sample, dict)
            and isinstance(sample.get("study"), str)
            and isinstance(sample.get("labels"), dict)
            for sample in found["samples"].values()
        )
    )
