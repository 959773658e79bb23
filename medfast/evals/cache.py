"""Features of frozen images, computed once and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medfast.data.containers import ImageRow
from medfast.data.records import Record
from medfast.data.skipped import Skipped

log = logging.getLogger(__name__)

_BLOCK = 2**20


@dataclass(frozen=True)
class Frozen:
    """Features of the readable images of a split.

    Attributes:
        features: fp32 [N, D].
        index: Position of each image in the split, int64 [N].
        skipped: The images that cannot be read.
    """

    features: Tensor
    index: Tensor
    skipped: tuple[Skipped, ...]


class FeatureCache:
    """Features on disk, found by the content of all that they depend on.

    A file's name is a hash of the images' bytes and order, and of what the caller says of the model
    and the transform: nothing is ever out of date, and folders may move. To look for features reads
    the images' files once, which costs far less than to decode them.

    Args:
        folder: Where the files are, made when there is something to keep; each split takes 4 bytes
            per image and feature.
        depends: What features depend on beside the images, as JSON values.
    """

    def __init__(self, folder: Path, depends: Mapping[str, Any]) -> None:
        self._folder = folder
        self._depends = dict(depends)
        # Of each version of a file, so that the splits of one container read it once.
        self._digests: dict[tuple[Path, int, int], str] = {}

    def get(self, records: Sequence[Record], compute: Callable[[], Frozen]) -> Frozen:
        """Return the features of some images, computed only if they are not on disk."""
        path = self._folder / f"{self._name(records)}.safetensors"
        kept = _load(path)
        if kept is None:
            kept = compute()
            self._save(path, kept)
        return kept

    def _name(self, records: Sequence[Record]) -> str:
        digest = hashlib.sha256(json.dumps(self._depends, sort_keys=True).encode())
        files = self._read({record.image for record in records})
        for record in records:
            row = record.row if isinstance(record, ImageRow) else None
            digest.update(repr((record.key, files[record.image], record.span, row)).encode())
        return digest.hexdigest()

    def _read(self, paths: set[Path]) -> dict[Path, str]:
        """Return the hash of each file."""
        # Hashing does not hold the interpreter.
        with ThreadPoolExecutor() as pool:
            return dict(zip(paths, pool.map(self._digest, paths), strict=True))

    def _digest(self, path: Path) -> str:
        """Return the hash of a file, or why it cannot be read, which is as telling."""
        try:
            status = path.stat()
            # To open a named pipe would wait for ever.
            if not stat.S_ISREG(status.st_mode):
                return "no file"
            version = (path, status.st_mtime_ns, status.st_size)
            if version not in self._digests:
                digest = hashlib.blake2b(digest_size=16)
                with path.open("rb") as file:
                    while block := file.read(_BLOCK):
                        digest.update(block)
                self._digests[version] = digest.hexdigest()
            return self._digests[version]
        except OSError as error:
            return f"{error.strerror}"

    def _save(self, path: Path, kept: Frozen) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        beside = path.with_suffix(f".{os.getpid()}.part")
        tensors = {"features": kept.features.contiguous(), "index": kept.index}
        skipped = json.dumps([tuple(sample) for sample in kept.skipped])
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, beside, {"skipped": skipped})
            beside.replace(path)
        # Without them the figures are the same; only the next time takes longer.
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            log.warning("features cannot be kept in %s (%s)", self._folder, error)


def weights_hash(model: torch.nn.Module) -> str:
    """Return the SHA-256 of a model's weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(repr((name, str(tensor.dtype), list(tensor.shape))).encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()


def _load(path: Path) -> Frozen | None:
    """Return what a file keeps, None if it is not there or damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            skipped = json.loads(file.metadata()["skipped"])
            return Frozen(
                file.get_tensor("features"),
                file.get_tensor("index"),
                tuple(Skipped(*sample) for sample in skipped),
            )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        log.warning("%s is damaged (%s); its features are computed again", path, error)
        return None
