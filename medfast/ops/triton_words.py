# mypy: allow-untyped-defs
"""What the Triton kernels of the losses over all pairs of tokens share.

A kernel's program holds BLOCK_R rows of words against the patches of one image. Captions are cut
into pieces of at most BLOCK_R words, and pieces of about one length go side by side into slots of a
tile, so that the cost follows the words that count. How many these are only the device knows.
Letters: N captions of T tokens, Q pieces, W words, M images of P patches, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from medfast.ops.triton_tiles import (
    LOG2E,
    architecture_of,
    multiprocessors,
    operand,
    precision_of,
    tile_product,
)
from medfast.ops.workspace import workspace_bytes

# Arguments that change from call to call: no kernel is compiled anew for another value.
SIZES = [
    "M",
    "N",
    "T",
    "K",
    "images",
    "first_image",
    "bucket",
    "first_piece",
    "stop_piece",
    "rows",
    "accumulate",
]
# Tiles that run side by side: programs in flight share the features that they load in L2.
_GROUP = tl.constexpr(16)
# A launch has at most 2**16 programs along its second dimension.
MOST_IMAGES = 2**15
# Slots are this small at least, and twice as large each.
_SMALLEST_SLOT = 32
_SMALLEST_SLOT_INTERPRETED = 8


@dataclass(frozen=True)
class Shape:
    """The size of a program's tile and how it is compiled."""

    rows: int
    columns: int
    features: int
    warps: int
    stages: int
    # Programs that a multiprocessor holds at a time.
    programs: int = 1
    # Into how many parts an epilogue with temporaries divides the tile.
    parts: int = 2


# The tiles of a product's result.
_PRODUCTS = {
    ("half", 80): Shape(128, 128, 32, warps=8, stages=4),
    ("half", 90): Shape(128, 128, 64, warps=8, stages=3),
    ("half", 100): Shape(128, 128, 64, warps=8, stages=3),
    ("tf32", 80): Shape(128, 128, 32, warps=8, stages=3),
    ("tf32", 90): Shape(128, 128, 32, warps=8, stages=3),
    ("tf32", 100): Shape(128, 64, 32, warps=8, stages=3),
    # Multiplied without tensor cores.
    ("ieee", 80): Shape(64, 64, 16, warps=4, stages=3),
    ("ieee", 90): Shape(64, 64, 16, warps=4, stages=3),
    ("ieee", 100): Shape(64, 64, 16, warps=4, stages=3),
}
# Under the interpreter: small, so that small inputs have many tiles, and not square.
INTERPRETED = Shape(16, 32, 16, warps=4, stages=1)
_INTERPRETED_PRODUCT = Shape(32, 64, 16, warps=4, stages=1)


def programs_on(device: torch.device, shape: Shape) -> int:
    """Return how many programs run at a time."""
    if device.type != "cuda":
        return 2
    return multiprocessors(device) * shape.programs


def constants(shape: Shape, precision: str) -> dict[str, Any]:
    """Return the compile-time arguments of a kernel that works on tiles of a shape."""
    return {
        "BLOCK_R": shape.rows,
        "BLOCK_C": shape.columns,
        "BLOCK_D": shape.features,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }


def product_shape(precision: str, architecture: int) -> Shape:
    """Return the tile of a product's result."""
    return _PRODUCTS[precision, architecture]


def slots_for(longest: int, is_interpreted: bool = False) -> tuple[int, ...]:
    """Return the sizes of slots for pieces of at most `longest` words."""
    slots = [_SMALLEST_SLOT_INTERPRETED if is_interpreted else _SMALLEST_SLOT]
    while slots[-1] < longest:
        slots.append(2 * slots[-1])
    return tuple(slots)


