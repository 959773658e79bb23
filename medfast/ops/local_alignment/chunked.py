"""The pair scores of local_alignment_loss in tiles of captions x images, in plain PyTorch.

Captions are sorted by length, so that a tile holds few padded words, and the context c_w never
exists: with S = W V^T and attention A, w.c = sum_p A_p S_p and |c|^2 = A^T (V V^T) A.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from medfast.ops.local_alignment.reference import MIN_NORM
from medfast.ops.matmul import matmul
from medfast.ops.workspace import workspace_bytes

# Enough captions for an efficient product, few enough that their lengths are alike.
_CAPTIONS = 16
# Tensors of a tile's size that the backward holds at once.
_LIVE_TILES = 7
# On a CPU a tile that stays in cache is faster than one that fills the workspace.
_CPU_TILE_BYTES = 2**20


class _Captions(NamedTuple):
    """Some captions of similar length: letters b captions, t words."""

    index: Tensor  # [b] places in the batch
    slots: Tensor  # [b, t] places in the caption, valid ones first
    words: Tensor  # [b, t, D] zeros where padded
    norms: Tensor  # [b, t, 1]
    padding: Tensor | None  # [b, t, 1], None where there is none


class _Images(NamedTuple):
    """The next few images: letters g images, P patches."""

    index: slice
    patches: Tensor  # [g, P, D] zeros where masked
    gram: Tensor  # [g, P, P]
    masked: Tensor | None  # [g, P]


class _Tile(NamedTuple):
    """Attention of some captions' words in some images."""

    similarity: Tensor  # [b, t, g, P]
    over_words: Tensor  # [b, t, g, P] softmax of the similarity over words
    attention: Tensor  # [b, t, g, P]
    mixed: Tensor  # [b, t, g, P] attention times Gram matrix
    norms: Tensor  # [b, t, g] of the contexts
    cosines: Tensor  # [b, t, g] of contexts and words


def forward(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    temp_attention: Tensor,
    temp_words: Tensor,
) -> Tensor:
    """Return Z [B, B]: how well caption i (row) matches image j (column)."""
    B = len(patches)
    blocks = _pack(tokens, token_mask)
    scores = patches.new_empty(B, B, dtype=blocks[0].words.dtype)
    for images in _waves(patches, patch_mask, blocks):
        for captions in blocks:
            cosines = _tile(captions, images, temp_attention).cosines
            scores[captions.index, images.index] = _logits(cosines, captions, temp_words).logsumexp(1)
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
    """Return the gradients of patches, tokens and the two temperatures, in at least fp32."""
    blocks = _pack(tokens, token_mask)
    d_patches = torch.zeros_like(patches, dtype=scores.dtype)
    d_words = [torch.zeros_like(captions.words) for captions in blocks]
    d_temp_attention = scores.new_zeros(())
    d_temp_words = scores.new_zeros(())
    for images in _waves(patches, patch_mask, blocks):
        flat = images.patches.flatten(0, 1)
        d_flat = d_patches[images.index].flatten(0, 1)
        d_gram = torch.zeros_like(images.gram)
        for captions, d_block in zip(blocks, d_words, strict=True):
            tile = _tile(captions, images, temp_attention)
            place = captions.index, images.index
            share = _logits(tile.cosines, captions, temp_words).sub_(scores[place][:, None]).exp_()
            share *= d_scores[place][:, None]
            d_temp_words += (share * tile.cosines).sum()
            d_cosines = share * temp_words

            # cos = dot / divisor, divisor = max(|w| |c|, MIN_NORM)
            divisor = captions.norms * tile.norms
            free = divisor > MIN_NORM
            d_dot = d_cosines / divisor.clamp_min(MIN_NORM)
            d_divisor = -(d_dot * tile.cosines) * free
            d_square = d_divisor * captions.norms / tile.norms.clamp_min(1e-30)  # 2 d |c|^2
            d_norms = (d_divisor * tile.norms).sum(2, keepdim=True)
            d_block.addcmul_(captions.words, d_norms / captions.norms.clamp_min(1e-30))

            d_attention = tile.similarity.mul_(d_dot[..., None])
            d_attention.addcmul_(tile.mixed, d_square[..., None])
            d_sharpened = torch._softmax_backward_data(
                d_attention, tile.attention, -1, tile.attention.dtype
            )
            d_temp_attention += torch.dot(d_sharpened.flatten(), tile.over_words.flatten())
            d_similarity = torch._softmax_backward_data(
                d_sharpened.mul_(temp_attention), tile.over_words, 1, tile.attention.dtype
            )
            d_similarity.addcmul_(tile.attention, d_dot[..., None])

            d_similarity = d_similarity.flatten(0, 1).flatten(1)
            d_block += matmul(d_similarity, flat).view_as(d_block)
            d_flat += matmul(d_similarity.T, captions.words.flatten(0, 1))
            weighted = (tile.attention * (d_square[..., None])).flatten(0, 1)
            d_gram.baddbmm_(weighted.permute(1, 2, 0), tile.attention.flatten(0, 1).transpose(0, 1))
        d_patches[images.index].baddbmm_(d_gram, images.patches)
    d_tokens = torch.zeros_like(tokens, dtype=scores.dtype)
    for captions, d_block in zip(blocks, d_words, strict=True):
        d_tokens[captions.index[:, None], captions.slots] = d_block
    return d_patches, d_tokens, d_temp_attention, d_temp_words


