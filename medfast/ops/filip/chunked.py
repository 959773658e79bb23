"""The scores of filip_loss, a tile of words x images at a time, in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medfast.ops import packing, tiles
from medfast.ops.packing import Images, Words

OP = "filip_loss"
# Tensors of a tile's size that are held at once.
LIVE = 4


@dataclass(frozen=True)
class Scores:
    """The results for M images and N captions, filled tile by tile."""

    image_to_text: Tensor  # [M, N]
    text_to_image: Tensor  # [N, M]
    best_patch: Tensor  # [N, M, T], or empty
    best_word: Tensor  # [N, M, P], or empty


class Passes:
    """What filip_loss does with a tile, in plain PyTorch."""

    # Captions that are padded to one length.
    block = 8

    def maxima(
        self, words: Words, images: Images, similarity: Tensor, shares: Tensor, scores: Scores
    ) -> None:
        """Write the scores of a tile's pairs and, unless empty, the places of the maxima.

        Args:
            words: A group of N words.
            images: A wave of g images.
            similarity: [N, g, P], overwritten.
            shares: What each patch counts in its image's mean [g, P].
            scores: Where the results go.
        """
        similarity.index_fill_(0, words.padding, -torch.inf)
        masked = similarity
        if images.mask is not None:
            masked = similarity.masked_fill(~images.mask, -torch.inf)
        by_word, patch_of = masked.max(-1)
        by_word.index_fill_(0, words.padding, 0)
        is_word = torch.ones_like(by_word).index_fill_(0, words.padding, 0)
        for block in words.blocks:
            where = block.captions, images.where
            by_patch, word_of = block.of(similarity).max(1)
            scores.image_to_text.T[where] = (by_patch * shares).sum(-1)
            scores.text_to_image[where] = block.of(by_word).sum(1) / block.of(is_word).sum(1)
            if len(scores.best_word):
                scores.best_word[where] = word_of.to(scores.best_word.dtype)
                of_words = block.of(patch_of).transpose(1, 2).to(scores.best_patch.dtype)
                scores.best_patch[block.captions, images.where, : block.length] = of_words


def places(patches: Tensor, tokens: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """Return memory for the places of the maxima, [N, M, T] and [N, M, P], or for none.

    Both are of one dtype, bytes where they suffice.
    """
    (M, P, _), (N, T, _) = patches.shape, tokens.shape
    most = max(P, T)
    dtype = torch.uint8 if most <= 2**8 else torch.int16 if most <= 2**15 else torch.int32
    best_patch, best_word = (
        patches.new_empty((N, M, kept) if needs_grad else (0, 0, 0), dtype=dtype) for kept in (T, P)
    )
    return best_patch, best_word


def forward(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    needs_grad: bool,
    passes: Passes,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the scores [M, N] and [N, M] and the places of the maxima."""
    plan = packing.plan(OP, patches, tokens, token_mask, patch_mask, LIVE, passes.block)
    M, N = len(patches), len(tokens)
    image_to_text = patches.new_empty(M, N, dtype=plan.dtype)
    text_to_image = image_to_text.new_empty(N, M)
    best = places(patches, tokens, needs_grad)
    scores = Scores(image_to_text, text_to_image, *best)
    buffer = plan.buffer(plan.dtype)
    for images in plan.images():
        shares = patch_shares(images.patches, images.mask)
        for words in plan.groups:
            similarity = images.similarity(words, buffer.of(words, images))
            passes.maxima(words, images, similarity, shares, scores)
    return image_to_text, text_to_image, *best


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
    """Return the gradients of patches and tokens in the dtype of sums, None where not needed."""
    plan = packing.plan(OP, patches, tokens, token_mask, patch_mask, LIVE, Passes.block)
    d_patches = torch.empty_like(patches, dtype=plan.dtype, memory_format=torch.contiguous_format)
    d_groups = plan.gradients()
    buffer = plan.buffer(plan.operand)
    d_words = d_text_to_image / token_mask.sum(1, keepdim=True)
    for images in plan.images():
        shares = patch_shares(images.patches, images.mask)
        for k, words in enumerate(plan.groups):
            gradient = buffer.of(words, images).zero_()
            for block in words.blocks:
                where = block.captions, images.where
                of_patch = d_image_to_text.T[where][..., None] * shares
                part = block.of(gradient)
                index = best_word[where].long()
                part.scatter_add_(1, index[:, None], of_patch[:, None].to(part.dtype))
                index = best_patch[where][..., : block.length].long().transpose(1, 2)
                of_word = d_words[where][:, None].expand(index.shape)
                part.scatter_add_(3, index[..., None], of_word[..., None].to(part.dtype))
            gradient.index_fill_(0, words.padding, 0)
            images.add_products(
                words, gradient, d_groups[k], d_patches[images.where], is_first=k == 0
            )
    return (
        d_patches if needs_patches else None,
        packing.unpack(plan.groups, d_groups, tokens) if needs_tokens else None,
    )


def patch_shares(patches: Tensor, mask: Tensor | None) -> Tensor:
    """Return what each of the patches [g, P, D] counts in its image's mean, [g, P]."""
    g, P, _ = patches.shape
    dtype = tiles.summable(patches)
    if mask is None:
        return patches.new_full((g, P), 1 / P, dtype=dtype)
    return mask.to(dtype) / mask.sum(1, keepdim=True)
