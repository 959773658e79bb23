# mypy: allow-untyped-defs
"""sparc_loss and its gradients on a GPU: one program per pair and kernel, in Triton.

A program walks over its caption's words and its image's patches block by block; what one block
leaves for another lies in memory of the program's own. Letters: B pairs, T tokens, n of them words
that count, P patches, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from medfast.ops import tiles
from medfast.ops.sparc import reference
from medfast.ops.triton_tiles import architecture_of, log1p, on_device, operand, precision_of
from medfast.ops.workspace import workspace_bytes

CONSTANT = tl.constexpr(reference.CONSTANT)
MIN_NORM = tl.constexpr(reference.MIN_NORM)

# Arguments that change from call to call: no kernel is compiled anew for another value.
SIZES = ["first", "B", "P", "T"]

# Rows of a pair's statistics [_STATISTICS, T], each about one word.
_WORD_NORM = tl.constexpr(0)
_CONTEXT_NORM = tl.constexpr(1)
_TOTAL = tl.constexpr(2)  # of the shares
_SLOPE = tl.constexpr(3)  # of the weights in the similarities, 0 where these are constant
_ROW_LSE = tl.constexpr(4)  # over all words, of the context's logits
_COLUMN_LSE = tl.constexpr(5)  # over all contexts, of the word's
_D_OWN = tl.constexpr(6)
_OF_PULL = tl.constexpr(7)  # factors of what is stored in the dtype of the features
_OF_SIMILARITY = tl.constexpr(8)
_STATISTICS = tl.constexpr(9)


@dataclass(frozen=True)
class Blocks:
    """How much of a pair a program works on at a time, and how it is compiled."""

    words: int
    patches: int
    features: int
    warps: int
    stages: int
    # The most that a thread may take.
    registers: int = 168


# Few words, since captions are short, and few threads: three programs fit on a multiprocessor, and
# while one waits for memory another works.
_BLOCKS = {
    ("half", 80): Blocks(32, 32, 32, warps=4, stages=2),
    ("half", 90): Blocks(32, 64, 32, warps=4, stages=3),
    ("half", 100): Blocks(32, 64, 32, warps=4, stages=3),
    ("tf32", 80): Blocks(32, 32, 32, warps=4, stages=3),
    ("tf32", 90): Blocks(32, 32, 32, warps=4, stages=3),
    ("tf32", 100): Blocks(32, 32, 32, warps=4, stages=3),
    # Multiplied without tensor cores.
    ("ieee", 80): Blocks(32, 32, 16, warps=4, stages=2),
    ("ieee", 90): Blocks(32, 32, 16, warps=4, stages=2),
    ("ieee", 100): Blocks(32, 32, 16, warps=4, stages=1),
}
# Small, so that small inputs have several blocks.
_INTERPRETED = Blocks(16, 16, 16, warps=4, stages=1)


def blocks_of(precision: str, architecture: int) -> Blocks:
    """Return the blocks for a precision ("half", "tf32" or "ieee") on an architecture."""
    return _BLOCKS[precision, architecture]


def constants(blocks: Blocks, precision: str) -> dict[str, Any]:
    """Return the compile-time arguments that both kernels take."""
    return {
        "BLOCK_T": blocks.words,
        "BLOCK_P": blocks.patches,
        "BLOCK_D": blocks.features,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "maxnreg": blocks.registers,
    }


def forward(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    logit_scale: Tensor,
    threshold: float | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the loss and the gradients of patches, tokens and scale, None without `needs_grad`.

    Memory: of each pair of a launch the contexts and, in the dtype of the features, the weights
    and the gradients of both, all within the workspace. The similarities are kept of one block of
    words at a time. No atomics: runs are equal bit for bit.

    Args:
        patches: [B, P, D], fp32, bf16 or fp16.
        tokens: [B, T, D], likewise.
        token_mask: bool [B, T]; a caption without a word makes the loss NaN.
        patch_mask: bool [B, P] or None; an image without a patch makes the loss NaN.
        logit_scale: A 0-d tensor on the same device.
        threshold: Least share that counts; None is one over the number of patches that count.
        needs_grad: Whether the gradients are wanted.

    Returns:
        The loss, in fp32; the gradients of patches and tokens in fp32, or in bf16 for bf16; that of
        the scale in fp32.
    """
    (B, P, D), T = patches.shape, tokens.shape[1]
    v, w = operand(patches.flatten(0, 1)), operand(tokens.flatten(0, 1))
    width = v.shape[1]
    # fp16 does not reach down to the gradients of a mean over many pairs.
    dtype = torch.bfloat16 if patches.dtype == torch.bfloat16 else torch.float32
    # Each of its own: kernels are compiled anew for pointers that are not aligned.
    losses, d_scales = (patches.new_empty(B, dtype=torch.float32) for _ in range(2))
    d_patches = d_tokens = None
    if needs_grad:
        d_patches, d_tokens = torch.empty_like(v, dtype=dtype), torch.empty_like(w, dtype=dtype)
    precision = precision_of(v)
    blocks = blocks_of(precision, architecture_of(v.device)) if v.is_cuda else _INTERPRETED
    of_forward = _forward_memory(T, P, width, blocks.words, v.dtype)
    kinds = of_forward | (_gradient_memory(T, P, width, v.dtype) if needs_grad else {})
    bytes_per_pair = sum(math.prod(shape) * kind.itemsize for shape, kind in kinds.values())
    parts = list(tiles.blocks(B, max(1, workspace_bytes() // bytes_per_pair)))
    most = max(part.stop - part.start for part in parts)
    memory = {
        name: v.new_empty((most, *shape), dtype=kind) for name, (shape, kind) in kinds.items()
    }
    shared = {
        "patches_ptr": v,
        "tokens_ptr": w,
        "token_mask_ptr": _bytes_of(token_mask),
        # Without a mask of patches it is not read.
        "patch_mask_ptr": _bytes_of(token_mask if patch_mask is None else patch_mask),
        "scale_ptr": logit_scale.float(),
        "P": P,
        "T": T,
        "D": width,
        "stride": _row_of(P),
        "HAS_MASK": patch_mask is not None,
        **constants(blocks, precision),
    }
    with on_device(v):
        for part in parts:
            grid = (part.stop - part.start,)
            _sparc_loss_forward_kernel[grid](
                **shared,
                **{name: memory[name] for name in of_forward},
                losses_ptr=losses,
                first=part.start,
                threshold=0.0 if threshold is None else float(threshold),
                HAS_THRESHOLD=threshold is not None,
            )
            if needs_grad:
                _sparc_loss_gradient_kernel[grid](
                    **shared,
                    **memory,
                    d_patches_ptr=d_patches,
                    d_tokens_ptr=d_tokens,
                    d_scales_ptr=d_scales,
                    first=part.start,
                    B=B,
                )
    if d_patches is None or d_tokens is None:
        return losses.mean(), None, None, None
    d_scale = d_scales.sum(dtype=torch.float64).float()
    # Without the features that `operand` added.
    of_patches, of_tokens = (
        gradient[:, :D].contiguous().unflatten(0, (B, -1)) for gradient in (d_patches, d_tokens)
    )
    return losses.mean(), of_patches, of_tokens, d_scale


def _forward_memory(
    T: int, P: int, D: int, block: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and the dtype of what the forward leaves of a pair."""
    return {
        "places_ptr": ((T,), torch.int32),
        "lowest_ptr": ((T,), torch.int32),
        "length_ptr": ((), torch.int32),
        "statistics_ptr": ((_STATISTICS.value, T), torch.float32),
        "rows_ptr": ((block, _row_of(P)), torch.float32),
        "shares_ptr": ((T, _row_of(P)), dtype),
        "contexts_ptr": ((T, D), torch.float32),
        "cosines_ptr": ((T, T), torch.float32),
    }


def _gradient_memory(
    T: int, P: int, D: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return what the gradient needs besides."""
    return {"pulls_ptr": ((T, D), dtype), "d_similarity_ptr": ((T, _row_of(P)), dtype)}


def _row_of(P: int) -> int:
    """Return the room for a row of P similarities: loads of 16 bytes need aligned rows."""
    return triton.cdiv(P, 16) * 16


def _bytes_of(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)


@triton.jit(do_not_specialize=SIZES)
def _sparc_loss_forward_kernel(
    patches_ptr,
    tokens_ptr,
    token_mask_ptr,
    patch_mask_ptr,
    scale_ptr,
    places_ptr,
    lowest_ptr,
    length_ptr,
    statistics_ptr,
    rows_ptr,
    shares_ptr,
    contexts_ptr,
    cosines_ptr,
    losses_ptr,
    first,
    P,
    T,
    D,
    stride,
    threshold,
    HAS_MASK: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store a pair's loss, and the words' shares of the patches, contexts and cosines."""
    # Pairs are int64: B * P * D passes 2**31 at 22,000 images of 196 x 512.
    slot = tl.program_id(0).to(tl.int64)
    pair = first + slot
    patches_ptr += pair * P * D
    tokens_ptr += pair * T * D
    token_mask_ptr += pair * T
    patch_mask_ptr += pair * P
    places_ptr += slot * T
    lowest_ptr += slot * T
    statistics_ptr += slot * T * _STATISTICS
    rows_ptr += slot * BLOCK_T * stride
    shares_ptr += slot * T * stride
    contexts_ptr += slot * T * D
    cosines_ptr += slot * T * T
    scale = tl.load(scale_ptr)

    n = _move_words_together(token_mask_ptr, places_ptr, T, BLOCK_T)
    tl.store(length_ptr + slot, n)
    least = threshold
    if not HAS_THRESHOLD:
        least = tl.div_rn(1.0, _count(patch_mask_ptr, P, HAS_MASK, BLOCK_P))
    for start in range(0, n, BLOCK_T):
        # What others wrote can be read, and what they have read be written over.
        tl.debug_barrier()
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < n
        place = tl.load(places_ptr + offs_t, mask=mask_t, other=0)
        word_ptrs = tokens_ptr + place * D

        low = tl.full((BLOCK_T,), float("inf"), tl.float32)
        high = tl.full((BLOCK_T,), -float("inf"), tl.float32)
        for p in range(0, P, BLOCK_P):
            offs_p, mask_p = _counted(patch_mask_ptr, p, P, HAS_MASK, BLOCK_P)
            patch_ptrs = patches_ptr + offs_p * D
            similarity = _products(
                word_ptrs, mask_t, patch_ptrs, mask_p, D, BLOCK_T, BLOCK_P, BLOCK_D, PRECISION
            )
            low = tl.minimum(low, tl.min(tl.where(mask_p, similarity, float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(mask_p, similarity, -float("inf")), 1))
            row_ptrs = rows_ptr + (tl.arange(0, BLOCK_T) * stride)[:, None] + offs_p
            tl.store(row_ptrs, similarity, mask=(offs_p < stride)[None, :])

        tl.debug_barrier()
        spread = high - low
        is_constant = spread <= tl.maximum(tl.abs(high), tl.abs(low)) * CONSTANT
        divisor = tl.where(is_constant, 1.0, spread)
        total = tl.zeros((BLOCK_T,), tl.float32)
        lowest = tl.zeros((BLOCK_T,), tl.int32) + P
        for p in range(0, P, BLOCK_P):
            offs_p, mask_p = _counted(patch_mask_ptr, p, P, HAS_MASK, BLOCK_P)
            inside = (offs_p < stride)[None, :]
            row_ptrs = rows_ptr + (tl.arange(0, BLOCK_T) * stride)[:, None] + offs_p
            similarity = tl.load(row_ptrs, mask=inside, other=0.0)
            is_lowest = mask_p & (similarity == low[:, None])
            lowest = tl.minimum(lowest, tl.min(tl.where(is_lowest, offs_p, P), 1))
            # Rounded as IEEE demands it: the highest has a share of exactly 1.
            share = tl.div_rn(similarity - low[:, None], divisor[:, None])
            # NaN is not below anything, and stays.
            share = tl.where(share < least, 0.0, share)
            share = tl.where(is_constant[:, None], 1.0, share)
            share = tl.where(mask_p, share, 0.0)
            total += tl.sum(share, 1)
            share_ptrs = shares_ptr + (offs_t * stride)[:, None] + offs_p
            tl.store(share_ptrs, share.to(shares_ptr.dtype.element_ty), mask_t[:, None] & inside)
        slope = tl.where(is_constant, 0.0, 1.0 / (total * divisor))
        tl.store(lowest_ptr + offs_t, lowest, mask_t)
        tl.store(statistics_ptr + T * _TOTAL + offs_t, total, mask_t)
        tl.store(statistics_ptr + T * _SLOPE + offs_t, slope, mask_t)

        tl.debug_barrier()
        context_square = tl.zeros((BLOCK_T,), tl.float32)
        word_square = tl.zeros((BLOCK_T,), tl.float32)
        for d in range(0, D, BLOCK_D):
            context = _weighted_rows(
                shares_ptr + offs_t * stride,
                mask_t,
                patches_ptr,
                patch_mask_ptr,
                d,
                P,
                D,
                stride,
                HAS_MASK,
                BLOCK_T,
                BLOCK_P,
                BLOCK_D,
                PRECISION,
            )
            context /= total[:, None]
            offs_d = d + tl.arange(0, BLOCK_D)
            inside = mask_t[:, None] & (offs_d < D)[None, :]
            tl.store(contexts_ptr + (place * D)[:, None] + offs_d, context, inside)
            context_square += tl.sum(context * context, 1)
            word = tl.load(word_ptrs[:, None] + offs_d, mask=inside, other=0.0).to(tl.float32)
            word_square += tl.sum(word * word, 1)
        tl.store(statistics_ptr + T * _CONTEXT_NORM + offs_t, tl.sqrt(context_square), mask_t)
        tl.store(statistics_ptr + T * _WORD_NORM + offs_t, tl.sqrt(word_square), mask_t)

    tl.debug_barrier()
    for x in range(0, n, BLOCK_T):
        for y in range(0, n, BLOCK_T):
            offs_x, offs_y = x + tl.arange(0, BLOCK_T), y + tl.arange(0, BLOCK_T)
            cosines = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
            for d in tl.range(0, D, BLOCK_D, num_stages=1):
                context = _units(
                    contexts_ptr,
                    statistics_ptr + T * _CONTEXT_NORM,
                    places_ptr,
                    offs_x,
                    n,
                    d,
                    D,
                    BLOCK_D,
                ).to(tokens_ptr.dtype.element_ty)
                word = _units(
                    tokens_ptr,
                    statistics_ptr + T * _WORD_NORM,
                    places_ptr,
                    offs_y,
                    n,
                    d,
                    D,
                    BLOCK_D,
                ).to(tokens_ptr.dtype.element_ty)
                cosines = tl.dot(context, tl.trans(word), cosines, input_precision=PRECISION)
            inside = (offs_x < n)[:, None] & (offs_y < n)[None, :]
            tl.store(cosines_ptr + (offs_x * T)[:, None] + offs_y, cosines, inside)

    tl.debug_barrier()
    losses = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, n, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < n
        own = tl.load(cosines_ptr + offs_t * (T + 1), mask=mask_t, other=0.0) * scale
        # The own logit stays outside the sums.
        of_row = _log_sum_of_others(cosines_ptr, offs_t, n, T, 1, scale, BLOCK_T) - own
        of_column = _log_sum_of_others(cosines_ptr, offs_t, n, 1, T, scale, BLOCK_T) - own
        row_loss, column_loss = _softplus(of_row), _softplus(of_column)
        losses += tl.where(mask_t, row_loss + column_loss, 0.0)
        d_own = -_sigmoid(of_row) - _sigmoid(of_column)
        tl.store(statistics_ptr + T * _ROW_LSE + offs_t, own + row_loss, mask_t)
        tl.store(statistics_ptr + T * _COLUMN_LSE + offs_t, own + column_loss, mask_t)
        tl.store(statistics_ptr + T * _D_OWN + offs_t, d_own, mask_t)
    tl.store(losses_ptr + pair, tl.sum(losses) / (2.0 * n))


@triton.jit(do_not_specialize=SIZES)
def _sparc_loss_gradient_kernel(
    patches_ptr,
    tokens_ptr,
    token_mask_ptr,
    patch_mask_ptr,
    scale_ptr,
    places_ptr,
    lowest_ptr,
    length_ptr,
    statistics_ptr,
    rows_ptr,
    shares_ptr,
    contexts_ptr,
    cosines_ptr,
    pulls_ptr,
    d_similarity_ptr,
    d_patches_ptr,
    d_tokens_ptr,
    d_scales_ptr,
    first,
    B,
    P,
    T,
    D,
    stride,
    HAS_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the gradients of a pair's patches and tokens, and its share of the scale's."""
    slot = tl.program_id(0).to(tl.int64)
    pair = first + slot
    patches_ptr += pair * P * D
    tokens_ptr += pair * T * D
    token_mask_ptr += pair * T
    patch_mask_ptr += pair * P
    d_patches_ptr += pair * P * D
    d_tokens_ptr += pair * T * D
    places_ptr += slot * T
    lowest_ptr += slot * T
    statistics_ptr += slot * T * _STATISTICS
    rows_ptr += slot * BLOCK_T * stride
    shares_ptr += slot * T * stride
    contexts_ptr += slot * T * D
    cosines_ptr += slot * T * T
    pulls_ptr += slot * T * D
    d_similarity_ptr += slot * T * stride
    scale = tl.load(scale_ptr)
    n = tl.load(length_ptr + slot)
    DTYPE: tl.constexpr = tokens_ptr.dtype.element_ty
    # Of the mean over words, directions and pairs.
    share_of_word = 1.0 / (2.0 * n * B)

    # What is stored, or multiplied, in the dtype of the features is of the order of 1: fp16 reaches
    # neither to gradients nor to what a small norm or spread makes of them. Factors restore it.
    d_scale = tl.zeros((BLOCK_T,), tl.float32)
    most_pull, most_similarity = 0.0, 0.0
    for start in range(0, n, BLOCK_T):
        tl.debug_barrier()
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < n
        place = tl.load(places_ptr + offs_t, mask=mask_t, other=0)
        top, along = _gradient_of_cosines(
            cosines_ptr,
            statistics_ptr + T * _ROW_LSE,
            statistics_ptr + T * _COLUMN_LSE,
            statistics_ptr + T * _D_OWN,
            offs_t,
            n,
            T,
            1,
            scale,
            BLOCK_T,
        )
        d_scale += along
        for d in range(0, D, BLOCK_D):
            pull = _pull(
                contexts_ptr,
                statistics_ptr + T * _CONTEXT_NORM,
                statistics_ptr + T * _ROW_LSE,
                tokens_ptr,
                statistics_ptr + T * _WORD_NORM,
                statistics_ptr + T * _COLUMN_LSE,
                statistics_ptr + T * _D_OWN,
                cosines_ptr,
                places_ptr,
                top,
                along,
                offs_t,
                d,
                n,
                D,
                T,
                1,
                scale,
                DTYPE,
                BLOCK_T,
                BLOCK_D,
                PRECISION,
            )
            offs_d = d + tl.arange(0, BLOCK_D)
            pull_ptrs = pulls_ptr + (place * D)[:, None] + offs_d
            tl.store(pull_ptrs, pull.to(DTYPE), mask_t[:, None] & (offs_d < D)[None, :])
        norm = tl.load(statistics_ptr + T * _CONTEXT_NORM + offs_t, mask=mask_t, other=1.0)
        total = tl.load(statistics_ptr + T * _TOTAL + offs_t, mask=mask_t, other=1.0)
        slope = tl.load(statistics_ptr + T * _SLOPE + offs_t, mask=mask_t, other=0.0)
        factor = tl.where(mask_t, scale * share_of_word * top / tl.maximum(norm, MIN_NORM), 0.0)
        of_pull = factor / total
        tl.store(statistics_ptr + T * _OF_PULL + offs_t, of_pull, mask_t)
        most_pull = tl.maximum(most_pull, tl.max(tl.abs(of_pull)))

        tl.debug_barrier()
        weighted = tl.zeros((BLOCK_T,), tl.float32)
        plain = tl.zeros((BLOCK_T,), tl.float32)
        count = tl.zeros((BLOCK_T,), tl.float32)
        top = tl.zeros((BLOCK_T,), tl.float32)
        for p in range(0, P, BLOCK_P):
            offs_p, mask_p = _counted(patch_mask_ptr, p, P, HAS_MASK, BLOCK_P)
            inside = (offs_p < stride)[None, :]
            d_weight = _products(
                pulls_ptr + place * D,
                mask_t,
                patches_ptr + offs_p * D,
                mask_p,
                D,
                BLOCK_T,
                BLOCK_P,
                BLOCK_D,
                PRECISION,
            )
            share_ptrs = shares_ptr + (offs_t * stride)[:, None] + offs_p
            share = tl.load(share_ptrs, mask=mask_t[:, None] & inside, other=0.0).to(tl.float32)
            d_weight = tl.where(share != 0.0, d_weight, 0.0)
            weighted += tl.sum(share * d_weight, 1)
            plain += tl.sum(d_weight, 1)
            count += tl.sum((share != 0.0).to(tl.float32), 1)
            top = tl.maximum(top, tl.max(tl.abs(d_weight), 1))
            row_ptrs = rows_ptr + (tl.arange(0, BLOCK_T) * stride)[:, None] + offs_p
            tl.store(row_ptrs, d_weight, mask=inside)

        tl.debug_barrier()
        mean = weighted / total
        top += tl.abs(mean)
        top = tl.where(top == 0.0, 1.0, top)
        # The lowest moves every share of its row. So does the highest, but all in proportion, and
        # that leaves the weights as they are.
        of_lowest = mean * count - plain
        lowest = tl.load(lowest_ptr + offs_t, mask=mask_t, other=0)
        for p in range(0, P, BLOCK_P):
            offs_p = p + tl.arange(0, BLOCK_P)
            inside = (offs_p < stride)[None, :]
            row_ptrs = rows_ptr + (tl.arange(0, BLOCK_T) * stride)[:, None] + offs_p
            d_weight = tl.load(row_ptrs, mask=inside, other=0.0)
            here = (offs_t * stride)[:, None] + offs_p
            share = tl.load(shares_ptr + here, mask=mask_t[:, None] & inside, other=0.0)
            d_similarity = tl.where(share != 0.0, d_weight - mean[:, None], 0.0)
            is_lowest = offs_p[None, :] == lowest[:, None]
            d_similarity += tl.where(is_lowest, of_lowest[:, None], 0.0)
            d_similarity = (d_similarity / top[:, None]).to(DTYPE)
            tl.store(d_similarity_ptr + here, d_similarity, mask_t[:, None] & inside)
        of_similarity = top * factor * slope
        tl.store(statistics_ptr + T * _OF_SIMILARITY + offs_t, of_similarity, mask_t)
        most_similarity = tl.maximum(most_similarity, tl.max(tl.abs(of_similarity)))
    tl.store(d_scales_ptr + pair, tl.sum(d_scale) * share_of_word)

    tl.debug_barrier()
    most_pull = tl.where(most_pull == 0.0, 1.0, most_pull)
    most_similarity = tl.where(most_similarity == 0.0, 1.0, most_similarity)
    for p in range(0, P, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            through_contexts = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
            through_similarities = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
            for start in tl.range(0, n, BLOCK_T, num_stages=1):
                offs_t = start + tl.arange(0, BLOCK_T)
                mask_t = offs_t < n
                place = tl.load(places_ptr + offs_t, mask=mask_t, other=0)
                here = (offs_t * stride)[:, None] + offs_p
                inside = mask_t[:, None] & (offs_p < stride)[None, :]
                words_here = (place * D)[:, None] + offs_d
                words_inside = mask_t[:, None] & (offs_d < D)[None, :]
                share = _scaled(
                    shares_ptr + here,
                    inside,
                    statistics_ptr + T * _OF_PULL + offs_t,
                    most_pull,
                    mask_t,
                )
                pull = tl.load(pulls_ptr + words_here, mask=words_inside, other=0.0)
                through_contexts = tl.dot(
                    tl.trans(share), pull, through_contexts, input_precision=PRECISION
                )
                d_similarity = _scaled(
                    d_similarity_ptr + here,
                    inside,
                    statistics_ptr + T * _OF_SIMILARITY + offs_t,
                    most_similarity,
                    mask_t,
                )
                word = tl.load(tokens_ptr + words_here, mask=words_inside, other=0.0)
                through_similarities = tl.dot(
                    tl.trans(d_similarity), word, through_similarities, input_precision=PRECISION
                )
            d_patches = through_contexts * most_pull + through_similarities * most_similarity
            tl.store(
                d_patches_ptr + (offs_p * D)[:, None] + offs_d,
                d_patches.to(d_patches_ptr.dtype.element_ty),
                mask=(offs_p < P)[:, None] & (offs_d < D)[None, :],
            )

    for start in range(0, n, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < n
        place = tl.load(places_ptr + offs_t, mask=mask_t, other=0)
        top, along = _gradient_of_cosines(
            cosines_ptr,
            statistics_ptr + T * _COLUMN_LSE,
            statistics_ptr + T * _ROW_LSE,
            statistics_ptr + T * _D_OWN,
            offs_t,
            n,
            1,
            T,
            scale,
            BLOCK_T,
        )
        norm = tl.load(statistics_ptr + T * _WORD_NORM + offs_t, mask=mask_t, other=1.0)
        factor = scale * share_of_word * top / tl.maximum(norm, MIN_NORM)
        of_similarity = tl.load(
            statistics_ptr + T * _OF_SIMILARITY + offs_t, mask=mask_t, other=0.0
        )
        for d in range(0, D, BLOCK_D):
            pull = _pull(
                tokens_ptr,
                statistics_ptr + T * _WORD_NORM,
                statistics_ptr + T * _COLUMN_LSE,
                contexts_ptr,
                statistics_ptr + T * _CONTEXT_NORM,
                statistics_ptr + T * _ROW_LSE,
                statistics_ptr + T * _D_OWN,
                cosines_ptr,
                places_ptr,
                top,
                along,
                offs_t,
                d,
                n,
                D,
                1,
                T,
                scale,
                DTYPE,
                BLOCK_T,
                BLOCK_D,
                PRECISION,
            )
            through_similarities = _weighted_rows(
                d_similarity_ptr + offs_t * stride,
                mask_t,
                patches_ptr,
                patch_mask_ptr,
                d,
                P,
                D,
                stride,
                HAS_MASK,
                BLOCK_T,
                BLOCK_P,
                BLOCK_D,
                PRECISION,
            )
            d_word = pull * factor[:, None] + through_similarities * of_similarity[:, None]
            offs_d = d + tl.arange(0, BLOCK_D)
            tl.store(
                d_tokens_ptr + (place * D)[:, None] + offs_d,
                d_word.to(d_tokens_ptr.dtype.element_ty),
                mask=mask_t[:, None] & (offs_d < D)[None, :],
            )
    _fill_others_with_zeros(token_mask_ptr, d_tokens_ptr, T, D, BLOCK_T, BLOCK_D)


@triton.jit
def _move_words_together(token_mask_ptr, places_ptr, T, BLOCK_T: tl.constexpr):
    """Store the places of a caption's words, one after the other, and return how many they are."""
    n = 0
    for t in range(0, T, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        is_word = tl.load(token_mask_ptr + offs_t, mask=offs_t < T, other=0).to(tl.int32)
        before = n + tl.cumsum(is_word, 0) - is_word
        tl.store(places_ptr + before, offs_t, mask=is_word != 0)
        n += tl.sum(is_word)
    return n


@triton.jit
def _fill_others_with_zeros(
    token_mask_ptr, d_tokens_ptr, T, D, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store zeros where a caption has no word."""
    zeros = tl.zeros((BLOCK_T, BLOCK_D), d_tokens_ptr.dtype.element_ty)
    for t in range(0, T, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        is_word = tl.load(token_mask_ptr + offs_t, mask=offs_t < T, other=1)
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask = (is_word == 0)[:, None] & (offs_d < D)[None, :]
            tl.store(d_tokens_ptr + (offs_t * D)[:, None] + offs_d, zeros, mask)


@triton.jit
def _counted(patch_mask_ptr, p, P, HAS_MASK: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return the numbers of a block's patches and which of them count."""
    offs_p = p + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    if HAS_MASK:
        mask_p = tl.load(patch_mask_ptr + offs_p, mask=mask_p, other=0) != 0
    return offs_p, mask_p


@triton.jit
def _count(patch_mask_ptr, P, HAS_MASK: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return how many patches count, in fp32."""
    count = P
    if HAS_MASK:
        count = 0
        for p in range(0, P, BLOCK_P):
            _, mask_p = _counted(patch_mask_ptr, p, P, HAS_MASK, BLOCK_P)
            count += tl.sum(mask_p.to(tl.int32))
    return count.to(tl.float32)


@triton.jit
def _products(
    x_ptrs,
    mask_x,
    y_ptrs,
    mask_y,
    D,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return `x @ y.T` in fp32, of rows that start at pointers; zeros where these are masked."""
    product = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = (offs_d < D)[None, :]
        x = tl.load(x_ptrs[:, None] + offs_d, mask=mask_x[:, None] & mask_d, other=0.0)
        y = tl.load(y_ptrs[:, None] + offs_d, mask=mask_y[:, None] & mask_d, other=0.0)
        product = tl.dot(x, tl.trans(y), product, input_precision=PRECISION)
    return product


@triton.jit
def _weighted_rows(
    weight_ptrs,
    mask_t,
    patches_ptr,
    patch_mask_ptr,
    d,
    P,
    D,
    stride,
    HAS_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the features `d` to `d + BLOCK_D` of `weights @ patches`, in fp32."""
    offs_d = d + tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]
    product = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for p in range(0, P, BLOCK_P):
        offs_p, mask_p = _counted(patch_mask_ptr, p, P, HAS_MASK, BLOCK_P)
        inside = mask_t[:, None] & (offs_p < stride)[None, :]
        weight = tl.load(weight_ptrs[:, None] + offs_p, mask=inside, other=0.0)
        patch_ptrs = patches_ptr + (offs_p * D)[:, None] + offs_d
        patch = tl.load(patch_ptrs, mask=mask_p[:, None] & mask_d, other=0.0)
        product = tl.dot(weight, patch, product, input_precision=PRECISION)
    return product


@triton.jit
def _units(x_ptr, norms_ptr, places_ptr, offs_t, n, d, D, BLOCK_D: tl.constexpr):
    """Return the features `d` to `d + BLOCK_D` of words or contexts of unit length, in fp32."""
    mask_t = offs_t < n
    offs_d = d + tl.arange(0, BLOCK_D)
    place = tl.load(places_ptr + offs_t, mask=mask_t, other=0)
    norm = tl.load(norms_ptr + offs_t, mask=mask_t, other=1.0)
    inside = mask_t[:, None] & (offs_d < D)[None, :]
    x = tl.load(x_ptr + (place * D)[:, None] + offs_d, mask=inside, other=0.0).to(tl.float32)
    return x / tl.maximum(norm, MIN_NORM)[:, None]


@triton.jit
def _log_sum_of_others(cosines_ptr, offs_x, n, stride_x, stride_y, scale, BLOCK_T: tl.constexpr):
    """Return the log-sum-exp of the logits of each x with all y but its own."""
    highest = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for y in range(0, n, BLOCK_T):
        offs_y = y + tl.arange(0, BLOCK_T)
        inside = (offs_x < n)[:, None] & (offs_y < n)[None, :]
        is_other = inside & (offs_x[:, None] != offs_y[None, :])
        here = (offs_x * stride_x)[:, None] + (offs_y * stride_y)[None, :]
        cosines = tl.load(cosines_ptr + here, mask=is_other, other=0.0)
        logits = tl.where(is_other, cosines * scale, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        # A caption of one word has no others.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        highest = higher
    return highest + tl.log(total)


@triton.jit
def _d_logits(
    cosines_ptr,
    x_lse_ptr,
    y_lse_ptr,
    d_own_ptr,
    offs_x,
    offs_y,
    n,
    stride_x,
    stride_y,
    scale,
):
    """Return the gradient of a tile's logits, but for the share of a word, and its cosines."""
    mask_x, mask_y = offs_x < n, offs_y < n
    inside = mask_x[:, None] & mask_y[None, :]
    here = (offs_x * stride_x)[:, None] + (offs_y * stride_y)[None, :]
    cosines = tl.load(cosines_ptr + here, mask=inside, other=0.0)
    x_lse = tl.load(x_lse_ptr + offs_x, mask=mask_x, other=0.0)
    y_lse = tl.load(y_lse_ptr + offs_y, mask=mask_y, other=0.0)
    d_own = tl.load(d_own_ptr + offs_x, mask=mask_x, other=0.0)
    logits = cosines * scale
    gradient = tl.exp(logits - x_lse[:, None]) + tl.exp(logits - y_lse[None, :])
    gradient = tl.where(offs_x[:, None] == offs_y[None, :], d_own[:, None], gradient)
    return tl.where(inside, gradient, 0.0), cosines


@triton.jit
def _gradient_of_cosines(
    cosines_ptr,
    x_lse_ptr,
    y_lse_ptr,
    d_own_ptr,
    offs_x,
    n,
    stride_x,
    stride_y,
    scale,
    BLOCK_T: tl.constexpr,
):
    """Return the largest gradient of each x, 1 if all are 0, and their sum, times the cosines."""
    top = tl.zeros((BLOCK_T,), tl.float32)
    along = tl.zeros((BLOCK_T,), tl.float32)
    for y in range(0, n, BLOCK_T):
        offs_y = y + tl.arange(0, BLOCK_T)
        gradient, cosines = _d_logits(
            cosines_ptr,
            x_lse_ptr,
            y_lse_ptr,
            d_own_ptr,
            offs_x,
            offs_y,
            n,
            stride_x,
            stride_y,
            scale,
        )
        top = tl.maximum(top, tl.max(tl.abs(gradient), 1))
        along += tl.sum(gradient * cosines, 1)
    return tl.where(top == 0.0, 1.0, top), along


@triton.jit
def _pull(
    x_ptr,
    x_norms_ptr,
    x_lse_ptr,
    y_ptr,
    y_norms_ptr,
    y_lse_ptr,
    d_own_ptr,
    cosines_ptr,
    places_ptr,
    top,
    along,
    offs_x,
    d,
    n,
    D,
    stride_x,
    stride_y,
    scale,
    DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return what the y do to each x, over `top` and but for its norm, the scale and the share.

    It is the gradient of the logits times the unit vectors of the y, without what lies along x: to
    grow changes no cosine. Features `d` to `d + BLOCK_D`, in fp32.
    """
    product = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    # Most captions are one block of words: there is nothing to load ahead.
    for y in tl.range(0, n, BLOCK_T, num_stages=1):
        offs_y = y + tl.arange(0, BLOCK_T)
        gradient, _ = _d_logits(
            cosines_ptr,
            x_lse_ptr,
            y_lse_ptr,
            d_own_ptr,
            offs_x,
            offs_y,
            n,
            stride_x,
            stride_y,
            scale,
        )
        units = _units(y_ptr, y_norms_ptr, places_ptr, offs_y, n, d, D, BLOCK_D)
        product = tl.dot(
            (gradient / top[:, None]).to(DTYPE),
            units.to(DTYPE),
            product,
            input_precision=PRECISION,
        )
    norm = tl.load(x_norms_ptr + offs_x, mask=offs_x < n, other=1.0)
    # A vector that was divided by more than its own length can grow.
    along = tl.where(norm > MIN_NORM, along / top, 0.0)
    return product - along[:, None] * _units(
        x_ptr, x_norms_ptr, places_ptr, offs_x, n, d, D, BLOCK_D
    )


@triton.jit
def _scaled(ptrs, mask, factor_ptrs, most, mask_t):
    """Return rows times their factors over the largest of these, in their dtype."""
    rows = tl.load(ptrs, mask=mask, other=0.0)
    factor = tl.load(factor_ptrs, mask=mask_t, other=0.0) / most
    return (rows.to(tl.float32) * factor[:, None]).to(rows.dtype)


@triton.jit
def _softplus(x):
    """Return log(1 + e^x), relatively exact where it is small."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
