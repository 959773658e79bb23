"""The plain loader: decode with Pillow, crop, tokenise, batch. Runs anywhere."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medfast.data.records import Record, group_ids
from medfast.data.skipped import Skipped
from medfast.data.tokens import Tokenizer

# What Pillow raises for files that are missing, cut off, no images, or too large to be honest.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Batch:
    """B pairs.

    Attributes:
        images: uint8 [B, 3, H, W]; the model normalises.
        ids: Token ids, int64 [B, T].
        mask: True for every token but padding, bool [B, T].
        word_mask: True for the caption's own tokens, bool [B, T].
        group: Study of each pair, int64 [B].
        index: Position of each pair in the data set, int64 [B].
        skipped: Samples that belong to this batch and could not be used.
    """

    images: Tensor
    ids: Tensor
    mask: Tensor
    word_mask: Tensor
    group: Tensor
    index: Tensor
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        tensors = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in fields(self)
            if field.name != "skipped"
        }
        return replace(self, **tensors)


def decode(path: Path) -> Image.Image:
    """Return the image of a file, upright, as 8-bit RGB.

    Raises:
        DECODE_ERRORS: the file is missing or damaged.
    """
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            # Pillow's conversion cuts 16-bit values off at 255.
            values = np.asarray(image, dtype=np.float32)
            low, high = float(values.min()), float(values.max())
            image = Image.fromarray(
                ((values - low) * (255 / max(high - low, 1e-6))).astype("uint8")
            )
        return image.convert("RGB")


class PairDataset(Dataset):
    """Decoded, cropped images with their captions.

    Args:
        records: The pairs.
        size: Side of the square that the model takes, in pixels.
        crop: Smallest share of the image that a random crop keeps; None crops the centre.
        seed: With the epoch and the index it decides a sample's crop, whichever process makes it.
    """

    def __init__(
        self, records: Sequence[Record], size: int, crop: float | None = None, seed: int = 0
    ) -> None:
        self.records = records
        self.size = size
        self.crop = crop
        self.seed = seed
        self.groups = group_ids(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, at: tuple[int, int]) -> tuple[int, int, str, np.ndarray] | Skipped:
        epoch, index = at
        record = self.records[index]
        if not record.caption:
            return Skipped(record.key, str(record.image), "the caption is empty")
        try:
            image = decode(record.image)
        except DECODE_ERRORS as error:
            return Skipped(record.key, str(record.image), f"{type(error).__name__}: {error}")
        box = self._box(image, random.Random(f"{self.seed} {epoch} {index}"))
        pixels = np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box))
        return index, self.groups[index], record.caption, pixels

    def _box(self, image: Image.Image, rng: random.Random) -> tuple[float, float, float, float]:
        """Return the crop as (left, top, right, bottom); never flipped, sides are in captions."""
        width, height = image.size
        side_w = side_h = float(min(width, height))
        if self.crop is None:
            left, top = (width - side_w) / 2, (height - side_h) / 2
        else:
            share = rng.uniform(self.crop, 1) * width * height
            ratio = rng.uniform(0.9, 1.1)
            side_w = min((share * ratio) ** 0.5, width)
            side_h = min((share / ratio) ** 0.5, height)
            left, top = rng.uniform(0, width - side_w), rng.uniform(0, height - side_h)
        return left, top, left + side_w, top + side_h


class _EpochSampler:
    """Batches of (epoch, index) that depend on the seed and the epoch alone."""

    def __init__(self, length: int, batch_size: int, seed: int, shuffle: bool) -> None:
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.epoch = 0

    def __len__(self) -> int:
        # A shuffled epoch drops its last, smaller batch, so that every loss has as many negatives.
        if self.shuffle and self.length >= self.batch_size:
            return self.length // self.batch_size
        return -(-self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = list(range(self.length))
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        for step in range(len(self)):
            chunk = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, index) for index in chunk]


class Loader:
    """Batches of a split, in an order and with crops that depend on seed and epoch alone.

    Args:
        records: The pairs.
        tokenizer: Captions to ids.
        size: Side of the square that the model takes, in pixels.
        batch_size: Pairs per batch; a batch with unusable samples is smaller.
        crop: See `PairDataset`; a training loader, which also shuffles, has one.
        seed: Decides order and crops.
        workers: Processes that decode; 0 decodes in this one.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Tokenizer,
        size: int,
        batch_size: int,
        crop: float | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        self.dataset = PairDataset(records, size, crop, seed)
        self._sampler = _EpochSampler(len(records), batch_size, seed, shuffle=crop is not None)
        self._batches = DataLoader(
            self.dataset,
            batch_sampler=self._sampler,
            num_workers=workers,
            collate_fn=partial(_collate, tokenizer=tokenizer),
            prefetch_factor=4 if workers else None,
            # Its own generator: making an iterator must not move the one that trains.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        self._sampler.epoch = epoch
        return iter(self._batches)


def _collate(samples: list, tokenizer: Tokenizer) -> Batch:
    skipped = tuple(s for s in samples if isinstance(s, Skipped))
    good = [s for s in samples if not isinstance(s, Skipped)]
    if not good:
        none = torch.empty(0, dtype=torch.int64)
        pixels, words = torch.empty(0, 3, 0, 0, dtype=torch.uint8), torch.empty(0, 0)
        return Batch(pixels, words.long(), words.bool(), words.bool(), none, none, skipped)
    index, group, captions, images = zip(*good, strict=True)
    tokens = tokenizer(captions)
    return Batch(
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
        ids=tokens.ids,
        mask=tokens.mask,
        word_mask=tokens.word_mask,
        group=torch.tensor(group),
        index=torch.tensor(index),
        skipped=skipped,
    )
