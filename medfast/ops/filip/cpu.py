"""filip_loss with csrc's kernels; the backward gathers in place of products."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast import _C
from medfast.ops import matmul, packing, tiles
from medfast.ops.filip import chunked
from medfast.ops.filip.chunked import OP, Passes, Scores, patch_shares
from medfast.ops.packing import Images, Words


class CpuPasses(Passes):
    block = 1

    def maxima(
        self, words: Words, images: Images, similarity: Tensor, shares: Tensor, scores: Scores
    ) -> None:
        N, M = scores.text_to_image.shape
        _, g, P = similarity.shape
        keeps = len(scores.best_word) > 0
        _C.filip_loss_maxima(
            words.starts.data_ptr(),
            len(words.captions),
            g,
            P,
            similarity.data_ptr(),
            shares.data_ptr(),
            words.captions.data_ptr(),
            N,
            M,
            images.where.start,
            scores.best_patch.shape[2],
            scores.image_to_text.data_ptr(),
            scores.text_to_image.data_ptr(),
            scores.best_patch.data_ptr() if keeps else 0,
            scores.best_word.data_ptr() if keeps else 0,
            scores.best_patch.element_size(),
        )


def forward(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `chunked.forward` does."""
    if not matmul.multiplies_bf16():
        # A library's products, of a tile at a time, are faster than csrc's.
        return chunked.forward(patches, tokens, token_mask, patch_mask, needs_grad, CpuPasses())
    M, P, D = patches.shape
    words, features, shares = _operands(patches, tokens, token_mask, patch_mask)
    image_to_text = shares.new_empty(M, len(tokens))
    text_to_image = shares.new_empty(len(tokens), M)
    best_patch, best_word = chunked.places(patches, tokens, needs_grad)
    _C.filip_loss_fused_maxima(
        words.starts.data_ptr(),
        words.captions.data_ptr(),
        len(words.captions),
        M,
        P,
        tokens.shape[1],
        D,
        words.features.data_ptr(),
        features.data_ptr(),
        features.dtype == torch.bfloat16,
        shares.data_ptr(),
        image_to_text.data_ptr(),
        text_to_image.data_ptr(),
        best_patch.data_ptr() if needs_grad else 0,
        best_word.data_ptr() if needs_grad else 0,
        best_patch.element_size(),
    )
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
    """Return the gradients of patches and tokens as products take those; None where not needed."""
    M, P, D = patches.shape
    words, features, shares = _operands(patches, tokens, token_mask, patch_mask)
    d_patches = torch.empty_like(features) if needs_patches else None
    d_words = torch.empty_like(words.features) if needs_tokens else None
    _C.filip_loss_gradient(
        words.starts.data_ptr(),
        words.captions.data_ptr(),
        len(words.captions),
        M,
        P,
        best_patch.shape[2],
        D,
        words.features.data_ptr(),
        features.data_ptr(),
        features.dtype == torch.bfloat16,
        shares.data_ptr(),
        d_image_to_text.data_ptr(),
        d_text_to_image.data_ptr(),
        best_patch.data_ptr(),
        best_word.data_ptr(),
        best_patch.element_size(),
        0 if d_words is None else d_words.data_ptr(),
        0 if d_patches is None else d_patches.data_ptr(),
    )
    return d_patches, None if d_words is None else packing.unpack([words], [d_words], tokens)


def _operands(
    patches: Tensor, tokens: Tensor, token_mask: Tensor, patch_mask: Tensor | None
) -> tuple[Words, Tensor, Tensor]:
    """Return all words, the patches [M, P, D] and what these count in their image's mean [M, P]."""
    words = packing.all_words(OP, tokens, token_mask)
    features = tiles.operand(patches)
    # What does not count may be NaN, and products, which are for bf16, take all.
    if patch_mask is not None and features.dtype == torch.bfloat16:
        features = features.masked_fill(~patch_mask[..., None], 0)
    return words, features, patch_shares(patches, patch_mask)
