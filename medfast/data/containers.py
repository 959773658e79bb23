"""Images that lie together in one NPZ, HDF5 or Parquet file, read row by row."""

from __future__ import annotations

import io
import json
import math
import os
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from medfast.data.decode import MOST_PIXELS
from medfast.data.records import MOST_BYTES, Record
from medfast.errors import UsageError

# Rows that are read at one go, and such blocks that are kept, so that threads which ask for rows in
# about the order of the file do not send it back and forth.
_BLOCK = 32
_KEPT = 4

# What readers of damaged files raise.
_DAMAGE = (OSError, EOFError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile)


@dataclass
class _Opened:
    """A container as one process has opened it."""

    process: int
    source: Any
    lock: threading.Lock = field(default_factory=threading.Lock)
    blocks: dict[int, Any] = field(default_factory=dict)


class Container(ABC):
    """N images in one file.

    A few blocks of rows are in memory, never all. Rows in about their order cost one pass over the
    file; to go far back may mean to start at its beginning. Processes and threads may share one.

    Args:
        path: The file.
        starts: Number of the first row of each block, ascending.
        rows: N.
    """

    def __init__(self, path: Path, starts: Sequence[int], rows: int) -> None:
        self.path = path
        self._starts = starts
        self._rows = rows
        self._now: _Opened | None = None

    def __len__(self) -> int:
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_now": None}

    def read(self, row: int) -> bytes:
        """Return the encoded image of a row.

        Raises:
            OSError: the file is damaged, or the row holds no image.
        """
        block = bisect_right(self._starts, row) - 1
        try:
            now = self._now
            # Of a process that was forked the other would move the place in the file.
            if now is None or now.process != os.getpid():
                now = self._now = _Opened(os.getpid(), self._open())
            with now.lock:
                if block not in now.blocks:
                    now.blocks[block] = self._load(now.source, block)
                    if len(now.blocks) > _KEPT:
                        del now.blocks[next(iter(now.blocks))]
                found = now.blocks[block][row - self._starts[block]]
        except (*_DAMAGE, UsageError) as error:
            raise OSError(f"row {row} cannot be read ({error})") from None
        return self._encoded(found)

    def _bounds(self, block: int) -> tuple[int, int]:
        """Return the first row of a block and of the next."""
        after = block + 1
        return self._starts[block], (
            self._starts[after] if after < len(self._starts) else len(self)
        )

    @abstractmethod
    def _open(self) -> Any:
        """Return what `_load` reads from."""

    @abstractmethod
    def _load(self, source: Any, block: int) -> Any:
        """Return a sequence of the rows of a block."""

    @abstractmethod
    def _encoded(self, found: Any) -> bytes:
        """Return a row as the bytes of an image file."""


@dataclass(frozen=True, slots=True)
class ImageRow(Record):
    """A record whose image is a row of a container, the file `image`."""

    container: Container | None = None
    row: int = 0

    @property
    def place(self) -> str:
        """Where the image is, as a person would look for it."""
        return f"{self.image}, row {self.row}"

    def read(self) -> bytes:
        """Return the encoded image.

        Raises:
            OSError: the file is missing or damaged.
        """
        assert self.container is not None
        return self.container.read(self.row)


class _PixelArray(Container):
    """Images as an array of pixels, uint8 [N, H, W] or [N, H, W, C] with C 1 or 3."""

    def __init__(self, path: Path, name: str, shape: Sequence[int], dtype: Any) -> None:
        channels = shape[3:] or (1,)
        if dtype != np.uint8 or len(shape) not in (3, 4) or channels[0] not in (1, 3):
            raise UsageError(
                f"{path}: {name} must be uint8 [N, H, W] or [N, H, W, 3]; got {dtype} "
                f"{list(shape)}. Get a whole copy of the file."
            )
        if shape[1] * shape[2] > MOST_PIXELS:
            raise UsageError(
                f"{path}: the images of {name} must have at most {MOST_PIXELS} pixels; got "
                f"{shape[1]} x {shape[2]}. Get a whole copy of the file."
            )
        super().__init__(path, range(0, shape[0], _BLOCK), shape[0])
        self.shape = tuple(shape)
        self._name = name

    def _encoded(self, found: np.ndarray) -> bytes:
        # A BMP file keeps every pixel, and costs a copy.
        file = io.BytesIO()
        Image.fromarray(found.squeeze(-1) if found.shape[-1] == 1 else found).save(file, "BMP")
        return file.getvalue()


