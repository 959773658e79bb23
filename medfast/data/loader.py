"""The plain loader: decode with Pillow, crop, tokenise, batch. Runs anywhere."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medfast.data.decode import ImageError, decode
from medfast.data.order import Draw, Order
from medfast.data.records import Record, Records, group_ids
from medfast.data.skipped import Skipped
from medfast.data.texts import reworded
from medfast.data.tokens import Masked, Tokenizer, Tokens
from medfast.data.views import (
    NO_EXTRA,
    SMALLEST_CROP,
    Box,
    Extra,
    Looks,
    SquareCrop,
    apply_looks,
    centre_box,
    random_box,
    random_looks,
)
from medfast.errors import UsageError


@dataclass(frozen=True)
class Batch:
    """B pairs.

    Attributes:
        images: uint8 [B, 3, H, W], channels last; the model normalises.
        ids: Token ids, int64 [B, T].
        mask: True for every token but padding, bool [B, T].
        word_mask: True for the caption's own tokens, bool [B, T].
        group: Study of each pair, int64 [B].
        index: Position of each pair in the data set, int64 [B].
        views: Extra views of the same images, each as `images`; only they are ever flipped.
        texts: Views of the same captions.
        masked: The same captions with tokens masked, padded as `ids`; None unless asked for.
        skipped: Samples that belong to this batch and could not be used.
    """

    images: Tensor
    ids: Tensor
    mask: Tensor
    word_mask: Tensor
    group: Tensor
    index: Tensor
    views: tuple[Tensor, ...] = ()
    texts: tuple[Tokens, ...] = ()
    masked: Masked | None = None
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        return _moved(self, device)


def _moved(part: Any, device: torch.device) -> Any:
    """Return a batch, or a part of one, with its tensors on `device`."""
    if isinstance(part, Tensor):
        return part.to(device, non_blocking=True)
    if is_dataclass(part) and not isinstance(part, type):
        moved = {own.name: _moved(getattr(part, own.name), device) for own in fields(part)}
        return replace(part, **moved)
    # Skipped is a named tuple, without tensors.
    if type(part) is tuple:
        return tuple(_moved(own, device) for own in part)
    return part


@dataclass(frozen=True)
class Crops:
    """Where the views of one appearance of an image lie, and what the extra ones look like.

    Attributes:
        boxes: Of the main view, then of the extra ones; in pixels of the upright image.
        looks: Of the extra views.
    """

    boxes: tuple[Box, ...]
    looks: tuple[Looks, ...]


@dataclass(frozen=True)
class Sample:
    """One pair, ready to be batched.

    Attributes:
        draw: Which.
        pixels: Its views, uint8 [H, W, 3] each.
        looks: Of the extra views, still to be applied.
    """

    draw: Draw
    pixels: tuple[np.ndarray, ...]
    looks: tuple[Looks, ...]


class PairDataset(Dataset):
    """Decoded, cropped images with their captions.

    Args:
        records: The pairs.
        size: Side of the square that the model takes, in pixels.
        crop: Smallest share of the image that a random crop keeps, or what gives other ones; None
            crops the centre.
        seed: With a sample and its turn it decides the crops and what is done to the caption,
            whichever process does it.
        extra: What is asked beyond the main view and the caption.
    """

    def __init__(
        self,
        records: Sequence[Record],
        size: int,
        crop: float | SquareCrop | None = None,
        seed: int = 0,
        extra: Extra = NO_EXTRA,
    ) -> None:
        self.records = records if isinstance(records, Records) else Records(records)
        self.size = size
        self.crop = crop
        self.seed = seed
        self.extra = extra
        self.groups = group_ids(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, draw: Draw) -> Sample | Skipped:
        data = self.read(draw)
        return data if isinstance(data, Skipped) else self.decode(draw, data)

    def read(self, draw: Draw) -> bytes | Skipped:
        """Return the encoded image of a pair, or why it cannot be used."""
        record = self.records[draw.sample]
        if not record.caption:
            return Skipped(record.key, record.place, "the caption is empty")
        try:
            return record.read()
        except OSError as error:
            return Skipped(record.key, record.place, f"{type(error).__name__}: {error}")

    def decode(self, draw: Draw, data: bytes) -> Sample | Skipped:
        """Return the views of an encoded image, or why it cannot be used."""
        record = self.records[draw.sample]
        try:
            image = decode(data)
        except ImageError as error:
            return Skipped(record.key, record.place, str(error))
        crops = self.crops(draw, *image.size)
        sides = (self.size, self.size)
        # Pillow's bilinear filter widens with the reduction, so that nothing is aliased.
        pixels = (image.resize(sides, Image.Resampling.BILINEAR, box) for box in crops.boxes)
        return Sample(draw, tuple(np.asarray(view) for view in pixels), crops.looks)

    def crops(self, draw: Draw, width: int, height: int) -> Crops:
        """Return the crops of an image of this size; of one draw they are always the same."""
        rng = random.Random(f"{self.seed} {draw.turn} {draw.sample}")
        # Never flipped: left and right are in the captions.
        if self.crop is None:
            main = centre_box(width, height)
        elif isinstance(self.crop, SquareCrop):
            main = self.crop.box(width, height, rng)
        else:
            main = random_box(width, height, self.crop, rng)
        extra = [
            (random_box(width, height, SMALLEST_CROP, rng), random_looks(rng, self.extra.flip))
            for _ in range(self.extra.images)
        ]
        boxes, looks = (tuple(part) for part in zip(*extra, strict=True)) if extra else ((), ())
        return Crops((main, *boxes), looks)

    def text_rngs(self, draws: Sequence[Draw], use: str) -> list[random.Random]:
        """Return the generators of one use of captions, which moves neither another nor a crop."""
        return [random.Random(f"{self.seed} {use} {draw.turn} {draw.sample}") for draw in draws]


class _Batches:
    """What torch's DataLoader asks for the batches of the present epoch."""

    def __init__(self, order: Order) -> None:
        self.order, self.epoch, self.start = order, 0, 0

    def __iter__(self) -> Iterator[list[Draw]]:
        return self.order.batches(self.epoch, self.start)

    def __len__(self) -> int:
        return len(self.order) - self.start


