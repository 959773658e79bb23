"""The words of captions against the patches of images, a few of each at a time.

The losses over all pairs of tokens are passes over the products of N words with the P patches of
every image, too many to keep. The words of the batch that count are packed, the longest captions
first, so that the cost follows them. Letters: N words of a group, g images of a wave, P patches.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from medfast.ops import tiles
from medfast.ops.matmul import matmul_into
from medfast.ops.workspace import lend, workspace_bytes

# On a CPU, tiles that stay in cache and yet give efficient products: entries of all that are held
# at once, and columns.
CPU_ENTRIES = 2**24
CPU_COLUMNS = 800


def valid(features: Tensor, mask: Tensor | None) -> Tensor:
    """Return the features in at least fp32, with zeros for what is masked: it may hold NaN."""
    features = features.to(tiles.summable(features))
    return features if mask is None else features.masked_fill(~mask[..., None], 0)


@dataclass(frozen=True)
class Block:
    """Captions of about one length: letters b captions, t words each."""

    captions: Tensor  # [b] numbers in the batch
    rows: slice  # b * t rows of the group's words
    length: int  # t

    def of(self, rows: Tensor) -> Tensor:
        """Return the view [b, t, ...] of this block's rows."""
        return rows[self.rows].unflatten(0, (-1, self.length))


@dataclass(frozen=True)
class Words:
    """A group of blocks."""

    blocks: list[Block]
    places: Tensor  # [N] in tokens [B * T]
    padding: Tensor  # the rows that are no word
    features: Tensor  # [N, D] as products take them, zeros in padding
    is_whole: bool  # all words of the batch, in its order

    @functools.cached_property
    def captions(self) -> Tensor:
        """The numbers of the group's captions, in the order of its rows."""
        return torch.cat([block.captions for block in self.blocks])

    @functools.cached_property
    def caption_of_row(self) -> Tensor:
        """The place of each row's caption in `captions`, [N]."""
        places = torch.arange(len(self.captions), device=self.places.device)
        parts = places.split([len(block.captions) for block in self.blocks])
        return torch.cat(
            [part.repeat_interleave(b.length) for part, b in zip(parts, self.blocks, strict=True)]
        )

    @functools.cached_property
    def starts(self) -> Tensor:
        """The first row of each caption, and the number of rows, int64 on the CPU."""
        starts = [row for b in self.blocks for row in range(b.rows.start, b.rows.stop, b.length)]
        return torch.tensor([*starts, len(self.places)])

    def memory_of_gradient(self, dtype: torch.dtype) -> Tensor:
        """Return memory for the sums of the features' gradient, [N, D], that `unpack` will take."""
        if self.is_whole:  # it will be the result
            return torch.empty_like(self.features, dtype=dtype)
        return lend(self.features.numel(), self.features, dtype).view_as(self.features)

    def add_gradient_of_norms(self, norms: Tensor, d_norms: Tensor, to: Tensor) -> None:
        """Add what the gradient of the features' norms [N] gives the features to `to` [N, D]."""
        tiny = torch.finfo(norms.dtype).tiny
        # In one pass: a product of two dtypes would be ten times as slow.
        to.addcmul_(self.features, (d_norms / norms.clamp_min(tiny))[:, None])


@dataclass(frozen=True)
class Images:
    """A wave of images."""

    where: slice  # in the batch
    patches: Tensor  # [g, P, D] as products take them, zeros where masked
    mask: Tensor | None  # [g, P]

    def similarity(self, words: Words, out: Tensor) -> Tensor:
        """Write the products of words and patches to `out` [N, g, P], and return it."""
        matmul_into(out.flatten(1), words.features, self.patches.flatten(0, 1).T)
        return out

    def add_products(
        self, words: Words, gradient: Tensor, d_words: Tensor, d_patches: Tensor, is_first: bool
    ) -> None:
        """Add what the gradient of the similarity [N, g, P] gives words [N, D] and patches.

        The first wave overwrites what `d_words` holds, and `is_first`, said of the first group,
        what `d_patches` [g, P, D] holds.
        """
        flat, patches = gradient.flatten(1), self.patches.flatten(0, 1)
        matmul_into(d_words, flat, patches, accumulate=self.where.start > 0)
        matmul_into(d_patches.flatten(0, 1), flat.T, words.features, accumulate=not is_first)


def images(patches: Tensor, patch_mask: Tensor | None, where: slice) -> Images:
    """Return the images of a slice of the batch."""
    mask = None if patch_mask is None else patch_mask[where]
    wave = tiles.operand(patches[where])
    if mask is not None:
        wave = wave.masked_fill(~mask[..., None], 0)
    return Images(where, wave, mask)