@dataclass
class _Member:
    """An array in a ZIP archive, and the first of its blocks that turned out damaged."""

    file: IO[bytes]
    offset: int
    damaged: float = math.inf


class NpzImages(_PixelArray):
    """The images of an NPZ file, without all of them being in memory.

    Args:
        path: The file.
        name: Of the array.

    Raises:
        UsageError: the file is damaged, or lacks the array, or that is not one of images.
    """

    def __init__(self, path: Path, name: str) -> None:
        with _npy(path, name) as (_, _, shape, dtype):
            super().__init__(path, name, shape, dtype)

    def _open(self) -> _Member:
        archive = zipfile.ZipFile(self.path)  # its member stays open
        file = archive.open(f"{self._name}.npy")
        _, _, offset = _npy_header(file)
        return _Member(file, offset)

    def _load(self, source: _Member, block: int) -> np.ndarray:
        # What comes after damage cannot be inflated, and to try again costs all that is before.
        if block >= source.damaged:
            raise OSError("the archive is damaged before it")
        first, end = self._bounds(block)
        size = math.prod(self.shape[1:])
        try:
            source.file.seek(source.offset + first * size)
            data = source.file.read((end - first) * size)
            if len(data) < (end - first) * size:
                raise OSError("the archive ends before it")
        except _DAMAGE:
            source.damaged = block
            raise
        return np.frombuffer(data, np.uint8).reshape(end - first, *self.shape[1:])


def npz_array(path: Path, name: str) -> np.ndarray:
    """Return an array of numbers of an NPZ file.

    Raises:
        UsageError: the file is damaged, or lacks the array, or that is too large or holds objects.
    """
    with _npy(path, name) as (file, size, shape, dtype):
        if size > MOST_BYTES:
            raise UsageError(
                f"{path}: {name} must have at most {MOST_BYTES} bytes; got {size}. Get a whole "
                "copy of the file."
            )
        return np.frombuffer(file.read(), dtype).reshape(shape)