def _pack(tokens: Tensor, token_mask: Tensor) -> list[_Captions]:
    """Return the captions, longest first, in blocks without the words that all of them lack."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    lengths, order = token_mask.sum(1).sort(descending=True, stable=True)
    valid_first = (~token_mask).to(torch.uint8).argsort(dim=1, stable=True)
    blocks = []
    longest = lengths.tolist()
    for start in range(0, len(tokens), _CAPTIONS):
        index = order[start : start + _CAPTIONS]
        t, shortest = longest[start], longest[min(start + _CAPTIONS, len(longest)) - 1]
        slots = valid_first[index[:, None], torch.arange(t, device=index.device)]
        words = tokens[index[:, None], slots].to(dtype)
        padding = None
        if shortest < t:
            padding = ~token_mask[index[:, None], slots][..., None]
            words.masked_fill_(padding, 0)
        blocks.append(_Captions(index, slots, words, words.norm(dim=-1, keepdim=True), padding))
    return blocks


def _waves(patches: Tensor, patch_mask: Tensor | None, blocks: list[_Captions]) -> Iterator[_Images]:
    dtype = blocks[0].words.dtype
    budget = workspace_bytes() // _LIVE_TILES
    if patches.device.type == "cpu":
        budget = min(budget, _CPU_TILE_BYTES)
    most_words = max(captions.slots.numel() for captions in blocks)
    size = max(1, budget // (most_words * patches.shape[1] * dtype.itemsize))
    for start in range(0, len(patches), size):
        index = slice(start, start + size)
        masked = None if patch_mask is None else ~patch_mask[index]
        wave = patches[index].to(dtype)
        if masked is not None:
            wave = wave.masked_fill(masked[..., None], 0)
        wave = wave.contiguous()
        yield _Images(index, wave, wave @ wave.mT, masked)


def _tile(captions: _Captions, images: _Images, temp_attention: Tensor) -> _Tile:
    b, t, _ = captions.words.shape
    g, P, _ = images.patches.shape
    similarity = matmul(captions.words.flatten(0, 1), images.patches.flatten(0, 1).T).view(b, t, g, P)
    if captions.padding is None:
        over_words = similarity.softmax(1)
    else:
        over_words = similarity.masked_fill(captions.padding[..., None], -torch.inf).softmax(1)
    attention = over_words * temp_attention
    if images.masked is not None:
        attention.masked_fill_(images.masked, -torch.inf)
    attention = torch.softmax(attention, -1)
    by_image = attention.flatten(0, 1).transpose(0, 1)
    mixed = torch.bmm(by_image, images.gram).transpose(0, 1).view(b,t,g,P)
    dot = (attention * similarity).sum(-1)
    norms = (attention * mixed).sum(-1).clamp_min_(0).sqrt_()
    cosines = dot / (captions.norms * norms).clamp_min_(MIN_NORM)
    return _Tile(similarity, over_words, attention, mixed, norms, cosines)


def _logits(cosines: Tensor, captions: _Captions, temp_words: Tensor) -> Tensor:
    logits = cosines * temp_words
    return logits if captions.padding is None else logits.masked_fill_(captions.padding, -torch.inf)
