# mypy: allow-untyped-defs
"""filip_loss on a GPU: both maxima and their places from one tile of similarities, in Triton.

The backward writes, a chunk of the batch at a time, the gradient of the similarities: each entry
has what the two maxima that may lie there send back. Two products then serve patches and words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medfast.ops.filip import chunked
from medfast.ops.triton_tiles import (
    architecture_of,
    chunks,
    gradient_boost,
    on_device,
    precision_of,
    side_by_side,
)
from medfast.ops.triton_words import (
    INTERPRETED,
    MOST_IMAGES,
    SIZES,
    Packed,
    Shape,
    add_sums_over_words,
    add_word_products,
    by_slot,
    constants,
    gradient_chunk,
    pack,
    patches_of,
    programs_on,
    rows_of,
    similarities,
    tile_and_image,
    tile_count,
)
from medfast.ops.workspace import workspace_bytes

_SHAPES = {
    ("half", 80): Shape(128, 64, 32, warps=4, stages=4, programs=2, parts=4),
    ("half", 90): Shape(128, 64, 64, warps=4, stages=3, programs=2, parts=4),
    ("half", 100): Shape(128, 64, 64, warps=4, stages=3, programs=2, parts=4),
    ("tf32", 80): Shape(128, 64, 32, warps=8, stages=3, programs=2),
    ("tf32", 90): Shape(128, 64, 32, warps=8, stages=3, programs=2),
    ("tf32", 100): Shape(128, 64, 32, warps=4, stages=3, programs=2, parts=4),
    # Multiplied without tensor cores.
    ("ieee", 80): Shape(128, 32, 32, warps=4, stages=2, programs=2),
    ("ieee", 90): Shape(128, 32, 32, warps=4, stages=2, programs=2),
    ("ieee", 100): Shape(128, 32, 32, warps=4, stages=2, programs=2),
}
# Here P may be any number.
_SIZES = [*SIZES, "P"]
# Words and patches whose gradient a program writes at a time, and patches that it reduces.
_WORDS, _PATCHES, _VECTOR = 32, 128, 512
# What a patch of an image takes for each piece of a caption: a maximum and its place.
_PARTIAL_BYTES = 8


def shape_of(precision: str, architecture: int) -> Shape:
    """Return the tile of a program of the forward."""
    return _SHAPES[precision, architecture]


def forward(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the scores of all pairs and where their maxima are.

    Similarities are never kept. Captions of more words than a tile has rows leave the maxima of
    their pieces in the workspace.

    Args:
        patches: [M, P, D].
        tokens: [N, T, D].
        token_mask: [N, T].
        patch_mask: [M, P] or None.
        needs_grad: Whether the places are wanted.

    Returns:
        Image to text [M, N] and text to image [N, M] in fp32, each word's best patch [N, M, T] and
        each patch's best word [N, M, P], both empty if not wanted.
    """
    (M, P, _), N = patches.shape, len(tokens)
    shape = _shape(patches)
    packed = pack(tokens, token_mask, shape.rows, not patches.is_cuda)
    K = packed.pieces // N
    features, mask = patches_of(patches, patch_mask)
    image_to_text = patches.new_empty(M, N, dtype=torch.float32)
    text_to_image = patches.new_empty(N, M, dtype=torch.float32)
    best_patch, best_word = chunked.places(patches, tokens, needs_grad)
    with on_device(patches):
        if K == 1:
            _maxima(packed, features, mask, text_to_image, image_to_text, best_patch, best_word, 0)
        else:
            most = workspace_bytes() // (packed.pieces * P * _PARTIAL_BYTES)
            wave = max(1, min(most, MOST_IMAGES))
            for start, stop in chunks(M, wave):
                images = stop - start
                sums = patches.new_empty(packed.pieces, images, dtype=torch.float32)
                maxima = patches.new_empty(packed.pieces, images, P, dtype=torch.float32)
                places = patches.new_empty(
                    (packed.pieces, images, P) if needs_grad else 0, dtype=torch.int32
                )
                part = features[start:stop], mask[start:stop]
                _maxima(packed, *part, sums, maxima, best_patch, places, start)
                _filip_loss_pieces_kernel[(N, images)](
                    sums,
                    maxima,
                    places,
                    packed.counts,
                    mask[start:stop],
                    image_to_text,
                    text_to_image,
                    best_word,
                    M,
                    N,
                    P,
                    start,
                    PIECES=K,
                    LONGEST=shape.rows,
                    NEEDS_PLACES=needs_grad,
                    BLOCK=_VECTOR,
                )
    image_to_text /= mask.sum(1)[:, None]
    text_to_image /= packed.counts[:, None]
    return image_to_text, text_to_image, best_patch, best_word