@dataclass(frozen=True)
class Plan:
    """All groups of words and all waves of images, whose tiles fit the workspace."""

    groups: list[Words]
    waves: list[slice]
    patches: Tensor
    patch_mask: Tensor | None
    tile: tuple[int, int, int]  # the largest: [N, g, P]

    def images(self) -> Iterator[Images]:
        """Yield the waves."""
        for where in self.waves:
            yield images(self.patches, self.patch_mask, where)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of sums."""
        return tiles.summable(self.patches)

    @property
    def operand(self) -> torch.dtype:
        """The dtype in which products take their operands."""
        return self.groups[0].features.dtype

    def buffer(self, dtype: torch.dtype) -> Buffer:
        """Return memory for one tile at a time."""
        size = self.tile[0] * self.tile[1] * self.tile[2]
        return Buffer(lend(size, self.patches, dtype))

    def gradients(self) -> list[Tensor]:
        """Return memory for the sums of each group's gradient, that `unpack` will take."""
        return [words.memory_of_gradient(self.dtype) for words in self.groups]


@dataclass(frozen=True)
class Buffer:
    """Memory of a tile."""

    memory: Tensor

    def of(self, words: Words, images: Images) -> Tensor:
        """Return the part for a tile, [N, g, P]."""
        shape = (len(words.places), *images.patches.shape[:2])
        return self.memory[: shape[0] * shape[1] * shape[2]].view(shape)


def plan(
    op: str,
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    live: int,
    block: int,
) -> Plan:
    """Return how to walk over all words and patches.

    Args:
        op: The op, for the error message.
        patches: [M, P, D].
        tokens: [B, T, D].
        token_mask: [B, T].
        patch_mask: [M, P] or None.
        live: Tensors of a tile's size that the op holds at once.
        block: Captions that are padded to the longest of them. With 1 there is no padding.

    Raises:
        ValueError: A caption has no word.
    """
    M, P, _ = patches.shape
    most = max(1, workspace_bytes() // (live * tiles.summable(patches).itemsize))
    wave = max(1, min(M, most // P))
    if patches.device.type == "cpu":
        most = max(1, min(most, CPU_ENTRIES // live))
        wave = min(wave, max(1, CPU_COLUMNS // P))
    groups = list(pack(op, tokens, token_mask, block, most // (wave * P)))
    rows = max(len(words.places) for words in groups)
    waves = list(tiles.blocks(M, max(1, most // (rows * P))))
    largest = max(wave.stop - wave.start for wave in waves)
    return Plan(groups, waves, patches, patch_mask, (rows, largest, P))


def pack(op: str, tokens: Tensor, token_mask: Tensor, size: int, most_rows: int) -> Iterator[Words]:
    """Yield all captions, the longest first, in groups of one block or of `most_rows` at most."""
    B, T = token_mask.shape
    lengths, order = token_mask.sum(1).sort(descending=True, stable=True)
    longest_first = lengths.tolist()
    if longest_first[-1] == 0:  # the check before the op cannot look into a compiled graph
        raise ValueError(
            f"{op}: caption {order[-1].item()} has no valid word. Leave it out of the batch."
        )
    valid_first = (~token_mask[order]).to(torch.uint8).argsort(dim=1, stable=True)
    padded = lengths[::size].repeat_interleave(size)[:B]
    is_row = torch.arange(T, device=tokens.device) < padded[:, None]
    places = (valid_first + order[:, None] * T)[is_row]
    padding = ~token_mask.flatten()[places]

    groups: list[list[Block]] = []
    start = most_rows
    for captions, length in zip(order.split(size), longest_first[::size], strict=True):
        stop = start + len(captions) * length
        if stop > most_rows:
            groups.append([])
            start, stop = 0, stop - start
        groups[-1].append(Block(captions, slice(start, stop), length))
        start = stop
    rows = [blocks[-1].rows.stop for blocks in groups]
    for blocks, here, is_padding in zip(
        groups, places.split(rows), padding.split(rows), strict=True
    ):
        empty = is_padding.nonzero()[:, 0]
        # Where all captions are full, sorting has left them in the order of the batch.
        is_whole = longest_first[-1] == T and len(groups) == 1
        words = tokens.flatten(0, 1)
        features = tiles.operand(words if is_whole else words[here])
        if len(empty):
            features = features.index_fill_(0, empty, 0)
        yield Words(blocks, here, empty, features, is_whole)


def all_words(op: str, tokens: Tensor, token_mask: Tensor) -> Words:
    """Return all captions, the longest first, in one group without padding."""
    (words,) = pack(op, tokens, token_mask, size=1, most_rows=token_mask.numel())
    return words


def unpack(groups: list[Words], rows: list[Tensor], tokens: Tensor) -> Tensor:
    """Return the rows [N, D] of all groups where `tokens` [B, T, D] has their words, else 0."""
    B, T, D = tokens.shape
    if groups[0].is_whole:
        return rows[0].view(B, T, D)
    unpacked = rows[0].new_zeros(B * T, D)
    for words, found in zip(groups, rows, strict=True):
        unpacked[words.places] = found
    return unpacked.view(B, T, D)
