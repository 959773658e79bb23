# mypy: allow-untyped-defs
"""local_alignment_loss on a GPU: both softmaxes and the cosines tile by tile, in Triton.

As in `chunked`, the context never exists: with similarities S, attention A and an image's Gram
matrix G, c.w = sum_p A_p S_p and |c|^2 = A^T G A. A program keeps E, the attention before it is
divided by its sum, for the product with G, and only the scores remain for the backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from medfast.ops.local_alignment.reference import MIN_NORM
from medfast.ops.triton_tiles import (
    LOG2E,
    architecture_of,
    chunks,
    gradient_boost,
    on_device,
    precision_of,
    side_by_side,
)
from medfast.ops.triton_words import (
    INTERPRETED,
    SIZES,
    Packed,
    Shape,
    add_sums_over_words,
    add_word_products,
    by_slot,
    constants,
    gradient_chunk,
    over_words,
    pack,
    patches_of,
    programs_on,
    rows_of,
    similarities,
    tile_and_image,
    tile_count,
)

_SHAPES = {
    ("half", 80): Shape(128, 64, 32, warps=8, stages=4),
    ("half", 90): Shape(128, 64, 64, warps=8, stages=3),
    ("half", 100): Shape(128, 64, 64, warps=8, stages=3),
    ("tf32", 80): Shape(128, 32, 32, warps=8, stages=3),
    ("tf32", 90): Shape(128, 32, 32, warps=8, stages=3),
    ("tf32", 100): Shape(128, 64, 32, warps=8, stages=3),
    # Multiplied without tensor cores.
    ("ieee", 80): Shape(128, 32, 16, warps=8, stages=3),
    ("ieee", 90): Shape(128, 32, 16, warps=8, stages=3),
    ("ieee", 100): Shape(128, 32, 32, warps=8, stages=3),
}
# The backward holds more: compiled like this it spills nothing either.
_BACKWARD_SHAPES = _SHAPES | {
    ("half", 80): Shape(128, 64, 32, warps=8, stages=4, parts=8),
    ("ieee", 80): Shape(128, 32, 32, warps=8, stages=3),
    ("ieee", 90): Shape(128, 32, 32, warps=8, stages=3),
}
_MIN_NORM = tl.constexpr(MIN_NORM)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
# Up to this temperature exponentials of all attentions, which are between 0 and 1, fit a dtype, and
# their squares fit fp32, after one shift; beyond it a first pass finds the largest of each word.
_MAX_TEMPERATURE = {torch.float16: 8.0}
_MAX_TEMPERATURE_OTHERS = 40.0


def shape_of(precision: str, architecture: int, words: int, is_backward: bool) -> Shape:
    """Return the tile of a program for captions of at most `words`."""
    shapes = _BACKWARD_SHAPES if is_backward else _SHAPES
    return _with_room(shapes[precision, architecture], words)


def forward(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    temp_attention: Tensor,
    temp_words: Tensor,
) -> Tensor:
    """Return how well each caption (row) matches each image (column), [N, M] in fp32.

    Memory: the Gram matrices, M P^2, and a tile's E for each program that runs at a time.

    Args:
        patches: [M, P, D].
        tokens: [N, T, D].
        token_mask: [N, T].
        patch_mask: [M, P] or None.
        temp_attention: [].
        temp_words: [].
    """
    inputs = (patches, tokens, token_mask, patch_mask)
    temps = (temp_attention.float(), temp_words.float())
    batch = _Batch(*inputs, is_backward=False)
    M, P, D = batch.patches.shape
    grams = batch.patches @ batch.patches.mT
    scores = patches.new_empty(len(tokens), M, dtype=torch.float32)
    programs = programs_on(patches.device, batch.shape)
    exponentials = patches.new_empty(programs, batch.shape.rows, P)
    with on_device(patches):
        for bucket, (slot, tiles) in enumerate(batch.packed.tiles(batch.shape.rows)):
            _local_alignment_loss_kernel[(min(tiles * M, programs),)](
                *batch.pointers(),
                grams,
                *temps,
                exponentials,
                scores,
                M,
                P,
                D,
                bucket,
                SLOT=slot,
                **batch.constants(),
            )
    return scores


def backward(
    d_scores: Tensor,
    scores: Tensor,
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    temp_attention: Tensor,
    temp_words: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of patches, tokens and both temperatures in fp32.

    A chunk of words and images at a time: the gradient of the similarities, E, and E times the
    gradient of |c|^2; then products of these with the features and with each other.

    Args:
        d_scores: [N, M].
        scores: [N, M], as `forward` returned them.
        patches: [M, P, D].
        tokens: [N, T, D].
        token_mask: [N, T].
        patch_mask: [M, P] or None.
        temp_attention: [].
        temp_words: [].
    """
    inputs = (patches, tokens, token_mask, patch_mask)
    temps = (temp_attention.float(), temp_words.float())
    batch = _Batch(*inputs, is_backward=True)
    packed, shape = batch.packed, batch.shape
    M, P, D = batch.patches.shape
    T = tokens.shape[1]
    d_scores, scores = d_scores.float().contiguous(), scores.contiguous()
    units = batch.units(d_scores, temps[1])
    images, pieces = gradient_chunk(M, P, packed.pieces, T, 3 * patches.element_size())
    buffers = patches.new_empty(3, pieces * T * images * P)
    factors = patches.new_empty(images, pieces * T, dtype=torch.float32)
    d_patches = torch.empty_like(batch.patches, dtype=torch.float32)
    d_words = torch.empty_like(packed.words, dtype=torch.float32)
    d_temps = patches.new_zeros(2, dtype=torch.float64)
    with on_device(patches):
        for start, stop in chunks(M, images):
            wave = batch.patches[start:stop]
            grams = wave @ wave.mT
            d_grams = torch.empty_like(grams, dtype=torch.float32)
            size = pieces * T * len(wave) * P
            views = buffers[:, :size].view(3, pieces * T, len(wave), P).unbind()
            d_similarity, exponentials, weighted = views
            for first, last in chunks(packed.pieces, pieces):
                for bucket, (slot, tiles) in enumerate(packed.tiles(shape.rows)):
                    tiles = min(tiles, triton.cdiv(last - first, shape.rows // slot))
                    programs = min(tiles * len(wave), programs_on(patches.device, shape))
                    sums = patches.new_empty(programs, 2, dtype=torch.float32)
                    _local_alignment_loss_gradient_kernel[(programs,)](
                        *batch.pointers(start),
                        grams,
                        *temps,
                        exponentials,
                        scores,
                        d_scores,
                        units,
                        d_similarity,
                        weighted,
                        factors,
                        sums,
                        M,
                        P,
                        D,
                        pieces * T,
                        len(wave),
                        start,
                        bucket,
                        first,
                        last,
                        SLOT=slot,
                        PARTS=shape.parts,
                        **batch.constants(),
                    )
                    d_temps += sums.sum(0, dtype=torch.float64)
                add_word_products(
                    d_words,
                    d_similarity.flatten(1),
                    wave.flatten(0, 1),
                    packed,
                    first,
                    last,
                    accumulate=start > 0,
                    factors=factors[: len(wave)],
                )
                add_sums_over_words(
                    d_patches[start:stop].view(1, -1, D),
                    d_similarity.flatten(1)[:, None],
                    packed.words[:, None],
                    packed,
                    first,
                    last,
                    accumulate=first > 0,
                )
                add_sums_over_words(
                    d_grams, weighted, exponentials, packed, first, last, accumulate=first > 0
                )
            # The Gram matrix is symmetric: the kernel has doubled the gradient of |c|^2.
            d_patches[start:stop].mul_(units[0]).baddbmm_(d_grams.mul_(units[1]), wave.float())
    d_patches = d_patches[:, : patches.shape[1], : patches.shape[2]].contiguous()
    return (
        d_patches,
        packed.unpack(d_words, tokens).mul_(units[0]),
        d_temps[0].float() * units[0],
        d_temps[1].float(),
    )


class _Batch:
    """A batch as the kernels take it. P and D are padded to multiples of 16.

    Kernels look at both: what they know to be such a multiple they load by 16 bytes, and ahead.
    """

    def __init__(
        self,
        patches: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        patch_mask: Tensor | None,
        is_backward: bool,
    ) -> None:
        T = tokens.shape[1]
        self._precision = precision_of(patches)
        is_interpreted = not patches.is_cuda
        if is_interpreted:
            self.shape = _with_room(INTERPRETED, T)
        else:
            architecture = architecture_of(patches.device)
            self.shape = shape_of(self._precision, architecture, T, is_backward)
        self.packed: Packed = pack(tokens, token_mask, self.shape.rows, is_interpreted)
        self._norms = torch.linalg.vector_norm(self.packed.words, dim=1, dtype=torch.float32)
        features, mask = patches_of(patches, patch_mask)
        missing = -patches.shape[1] % 16
        self.patches = F.pad(features, (0, 0, 0, missing))
        self._mask = F.pad(mask, (0, missing))

    def pointers(self, first_image: int = 0) -> tuple[Tensor, ...]:
        """Return the first arguments of both kernels, images from one on."""
        packed = self.packed
        return (
            packed.words,
            self._norms,
            packed.order,
            packed.starts,
            packed.buckets,
            self.patches[first_image:],
            self._mask[first_image:],
        )

    def constants(self) -> dict[str, object]:
        """Return the arguments of both kernels that they are compiled for, but for the slot."""
        return constants(self.shape, self._precision) | {
            "MAX_TEMPERATURE": max_temperature(self.patches.dtype)
        }

    def units(self, d_scores: Tensor, temp_words: Tensor) -> Tensor:
        """Return what the two gradients that are kept are divided by, so that fp16 holds them.

        They grow as the inverse of the features, which other dtypes hold as well.
        """
        if self.patches.dtype != torch.float16:
            return d_scores.new_ones(2)
        # Root mean squares of the norms of what counts.
        words = (self._norms.square().sum() / self.packed.counts.sum()).sqrt()
        patches = torch.linalg.vector_norm(self.patches, dtype=torch.float32)
        patches = patches / self._mask.sum().sqrt()
        largest = d_scores.abs().amax() * temp_words.abs() / gradient_boost(torch.float16)
        units = largest / torch.stack([words * patches, patches * patches])
        # Where something is zero there is nothing to scale.
        return torch.where((units > 0) & units.isfinite(), units, 1.0)


def max_temperature(dtype: torch.dtype) -> float:
    """Return up to which magnitude of the temperature one shift serves all exponentials."""
    return _MAX_TEMPERATURE.get(dtype, _MAX_TEMPERATURE_OTHERS)


def _with_room(shape: Shape, words: int) -> Shape:
    """Return a shape whose rows hold `words`: as many entries in a tile, or in a thread."""
    while shape.rows < words:
        is_narrow = shape.columns == 16
        shape = Shape(
            2 * shape.rows,
            shape.columns if is_narrow else shape.columns // 2,
            max(shape.features // 2, 16),
            2 * shape.warps if is_narrow else shape.warps,
            min(shape.stages, 2),
        )
    return shape


@triton.jit(do_not_specialize=SIZES)
def _local_alignment_loss_kernel(
    words_ptr,
    norms_ptr,
    order_ptr,
    starts_ptr,
    buckets_ptr,
    patches_ptr,
    mask_ptr,
    grams_ptr,
    temp_attention_ptr,
    temp_words_ptr,
    exponentials_ptr,
    scores_ptr,
    M,
    P,
    D,
    bucket,
    SLOT: tl.constexpr,
    MAX_TEMPERATURE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the scores of tile after tile of the captions that have slots of one size."""
    SLOTS: tl.constexpr = BLOCK_R // SLOT
    first = tl.load(buckets_ptr + bucket)
    stop = tl.load(buckets_ptr + bucket + 1)
    tiles = tile_count(first, stop, SLOTS)
    temp_attention, temp_words = tl.load(temp_attention_ptr), tl.load(temp_words_ptr)
    exponentials_ptr += tl.program_id(0).to(tl.int64) * BLOCK_R * P
    offs_r, offs_s = tl.arange(0, BLOCK_R), tl.arange(0, SLOTS)
    for index in range(tl.program_id(0), tiles * M, tl.num_programs(0)):
        tile, image = tile_and_image(index, tiles, M)
        image = image.to(tl.int64)
        start = first + tile * SLOTS
        _, word, _, is_word = rows_of(starts_ptr, start, stop, SLOT, BLOCK_R)
        total, dot, square = _contexts(
            words_ptr,
            patches_ptr + image * P * D,
            mask_ptr + image * P,
            grams_ptr + image * P * P,
            exponentials_ptr,
            word,
            is_word,
            offs_r,
            temp_attention,
            P,
            D,
            SLOT,
            MAX_TEMPERATURE,
            BLOCK_R,
            BLOCK_C,
            BLOCK_D,
            PRECISION,
        )
        # The next turn overwrites what others may not yet have read.
        tl.debug_barrier()
        word_norm = tl.load(norms_ptr + word)
        dot /= total
        norm = word_norm * _length(square, dot, word_norm, 1 / total)
        cosine = dot / tl.maximum(norm, _MIN_NORM)
        logits = tl.where(is_word, cosine * temp_words, -float("inf"))
        logits = tl.reshape(logits, (SLOTS, SLOT))
        highest = tl.max(logits, 1)
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        score = shift + tl.log(tl.sum(tl.exp(logits - shift[:, None]), 1))
        mask_s = start + offs_s < stop
        caption = tl.load(order_ptr + start + offs_s, mask=mask_s, other=0).to(tl.int64)
        tl.store(scores_ptr + caption * M + image, score, mask=mask_s)


@triton.jit(do_not_specialize=SIZES)
def _local_alignment_loss_gradient_kernel(
    words_ptr,
    norms_ptr,
    order_ptr,
    starts_ptr,
    buckets_ptr,
    patches_ptr,
    mask_ptr,
    grams_ptr,
    temp_attention_ptr,
    temp_words_ptr,
    exponentials_ptr,
    scores_ptr,
    d_scores_ptr,
    units_ptr,
    d_similarity_ptr,
    weighted_ptr,
    factors_ptr,
    sums_ptr,
    M,
    P,
    D,
    rows,
    images,
    first_image,
    bucket,
    first_piece,
    stop_piece,
    SLOT: tl.constexpr,
    MAX_TEMPERATURE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store a chunk's gradient of the similarities and E times that of |c|^2, and sums over it.

    The sums are of the gradients of the temperatures, and of each word's norm.
    """
    SLOTS: tl.constexpr = BLOCK_R // SLOT
    WIDTH: tl.constexpr = BLOCK_C // PARTS
    first = tl.maximum(tl.load(buckets_ptr + bucket), first_piece)
    stop = tl.minimum(tl.load(buckets_ptr + bucket + 1), stop_piece)
    tiles = tile_count(first, stop, SLOTS)
    first_word = tl.load(starts_ptr + first_piece)
    temp_attention, temp_words = tl.load(temp_attention_ptr), tl.load(temp_words_ptr)
    scale = 1.0 / tl.load(units_ptr)
    ratio = tl.load(units_ptr) / tl.load(units_ptr + 1)
    # Of one element: for Blackwell, Triton 3.6 fails at sums of a product's vectors to a scalar.
    d_temp_attention, d_temp_words = tl.zeros((1,), tl.float32), 0.0
    for index in range(tl.program_id(0), tiles * images, tl.num_programs(0)):
        tile, image = tile_and_image(index, tiles, images)
        image = image.to(tl.int64)
        start = first + tile * SLOTS
        piece, word, _, is_word = rows_of(starts_ptr, start, stop, SLOT, BLOCK_R)
        # A word's place in the chunk; of the rows that are no words only that it exists matters.
        local = tl.where(is_word, word - first_word, 0).to(tl.int32)
        image_ptr, gram_ptr = patches_ptr + image * P * D, grams_ptr + image * P * P
        place = local * images + image.to(tl.int32)
        total, dot, square = _contexts(
            words_ptr,
            image_ptr,
            mask_ptr + image * P,
            gram_ptr,
            exponentials_ptr,
            word,
            is_word,
            place,
            temp_attention,
            P,
            D,
            SLOT,
            MAX_TEMPERATURE,
            BLOCK_R,
            BLOCK_C,
            BLOCK_D,
            PRECISION,
        )
        inverse = 1.0 / total
        dot *= inverse
        word_norm = tl.load(norms_ptr + word)
        norm = _length(square, dot, word_norm, inverse)
        divisor = word_norm * norm
        cosine = dot / tl.maximum(divisor, _MIN_NORM)

        caption = tl.load(order_ptr + piece, mask=is_word, other=0).to(tl.int64)
        pair = caption * M + first_image + image
        score = tl.load(scores_ptr + pair, mask=is_word, other=0.0)
        d_score = tl.load(d_scores_ptr + pair, mask=is_word, other=0.0)
        # A word takes the share of its caption's gradient that it has in the log-sum-exp.
        d_logit = tl.where(is_word, tl.exp(cosine * temp_words - score) * d_score, 0.0)
        d_temp_words += tl.sum(tl.where(is_word, d_logit * cosine, 0.0), 0)
        d_dot = d_logit * scale * temp_words / tl.maximum(divisor, _MIN_NORM)
        d_divisor = tl.where(divisor > _MIN_NORM, -d_dot * cosine, 0.0)
        factor = d_divisor * norm / tl.maximum(word_norm, _TINY)
        tl.store(factors_ptr + image * rows + local, factor, mask=is_word)
        # Twice the gradient of |c|^2; `inner` is the sum of attention times its gradient.
        d_square = d_divisor * word_norm / tl.maximum(norm, _TINY)
        inner = d_dot * dot + d_square * norm * norm
        d_mixed = d_square * inverse

        for patch in range(0, P, BLOCK_C):
            similarity = similarities(
                words_ptr,
                image_ptr,
                word,
                patch,
                P,
                D,
                BLOCK_R,
                BLOCK_C,
                BLOCK_D,
                PRECISION,
            )
            mixed = _mixed(
                exponentials_ptr, gram_ptr, place, patch, P, BLOCK_R, BLOCK_C, BLOCK_D, PRECISION
            )
            similarity_parts = side_by_side(similarity, BLOCK_R, BLOCK_C, PARTS)
            mixed_parts = side_by_side(mixed, BLOCK_R, BLOCK_C, PARTS)
            for k in tl.static_range(PARTS):
                offs_p = patch + k * WIDTH + tl.arange(0, WIDTH)
                offs = (place * P)[:, None] + offs_p[None, :]
                mask = is_word[:, None] & (offs_p < P)[None, :]
                exponentials = tl.load(exponentials_ptr + offs, mask=mask, other=0.0)
                attention = exponentials.to(tl.float32) * inverse[:, None]
                _store_clamped(weighted_ptr + offs, attention * (d_mixed * ratio)[:, None], mask)
                share = over_words(similarity_parts[k], is_word, SLOT, BLOCK_R, WIDTH)
                d_attention = similarity_parts[k] * d_dot[:, None] - inner[:, None]
                d_attention += mixed_parts[k] * d_mixed[:, None]
                # What softmax over the patches sends back, times the share.
                d_shares = tl.where(mask, attention * d_attention * share, 0.0)
                d_temp_attention += tl.sum(tl.sum(d_shares, 1, keep_dims=True), 0)
                d_shares *= temp_attention
                d_sum = tl.sum(by_slot(d_shares, SLOT, BLOCK_R, WIDTH), 1)
                d_sum = tl.broadcast_to(d_sum[:, None, :], (SLOTS, SLOT, WIDTH))
                d_sum = tl.reshape(d_sum, (BLOCK_R, WIDTH))
                gradient = attention * d_dot[:, None] + d_shares - share * d_sum
                _store_clamped(d_similarity_ptr + offs, gradient, mask)
        # The chunk is not overwritten before the kernel ends, so no barrier.
    tl.store(sums_ptr + 2 * tl.program_id(0) + tl.arange(0, 1), d_temp_attention)
    tl.store(sums_ptr + 2 * tl.program_id(0) + 1, d_temp_words)


@triton.jit
def _contexts(
    words_ptr,
    image_ptr,
    mask_ptr,
    gram_ptr,
    exponentials_ptr,
    word,
    is_word,
    row,
    temperature,
    P,
    D,
    SLOT: tl.constexpr,
    MAX_TEMPERATURE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store E, at rows `row` of P entries each, and return sums over the patches.

    Returns:
        The sums of E, of E times the similarity, and of E G E.
    """
    offs_c = tl.arange(0, BLOCK_C)
    # Exponents are between -t / 2 and t / 2.
    shift = tl.zeros((BLOCK_R,), tl.float32) + temperature / 2
    if (tl.abs(temperature) <= MAX_TEMPERATURE) == 0:
        shift = tl.full((BLOCK_R,), -float("inf"), tl.float32)
        for patch in range(0, P, BLOCK_C):
            similarity = similarities(
                words_ptr, image_ptr, word, patch, P, D, BLOCK_R, BLOCK_C, BLOCK_D, PRECISION
            )
            counts = tl.load(mask_ptr + patch + offs_c, mask=offs_c < P - patch, other=0) != 0
            share = over_words(similarity, is_word, SLOT, BLOCK_R, BLOCK_C)
            exponent = tl.where(counts[None, :], share * temperature, -float("inf"))
            shift = tl.maximum(shift, tl.max(exponent, 1))
    total = tl.zeros((BLOCK_R,), tl.float32)
    dot = tl.zeros((BLOCK_R,), tl.float32)
    for patch in range(0, P, BLOCK_C):
        similarity = similarities(
            words_ptr, image_ptr, word, patch, P, D, BLOCK_R, BLOCK_C, BLOCK_D, PRECISION
        )
        counts = tl.load(mask_ptr + patch + offs_c, mask=offs_c < P - patch, other=0) != 0
        share = over_words(similarity, is_word, SLOT, BLOCK_R, BLOCK_C)
        exponentials = tl.exp2((share * temperature - shift[:, None]) * LOG2E)
        exponentials = tl.where(counts[None, :], exponentials, 0.0)
        # Rounded for all sums alike: a cosine of what is rounded is at most 1.
        exponentials = exponentials.to(exponentials_ptr.dtype.element_ty)
        ptrs = exponentials_ptr + (row * P)[:, None] + (patch + offs_c)[None, :]
        tl.store(ptrs, exponentials, mask=is_word[:, None] & (offs_c < P - patch)[None, :])
        exponentials = exponentials.to(tl.float32)
        total += tl.sum(exponentials, 1)
        dot += tl.sum(exponentials * similarity, 1)
    # What a thread stored others are to read.
    tl.debug_barrier()
    square = tl.zeros((BLOCK_R,), tl.float32)
    for patch in range(0, P, BLOCK_C):
        mixed = _mixed(
            exponentials_ptr, gram_ptr, row, patch, P, BLOCK_R, BLOCK_C, BLOCK_D, PRECISION
        )
        ptrs = exponentials_ptr + (row * P)[:, None] + (patch + offs_c)[None, :]
        exponentials = tl.load(ptrs, mask=(offs_c < P - patch)[None, :], other=0.0)
        square += tl.sum(mixed * exponentials.to(tl.float32), 1)
    return total, dot, tl.maximum(square, 0.0)


@triton.jit
def _length(square, dot, word_norm, inverse):
    """Return a context's length; of one that nearly vanishes rounding may leave less than this."""
    return tl.maximum(tl.sqrt(square) * inverse, tl.abs(dot) / tl.maximum(word_norm, _TINY))


@triton.jit
def _mixed(
    exponentials_ptr,
    gram_ptr,
    row,
    patch,
    P,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return E G of a tile's rows and the patches from `patch` on."""
    # G is symmetric: its rows are its columns.
    return similarities(
        exponentials_ptr,
        gram_ptr,
        row,
        patch,
        P,
        P,
        BLOCK_R,
        BLOCK_C,
        BLOCK_D,
        PRECISION,
    )


@triton.jit
def _store_clamped(ptrs, values, mask):
    """Store values; fp16 has its largest in place of larger ones, which would spoil products."""
    if ptrs.dtype.element_ty == tl.float16:
        values = tl.where(values > 65504.0, 65504.0, values)
        values = tl.where(values < -65504.0, -65504.0, values)
    tl.store(ptrs, values.to(ptrs.dtype.element_ty), mask=mask)