@contextmanager
def _npy(path: Path, name: str) -> Iterator[tuple[IO[bytes], int, tuple[int, ...], np.dtype]]:
    """Give the data of an array, their size in bytes, its shape and its type."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [own.removesuffix(".npy") for own in archive.namelist()]
            if name not in names:
                raise UsageError(
                    f"{path} has no array {name!r}; its arrays are: {', '.join(names) or 'none'}."
                )
            held = archive.getinfo(f"{name}.npy").file_size
            with archive.open(f"{name}.npy") as file:
                shape, dtype, offset = _npy_header(file)
                size = math.prod(shape) * dtype.itemsize
                if held != offset + size:
                    raise ValueError(f"{name} must hold {size} bytes, and holds {held - offset}")
                yield file, size, shape, dtype
    except _DAMAGE as error:
        raise _unreadable(path, error) from None


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return shape, type and offset of an array's data. Objects, which are pickled, are refused."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"arrays of version {version} are not known")
    one = version == (1, 0)
    reader = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = reader(file)
    if dtype.hasobject or (columns_first and len(shape) > 1):
        raise ValueError("it holds objects, or is not in C order")
    return shape, dtype, file.tell()


class Hdf5Images(_PixelArray):
    """The images of an HDF5 file.

    Args:
        path: The file.
        name: Of the data set within the file.

    Raises:
        UsageError: the file is damaged, or lacks the data set, or that is not one of images, or
            h5py is not installed.
    """

    def __init__(self, path: Path, name: str) -> None:
        with _hdf5(path) as file:
            dataset = _dataset(path, file, name)
            super().__init__(path, name, dataset.shape, dataset.dtype)

    def _open(self) -> Any:
        import h5py

        return _dataset(self.path, h5py.File(self.path, "r"), self._name)

    def _load(self, source: Any, block: int) -> np.ndarray:
        return source[slice(*self._bounds(block))]


def hdf5_array(path: Path, name: str) -> np.ndarray:
    """Return an array of numbers of an HDF5 file.

    Raises:
        UsageError: the file is damaged, or lacks the data set, or that is too large, or h5py is not
            installed.
    """
    with _hdf5(path) as file:
        dataset = _dataset(path, file, name)
        if dataset.nbytes > MOST_BYTES or dataset.dtype.kind not in "biuf":
            raise UsageError(
                f"{path}: {name} must be at most {MOST_BYTES} bytes of numbers; got "
                f"{dataset.dtype} {list(dataset.shape)}. Get a whole copy of the file."
            )
        return dataset[()]


@contextmanager
def _hdf5(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ImportError:
        raise UsageError(f"{path} is an HDF5 file, which needs h5py: pip install h5py.") from None
    try:
        with h5py.File(path, "r") as file:
            yield file
    except _DAMAGE as error:
        raise _unreadable(path, error) from None


def _dataset(path: Path, file: Any, name: str) -> Any:
    import h5py

    link = file.get(name, getlink=True)
    found = file[name] if isinstance(link, h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset):
        raise UsageError(
            f"{path} has no data set {name!r}; it has: {', '.join(file) or 'nothing'}."
        )
    # Such a file has its data in others, which need not be the user's.
    if found.external or found.is_virtual:
        raise UsageError(f"{path}: {name} must lie in this file itself; get a whole copy of it.")
    return found


@dataclass
class _Stream:
    """A Parquet file, and the blocks that come next."""

    file: Any
    batches: Iterator[Any] = field(default_factory=lambda: iter(()))
    next: int = -1


class ParquetImages(Container):
    """The images of a Parquet file, a column of structs with `bytes` as Hugging Face writes it.

    pyarrow holds up to twice the bytes of a group of rows, for BACH half a gigabyte.

    Args:
        path: The file.
        column: Of the structs.

    Raises:
        UsageError: the file is damaged, lacks the column, or pyarrow is not installed.
    """

    # The largest images in such files have 9 MB.
    _block = 4

    def __init__(self, path: Path, column: str = "image") -> None:
        file = _parquet(path)
        names = {file.schema.column(i).path for i in range(len(file.schema))}
        if f"{column}.bytes" not in names:
            raise UsageError(
                f"{path} must have a column {column!r} that holds the bytes of images; it has: "
                f"{', '.join(file.schema_arrow.names)}. Get a whole copy of the file."
            )
        self._column = f"{column}.bytes"
        starts: list[int] = []
        self._groups: list[int] = []
        rows = 0
        for group in range(file.metadata.num_row_groups):
            end = rows + file.metadata.row_group(group).num_rows
            own = range(rows, end, self._block)
            starts += own
            self._groups += [group] * len(own)
            rows = end
        super().__init__(path, starts, rows)

    def _open(self) -> _Stream:
        return _Stream(_parquet(self.path))

    def _load(self, source: _Stream, block: int) -> list[bytes | None]:
        group = self._groups[block]
        if not (block == source.next and group == self._groups[block - 1]):
            # From the start of its group on.
            source.batches = source.file.iter_batches(
                self._block, row_groups=[group], columns=[self._column]
            )
            source.next = self._groups.index(group)
        first, end = self._bounds(block)
        try:
            while True:
                batch = next(source.batches)
                source.next += 1
                if source.next > block:
                    break
        except StopIteration:
            raise OSError("the file ends before it") from None
        if batch.num_rows != end - first:
            raise OSError(f"the file gives {batch.num_rows} rows for {end - first}")
        return batch.column(0).field("bytes").to_pylist()

    def _encoded(self, found: bytes | None) -> bytes:
        if not found:
            raise OSError("the row holds no image")
        return found


def class_names(path: Path, column: str) -> list[str]:
    """Return the names of the classes of a column, as Hugging Face writes them; [] without them."""
    metadata = _parquet(path).schema_arrow.metadata or {}
    try:
        info = json.loads(metadata.get(b"huggingface", b"{}"))
        return [str(name) for name in info["info"]["features"][column]["names"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            f"{path} is a Parquet file, which needs pyarrow: pip install pyarrow."
        ) from None
    try:
        return parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    except _DAMAGE as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or error
    return UsageError(f"{path} cannot be read ({reason}); get a whole copy of it.")