def backward(
    d_image_to_text: Tensor,
    d_text_to_image: Tensor,
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    best_patch: Tensor,
    best_word: Tensor,
    needs_patches: bool,
    needs_tokens: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of patches and tokens in fp32, None where not wanted.

    Args:
        d_image_to_text: [M, N], fp32, contiguous.
        d_text_to_image: [N, M], fp32, contiguous.
        patches: [M, P, D].
        tokens: [N, T, D].
        token_mask: [N, T].
        patch_mask: [M, P] or None.
        best_patch: [N, M, T].
        best_word: [N, M, P].
        needs_patches: Whether the gradient of the patches is wanted.
        needs_tokens: Whether that of the tokens is.
    """
    (M, P, D), (N, T, _) = patches.shape, tokens.shape
    longest = _shape(patches).rows
    packed = pack(tokens, token_mask, longest, not patches.is_cuda)
    K = packed.pieces // N
    features, mask = patches_of(patches, patch_mask)
    # Gradients are divided by their largest, so that they fit any dtype.
    largest = torch.maximum(d_image_to_text.abs().amax(), d_text_to_image.abs().amax())
    unit = largest.clamp_min(torch.finfo(torch.float32).tiny) / gradient_boost(patches.dtype)
    of_patches = d_image_to_text / (mask.sum(1)[:, None] * unit)
    of_words = d_text_to_image / (packed.counts[:, None] * unit)

    most_words = min(T, longest)
    images, pieces = gradient_chunk(M, P, packed.pieces, most_words, patches.element_size())
    buffer = patches.new_empty(pieces * most_words * _padded(images * P))
    d_patches = patches.new_empty(M * P, features.shape[2], dtype=torch.float32)
    d_words = torch.empty_like(packed.words, dtype=torch.float32)
    with on_device(patches):
        for start, stop in chunks(M, images):
            width = (stop - start) * P
            gradient = buffer[: pieces * most_words * _padded(width)].view(-1, _padded(width))
            gradient[:, width:].zero_()
            wave = slice(start * P, stop * P)
            for first, last in chunks(packed.pieces, pieces):
                _filip_loss_gradient_kernel[(last - first, stop - start)](
                    of_patches,
                    of_words,
                    best_patch,
                    best_word,
                    mask,
                    packed.order,
                    packed.starts,
                    gradient,
                    M,
                    N,
                    P,
                    T,
                    gradient.stride(0),
                    start,
                    first,
                    PIECES=K,
                    LONGEST=longest,
                    BLOCK_R=_WORDS,
                    BLOCK_C=_PATCHES,
                )
                if needs_tokens:
                    add_word_products(
                        d_words,
                        gradient,
                        features.view(M * P, -1)[wave],
                        packed,
                        first,
                        last,
                        accumulate=start > 0,
                    )
                if needs_patches:
                    add_sums_over_words(
                        d_patches[None, wave],
                        gradient[:, None],
                        packed.words[:, None],
                        packed,
                        first,
                        last,
                        accumulate=first > 0,
                    )
    return (
        d_patches.view(M, P, -1)[..., :D].mul(unit).contiguous() if needs_patches else None,
        packed.unpack(d_words, tokens).mul_(unit) if needs_tokens else None,
    )


def _maxima(
    packed: Packed,
    patches: Tensor,
    mask: Tensor,
    word_sums: Tensor,
    patch_results: Tensor,
    best_patch: Tensor,
    best_word: Tensor,
    first_image: int,
) -> None:
    """Write both maxima of all pieces with some images.

    Args:
        packed: The words.
        patches: [images, P, D].
        mask: [images, P], bytes.
        word_sums: [Q, images], of each piece's words' maxima.
        patch_results: Of whole captions the sums of the patches' maxima [images, N], else these
            maxima [Q, images, P].
        best_patch: [N, M, T] or empty.
        best_word: [Q, images, P], numbered from the piece's first word, or empty.
        first_image: The number of the first image among all M.
    """
    images, P, D = patches.shape
    precision, shape = precision_of(patches), _shape(patches)
    N = len(packed.counts)
    _, M, T = best_patch.shape
    for bucket, (slot, tiles) in enumerate(packed.tiles(shape.rows)):
        programs = min(tiles * images, programs_on(patches.device, shape))
        _filip_loss_maxima_kernel[(programs,)](
            packed.words,
            patches,
            mask,
            packed.order,
            packed.starts,
            packed.buckets,
            word_sums,
            patch_results,
            best_patch,
            best_word,
            M,
            N,
            P,
            T,
            D,
            images,
            first_image,
            bucket,
            PIECES=packed.pieces // N,
            SLOT=slot,
            NEEDS_PLACES=best_patch.numel() > 0,
            PARTS=shape.parts,
            **constants(shape, precision),
        )


def _shape(patches: Tensor) -> Shape:
    if not patches.is_cuda:
        return INTERPRETED
    return shape_of(precision_of(patches), architecture_of(patches.device))


def _padded(width: int) -> int:
    return triton.cdiv(width, 16) * 16


@triton.jit(do_not_specialize=_SIZES)
def _filip_loss_maxima_kernel(
    words_ptr,
    patches_ptr,
    mask_ptr,
    order_ptr,
    starts_ptr,
    buckets_ptr,
    word_sums_ptr,
    patch_results_ptr,
    best_patch_ptr,
    best_word_ptr,
    M,
    N,
    P,
    T,
    D,
    images,
    first_image,
    bucket,
    PIECES: tl.constexpr,
    SLOT: tl.constexpr,
    NEEDS_PLACES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the maxima of tile after tile of the pieces that have slots of one size."""
    SLOTS: tl.constexpr = BLOCK_R // SLOT
    WIDTH: tl.constexpr = BLOCK_C // PARTS
    first = tl.load(buckets_ptr + bucket)
    stop = tl.load(buckets_ptr + bucket + 1)
    tiles = tile_count(first, stop, SLOTS)
    offs_s = tl.arange(0, SLOTS)
    for index in range(tl.program_id(0), tiles * images, tl.num_programs(0)):
        tile, image = tile_and_image(index, tiles, images)
        image = image.to(tl.int64)
        start = first + tile * SLOTS
        piece, word, number, is_word = rows_of(starts_ptr, start, stop, SLOT, BLOCK_R)
        mask_s = start + offs_s < stop
        slot_piece = tl.load(order_ptr + start + offs_s, mask=mask_s, other=0).to(tl.int64)
        best = tl.full((BLOCK_R,), -float("inf"), tl.float32)
        best_at = tl.zeros((BLOCK_R,), tl.int32)
        sums = tl.zeros((SLOTS,), tl.float32)
        for patch in range(0, P, BLOCK_C):
            similarity = similarities(
                words_ptr,
                patches_ptr + image * P * D,
                word,
                patch,
                P,
                D,
                BLOCK_R,
                BLOCK_C,
                BLOCK_D,
                PRECISION,
            )
            parts = side_by_side(similarity, BLOCK_R, BLOCK_C, PARTS)
            for k in tl.static_range(PARTS):
                # A maximum passes NaN over, but not infinity, which is read as NaN in the end.
                similarity = tl.where(parts[k] == parts[k], parts[k], float("inf"))
                offs_p = patch + k * WIDTH + tl.arange(0, WIDTH)
                inside = offs_p < P
                counts = tl.load(mask_ptr + image * P + offs_p, mask=inside, other=0) != 0

                of_words = tl.where(counts[None, :], similarity, -float("inf"))
                highest = tl.max(of_words, 1)
                if NEEDS_PLACES:
                    # The first of equals.
                    is_best = of_words == highest[:, None]
                    at = tl.min(tl.where(is_best, offs_p[None, :], patch + BLOCK_C), 1)
                    best_at = tl.where(highest > best, at, best_at)
                best = tl.maximum(best, highest)

                of_patches = tl.where(is_word[:, None], similarity, -float("inf"))
                of_patches = by_slot(of_patches, SLOT, BLOCK_R, WIDTH)
                highest = tl.max(of_patches, 1)
                offs = (slot_piece[:, None] * images + image) * P + offs_p[None, :]
                mask = mask_s[:, None] & inside[None, :]
                if NEEDS_PLACES:
                    is_best = of_patches == highest[:, None, :]
                    numbers = tl.arange(0, SLOT)[None, :, None]
                    at = tl.min(tl.where(is_best, numbers, SLOT), 1)
                    tl.store(best_word_ptr + offs, at.to(best_word_ptr.dtype.element_ty), mask=mask)
                highest = _with_nan(highest)
                if PIECES == 1:
                    sums += tl.sum(tl.where(counts[None, :], highest, 0.0), 1)
                else:
                    tl.store(patch_results_ptr + offs, highest, mask=mask)

        if PIECES == 1:
            tl.store(patch_results_ptr + image * N + slot_piece, sums, mask=mask_s)
        best = tl.where(is_word, _with_nan(best), 0.0)
        sums = tl.sum(tl.reshape(best, (SLOTS, SLOT)), 1)
        tl.store(word_sums_ptr + slot_piece * images + image, sums, mask=mask_s)
        if NEEDS_PLACES:
            piece = tl.load(order_ptr + piece, mask=is_word, other=0)
            offs = (piece // PIECES).to(tl.int64) * M + first_image + image
            offs = offs * T + piece % PIECES * BLOCK_R + number
            at = best_at.to(best_patch_ptr.dtype.element_ty)
            tl.store(best_patch_ptr + offs, at, mask=is_word)


@triton.jit(do_not_specialize=_SIZES)
def _filip_loss_pieces_kernel(
    word_sums_ptr,
    maxima_ptr,
    places_ptr,
    counts_ptr,
    mask_ptr,
    image_to_text_ptr,
    text_to_image_ptr,
    best_word_ptr,
    M,
    N,
    P,
    first_image,
    PIECES: tl.constexpr,
    LONGEST: tl.constexpr,
    NEEDS_PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Join the results of a caption's pieces with one image, in the order of the pieces."""
    caption = tl.program_id(0).to(tl.int64)
    image, images = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    pieces = tl.maximum(tl.cdiv(tl.load(counts_ptr + caption), LONGEST), 1)
    offs = tl.arange(0, BLOCK)
    word_sum = 0.0
    for k in range(0, pieces):
        word_sum += tl.load(word_sums_ptr + (caption * PIECES + k) * images + image)
    tl.store(text_to_image_ptr + caption * M + first_image + image, word_sum)
    sums = tl.zeros((BLOCK,), tl.float32)
    for patch in range(0, P, BLOCK):
        inside = patch + offs < P
        best = tl.full((BLOCK,), -float("inf"), tl.float32)
        best_at = tl.zeros((BLOCK,), tl.int32)
        for k in range(0, pieces):
            place = ((caption * PIECES + k) * images + image) * P + patch + offs
            highest = tl.load(maxima_ptr + place, mask=inside, other=0.0)
            if NEEDS_PLACES:
                at = k * LONGEST + tl.load(places_ptr + place, mask=inside, other=0)
                best_at = tl.where(highest > best, at, best_at)
            best = tl.maximum(best, highest, propagate_nan=tl.PropagateNan.ALL)
        counts = tl.load(mask_ptr + image * P + patch + offs, mask=inside, other=0) != 0
        sums += tl.where(counts, best, 0.0)
        if NEEDS_PLACES:
            place = (caption * M + first_image + image) * P + patch + offs
            at = best_at.to(best_word_ptr.dtype.element_ty)
            tl.store(best_word_ptr + place, at, mask=inside)
    tl.store(image_to_text_ptr + (first_image + image) * N + caption, tl.sum(sums, 0))


@triton.jit(do_not_specialize=_SIZES)
def _filip_loss_gradient_kernel(
    of_patches_ptr,
    of_words_ptr,
    best_patch_ptr,
    best_word_ptr,
    mask_ptr,
    order_ptr,
    starts_ptr,
    gradient_ptr,
    M,
    N,
    P,
    T,
    stride,
    first_image,
    first_piece,
    PIECES: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store the gradient of the similarities of a piece's words with an image's patches."""
    rank, local_image = first_piece + tl.program_id(0), tl.program_id(1)
    start = tl.load(starts_ptr + rank)
    count = tl.load(starts_ptr + rank + 1) - start
    piece = tl.load(order_ptr + rank)
    caption, first_number = (piece // PIECES).to(tl.int64), piece % PIECES * LONGEST
    image = (first_image + local_image).to(tl.int64)
    of_patch = tl.load(of_patches_ptr + image * N + caption)
    of_word = tl.load(of_words_ptr + caption * M + image)
    pair = caption * M + image
    offs_r, offs_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    local = (start - tl.load(starts_ptr + first_piece)).to(tl.int64)
    gradient_ptr += local * stride + local_image * P
    for row in range(0, count, BLOCK_R):
        is_word = row + offs_r < count
        number = first_number + row + offs_r
        best_patch = tl.load(best_patch_ptr + pair * T + number, mask=is_word, other=0).to(tl.int32)
        for patch in range(0, P, BLOCK_C):
            offs_p = patch + offs_c
            inside = offs_p < P
            counts = tl.load(mask_ptr + image * P + offs_p, mask=inside, other=0) != 0
            best_word = tl.load(best_word_ptr + pair * P + offs_p, mask=inside, other=0)
            has_patch = (best_word.to(tl.int32)[None, :] == number[:, None]) & counts[None, :]
            has_word = best_patch[:, None] == offs_p[None, :]
            gradient = tl.where(has_patch, of_patch, 0.0) + tl.where(has_word, of_word, 0.0)
            ptrs = gradient_ptr + (row + offs_r)[:, None].to(tl.int64) * stride + offs_p[None, :]
            mask = is_word[:, None] & inside[None, :]
            tl.store(ptrs, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _with_nan(maxima):
    """Return maxima with NaN for infinity."""
    return tl.where(maxima == float("inf"), float("nan"), maxima)