class Loader:
    """Batches of a split, whose order, crops and words depend on seed and epoch alone.

    Args:
        records: The pairs.
        tokenizer: Captions to ids; called in the workers.
        size: Side of the square that the model takes, in pixels.
        batch_size: Pairs per batch; a batch with unusable samples is smaller.
        crop: See `PairDataset`; a training loader, which also shuffles, has one.
        seed: Decides order, crops and what is done to captions.
        workers: Processes that decode; 0 decodes in this one.
        extra: What is asked of each pair beyond its main view and its caption; masked captions
            need a tokenizer that has a mask token.
        order: Where it is not all records by `batch_size`, `seed` and `crop`: the order.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Tokenizer,
        size: int,
        batch_size: int,
        crop: float | SquareCrop | None = None,
        seed: int = 0,
        workers: int = 0,
        extra: Extra = NO_EXTRA,
        order: Order | None = None,
    ) -> None:
        self.dataset = PairDataset(records, size, crop, seed, extra)
        self.tokenizer = tokenizer
        self.workers = workers
        self.order = order or Order([len(records)], batch_size, seed, shuffle=crop is not None)

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch, from batch `start` on.

        Raises:
            UsageError: a worker process was ended from outside.
        """
        batches = _Batches(self.order)
        batches.epoch, batches.start = epoch, start
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=partial(collate, dataset=self.dataset, tokenizer=self.tokenizer),
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=_ignore_sigterm,
            # Its own generator: making an iterator must not move the one that trains.
            generator=torch.Generator(),
        )
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UsageError(
                "a process of --workers was ended from outside, as by a lack of memory; ask for "
                "fewer --workers or a smaller --batch-size."
            ) from None


def _ignore_sigterm(_: int) -> None:
    """Let a worker outlive the SIGTERM that a whole job gets: the process that it works for saves.

    It ends with that process, whose end it watches.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def collate(
    samples: Sequence[Sample | Skipped], dataset: PairDataset, tokenizer: Tokenizer
) -> Batch:
    """Return the batch of some samples."""
    good = [s for s in samples if isinstance(s, Sample)]
    skipped = [s for s in samples if isinstance(s, Skipped)]
    size = dataset.size
    stacks = [
        torch.from_numpy(np.stack([s.pixels[view] for s in good])).permute(0, 3, 1, 2)
        if good
        else torch.empty(0, 3, size, size, dtype=torch.uint8)
        for view in range(1 + dataset.extra.images)
    ]
    return assemble(
        [s.draw for s in good], stacks, [s.looks for s in good], skipped, dataset, tokenizer
    )


def assemble(
    draws: Sequence[Draw],
    stacks: Sequence[Tensor],
    looks: Sequence[tuple[Looks, ...]],
    skipped: Sequence[Skipped],
    dataset: PairDataset,
    tokenizer: Tokenizer,
) -> Batch:
    """Return a batch of B decoded pairs.

    Args:
        draws: Which pairs.
        stacks: Their main view and each extra view, uint8 [B, 3, H, W].
        looks: Of each pair's extra views.
        skipped: Samples that belong to this batch and could not be used.
        dataset: Where the pairs are from.
        tokenizer: Captions to ids.
    """
    rows = [draw.sample for draw in draws]
    captions = [dataset.records[row].caption for row in rows]
    tokens = tokenizer(captions)
    rngs = partial(dataset.text_rngs, draws)
    return Batch(
        images=stacks[0],
        ids=tokens.ids,
        mask=tokens.mask,
        word_mask=tokens.word_mask,
        group=torch.tensor([dataset.groups[row] for row in rows], dtype=torch.int64),
        index=torch.tensor(rows, dtype=torch.int64),
        views=tuple(
            apply_looks(stack, [own[view] for own in looks])
            for view, stack in enumerate(stacks[1:])
        ),
        texts=tuple(
            tokenizer(list(map(reworded, captions, rngs(f"text {view}"))))
            for view in range(dataset.extra.texts)
        ),
        masked=tokenizer.masked(tokens, rngs("mask")) if dataset.extra.masked else None,
        skipped=tuple(skipped),
    )