@dataclass(frozen=True)
class Packed:
    """The words that count, those of a piece together, pieces of short slots first."""

    words: Tensor  # [N * T, D], padded; the first W are words, the others zeros
    source: Tensor  # [N * T] where in the tokens [N * T] they come from
    is_word: Tensor  # [N * T]
    order: Tensor  # [Q] the pieces, int32: piece k of caption n is n * (Q / N) + k
    starts: Tensor  # [Q + 1] the first word of each, in this order, and W; int32
    buckets: Tensor  # [number of slots + 1] the first piece of each size of slot; int32
    counts: Tensor  # [N] words of each caption, int32
    slots: tuple[int, ...]

    @property
    def pieces(self) -> int:
        """Pieces of all captions, those without a word included."""
        return len(self.order)

    def tiles(self, rows: int) -> list[tuple[int, int]]:
        """Return, for each size of slot, that and the most tiles of `rows` that may hold any."""
        return [(slot, triton.cdiv(self.pieces, rows // slot)) for slot in self.slots]

    def unpack(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return rows [N * T, at least D] as `tokens` [N, T, D] has them, else 0."""
        rows = torch.where(self.is_word[:, None], rows[:, : tokens.shape[2]], 0)
        unpacked = torch.empty_like(rows, memory_format=torch.contiguous_format)
        unpacked[self.source] = rows
        return unpacked.view(tokens.shape)


def pack(tokens: Tensor, token_mask: Tensor, longest: int, is_interpreted: bool) -> Packed:
    """Return the words of all captions, packed without a look at the mask from the host.

    Args:
        tokens: [N, T, D].
        token_mask: [N, T].
        longest: The most words of a piece.
        is_interpreted: Whether slots are to be small.
    """
    N, T, _ = tokens.shape
    K = triton.cdiv(T, longest)
    slots = slots_for(min(T, longest), is_interpreted)
    device = tokens.device
    counts = token_mask.sum(1)
    firsts = torch.arange(K, device=device) * longest
    lengths = (counts[:, None] - firsts).clamp(0, longest).flatten()
    # A caption without a word has a piece: it gets a score as well, which is no number.
    exists = (counts[:, None] > firsts) | (firsts == 0)
    bucket = torch.zeros_like(lengths)
    for slot in slots[:-1]:
        bucket += lengths > slot
    bucket.masked_fill_(~exists.flatten(), len(slots))
    order = torch.argsort(bucket, stable=True)
    starts = torch.zeros(len(order) + 1, dtype=torch.int32, device=device)
    starts[1:] = lengths[order].cumsum(0)
    kinds = torch.arange(len(slots) + 1, device=device)
    buckets = (bucket[:, None] < kinds).sum(0).int()

    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=device)
    number = (token_mask.cumsum(1) - 1).clamp_(min=0)
    piece = torch.arange(N, device=device)[:, None] * K + number // longest
    key = rank[piece].masked_fill_(~token_mask, len(order)).flatten()
    source = torch.argsort(key, stable=True)
    is_word = token_mask.flatten()[source]
    words = operand(tokens.flatten(0, 1)[source]).masked_fill_(~is_word[:, None], 0)
    return Packed(words, source, is_word, order.int(), starts, buckets, counts.int(), slots)


def patches_of(patches: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return patches [M, P, D] as the kernels take them, padded, and which count [M, P], in bytes.

    Those that do not count may hold NaN: here they are zeros.
    """
    features = operand(patches.flatten(0, 1)).view(*patches.shape[:2], -1)
    if mask is None:
        return features, patches.new_ones(patches.shape[:2], dtype=torch.uint8)
    return features.masked_fill(~mask[..., None], 0), mask.contiguous().view(torch.uint8)


def gradient_chunk(
    images: int, patches: int, pieces: int, words: int, entry_bytes: int
) -> tuple[int, int]:
    """Return how many images and pieces a chunk of a gradient may cover within the workspace.

    About as many words as patches is best: what the products add to is read and written once for
    each chunk. Kernels count a chunk's entries in int32.

    Args:
        images: M.
        patches: Patches of an image.
        pieces: Q.
        words: The most words of a piece.
        entry_bytes: What a word and a patch take.
    """
    entries = max(1, min(workspace_bytes() // entry_bytes, 2**31 - 1))
    side = math.isqrt(entries)
    images = min(images, MOST_IMAGES)
    wide = min(images, max(1, side // patches))
    high = min(pieces, max(1, entries // (wide * patches * words)))
    return min(images, max(1, entries // (high * words * patches))), high


def add_word_products(
    out: Tensor,
    gradient: Tensor,
    patches: Tensor,
    packed: Packed,
    first_piece: int,
    stop_piece: int,
    accumulate: bool,
    factors: Tensor | None = None,
) -> None:
    """Write or add the products of the words' gradients with the patches.

    Args:
        out: [N * T, D] of all words, fp32.
        gradient: [R, S] of the words of some pieces, with room for the most that these may have.
        patches: [K, D]. From K to S, a multiple of 16, the gradient is zero.
        packed: All words.
        first_piece: The first of the pieces.
        stop_piece: One more than the last.
        accumulate: Whether to add.
        factors: [images, R] or None: a word also takes the sum of its factors times itself.
    """
    shape, keywords = _product_launch(patches)
    rows, D = len(gradient), patches.shape[1]
    _word_product_kernel[(triton.cdiv(rows, shape.rows) * triton.cdiv(D, shape.columns),)](
        gradient,
        patches,
        packed.words,
        gradient if factors is None else factors,
        packed.starts,
        out,
        len(patches),
        D,
        gradient.stride(0),
        rows,
        0 if factors is None else len(factors),
        first_piece,
        stop_piece,
        int(accumulate),
        HAS_FACTORS=factors is not None,
        **keywords,
    )


def add_sums_over_words(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    packed: Packed,
    first_piece: int,
    stop_piece: int,
    accumulate: bool,
) -> None:
    """Write or add the products `left.T @ right`, summed over the words of some pieces.

    Args:
        out: [B, C, E], fp32.
        left: [R, B, S] of those words; S is at least C and, as E, a multiple of 16.
        right: [R, B, E] likewise, or [N * T, 1, E] of all words.
        packed: All words.
        first_piece: The first of the pieces.
        stop_piece: One more than the last.
        accumulate: Whether to add.
    """
    shape, keywords = _product_launch(packed.words)
    B, C, E = out.shape
    width = left.shape[2]
    tiles = triton.cdiv(C, shape.rows) * triton.cdiv(E, shape.columns)
    _sum_over_words_kernel[(tiles, B)](
        left,
        right,
        packed.starts,
        out,
        C,
        E,
        width,
        left.stride(0),
        right.stride(0),
        first_piece,
        stop_piece,
        int(accumulate),
        IS_PACKED=right.data_ptr() == packed.words.data_ptr(),
        **keywords,
    )


def _product_launch(features: Tensor) -> tuple[Shape, dict[str, Any]]:
    precision = precision_of(features)
    shape = _INTERPRETED_PRODUCT
    if features.is_cuda:
        shape = product_shape(precision, architecture_of(features.device))
    return shape, constants(shape, precision)


@triton.jit(do_not_specialize=SIZES)
def _word_product_kernel(
    gradient_ptr,
    patches_ptr,
    words_ptr,
    factors_ptr,
    starts_ptr,
    out_ptr,
    K,
    D,
    stride,
    rows,
    images,
    first_piece,
    stop_piece,
    accumulate,
    HAS_FACTORS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store a tile of the words' product, if the pieces have that many words."""
    start = tl.load(starts_ptr + first_piece)
    count = tl.load(starts_ptr + stop_piece) - start
    blocks = tl.cdiv(D, BLOCK_C)
    row = tl.program_id(0) // blocks * BLOCK_R
    column = tl.program_id(0) % blocks * BLOCK_C
    if row < count:
        offs_r = row + tl.arange(0, BLOCK_R)
        offs_c = column + tl.arange(0, BLOCK_C)
        offs_k = tl.arange(0, BLOCK_D)
        # Beyond the last word it is repeated.
        local = tl.minimum(offs_r, count - 1).to(tl.int64)
        mask_c = offs_c[None, :] < D
        x_ptrs = gradient_ptr + (local[:, None] * stride + offs_k[None, :])
        y_ptrs = patches_ptr + (offs_k[:, None] * D + offs_c[None, :])
        offs = (start + local)[:, None] * D + offs_c[None, :]
        product = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        if HAS_FACTORS:
            factor = tl.zeros((BLOCK_R,), tl.float32)
            for image in range(0, images):
                factor += tl.load(factors_ptr + image * rows + local)
            words = tl.load(words_ptr + offs, mask=mask_c, other=0.0)
            product += words.to(tl.float32) * factor[:, None]
        for k in range(0, K, BLOCK_D):
            x = tl.load(x_ptrs, mask=offs_k[None, :] < stride - k, other=0.0)
            y = tl.load(y_ptrs, mask=(offs_k[:, None] < K - k) & mask_c, other=0.0)
            product = tl.dot(x, y, product, input_precision=PRECISION)
            x_ptrs += BLOCK_D
            y_ptrs += BLOCK_D * D
        if accumulate != 0:
            product += tl.load(out_ptr + offs, mask=mask_c, other=0.0)
        tl.store(out_ptr + offs, product, mask=(offs_r < count)[:, None] & mask_c)


@triton.jit(do_not_specialize=[*SIZES, "C"])
def _sum_over_words_kernel(
    left_ptr,
    right_ptr,
    starts_ptr,
    out_ptr,
    C,
    E,
    width,
    left_stride,
    right_stride,
    first_piece,
    stop_piece,
    accumulate,
    IS_PACKED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store a tile of one product, summed over the words that the pieces have."""
    start = tl.load(starts_ptr + first_piece)
    count = tl.load(starts_ptr + stop_piece) - start
    blocks = tl.cdiv(E, BLOCK_C)
    offs_r = tl.program_id(0) // blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_k = tl.arange(0, BLOCK_D)
    batch = tl.program_id(1).to(tl.int64)
    mask_r, mask_c = offs_r[None, :] < width, offs_c[None, :] < E
    if IS_PACKED:
        right_ptr += start.to(tl.int64) * right_stride
    # int64: a stride is as wide as all patches of a chunk.
    offs_w = offs_k[:, None].to(tl.int64)
    left_ptrs = left_ptr + batch * width + offs_w * left_stride + offs_r[None, :]
    right_ptrs = right_ptr + batch * E + offs_w * right_stride + offs_c[None, :]
    product = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for k in range(0, count, BLOCK_D):
        mask_k = offs_k[:, None] < count - k
        left = tl.load(left_ptrs, mask=mask_k & mask_r, other=0.0)
        right = tl.load(right_ptrs, mask=mask_k & mask_c, other=0.0)
        product = tl.dot(tl.trans(left), right, product, input_precision=PRECISION)
        left_ptrs += left_stride.to(tl.int64) * BLOCK_D
        right_ptrs += right_stride.to(tl.int64) * BLOCK_D
    offs = (batch * C + offs_r[:, None]) * E + offs_c[None, :]
    mask = (offs_r < C)[:, None] & mask_c
    product += tl.load(out_ptr + offs, mask=mask & (accumulate != 0), other=0.0)
    tl.store(out_ptr + offs, product, mask=mask)


@triton.jit
def tile_count(first, stop, SLOTS: tl.constexpr):
    """Return how many tiles hold the pieces from `first` to `stop`."""
    return tl.cdiv(tl.maximum(stop - first, 0), SLOTS)


@triton.jit
def tile_and_image(index, tiles, images):
    """Return the tile and the image of a program's turn."""
    # The interpreter's loops count in Python.
    index = tl.cast(index, tl.int32)
    first = index // (_GROUP * images) * _GROUP
    within = index % (_GROUP * images)
    height = tl.minimum(tiles - first, _GROUP)
    return first + within % height, within // height


@triton.jit
def rows_of(starts_ptr, first, stop, SLOT: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return what the rows of a tile are whose first piece is `first`.

    Returns:
        The places of their pieces among all, of their words among the packed words, int64, and of
        their words in the piece, and whether they are words: slots are longer than pieces.
    """
    offs = tl.arange(0, BLOCK_R)
    piece = first + offs // SLOT
    start = tl.load(starts_ptr + piece, mask=piece < stop, other=0)
    end = tl.load(starts_ptr + piece + 1, mask=piece < stop, other=0)
    number = offs % SLOT
    is_word = number < end - start
    # Other rows repeat a word: loads without a mask, and results to be ignored.
    return piece, tl.where(is_word, start + number, start).to(tl.int64), number, is_word


@triton.jit
def similarities(
    words_ptr,
    image_ptr,
    word,
    patch,
    P,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the products of words with the patches from `patch` on; the last one is repeated."""
    return tile_product(
        words_ptr,
        image_ptr + patch * D,
        word,
        tl.minimum(tl.arange(0, BLOCK_C), P - 1 - patch),
        D,
        BLOCK_R,
        BLOCK_C,
        BLOCK_D,
        PRECISION,
    )


@triton.jit
def by_slot(tile, SLOT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return a tile's view [slots, SLOT, BLOCK_C]."""
    return tl.reshape(tile, (BLOCK_R // SLOT, SLOT, BLOCK_C))


@triton.jit
def over_words(
    similarity, is_word, SLOT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Return the softmax of a tile over the words of each slot; 0 for rows that are no word."""
    logits = tl.where(is_word[:, None], similarity, -float("inf"))
    logits = by_slot(logits, SLOT, BLOCK_R, BLOCK_C)
    highest = tl.max(logits, 1)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    exponentials = tl.exp2((logits - highest[:, None, :]) * LOG2E)
    total = tl.sum(exponentials, 1)
    total = tl.where(total == 0.0, 1.0, total)
    return tl.reshape(exponentials / total[:, None, :], (BLOCK_R, BLOCK_C))
