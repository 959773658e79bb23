"""The pair scores of local_alignment_loss in tiles of captions x images, in plain PyTorch.

The words of the batch are packed, and the context c_w never exists: with S = W V^T and attention
A, c.w = sum_p A_p S_p and |c|^2 = A^T (V V^T) A. Only the scores are kept for the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from medfast.ops.local_alignment.reference import MIN_NORM
from medfast.ops.matmul import matmul
from medfast.ops.workspace import workspace_bytes

# Captions are sorted by length and padded to the longest of this many: few words are padding.
_BLOCK = 8
# Tensors of a tile's size that the backward holds at once.
_LIVE_TILES = 7
# On a CPU, tiles that stay in cache are faster than tiles that fill the workspace.
_CPU_TILE_BYTES = 2**21


class _Block(NamedTuple):
    """Captions of about one length: letters b captions, t words each."""

    captions: Tensor  # [b] numbers in the batch
    rows: slice  # b * t rows of the group's words
    length: int  # t


class _Words(NamedTuple):
    """A group of blocks: letter N their words, padding included."""

    blocks: list[_Block]
    places: Tensor  # [N] in tokens [B * T]
    captions: Tensor  # [N] numbers in the batch
    padding: Tensor  # the rows that are no word
    features: Tensor  # [N, D], zeros in padding
    norms: Tensor  # [N, 1]


class _Images(NamedTuple):
    """A few images: letters g images, P patches."""

    where: slice  # in the batch
    patches: Tensor  # [g, P, D], zeros where masked
    gram: Tensor  # [g, P, P]
    masked: Tensor | None  # [g, P]


class _Tile(NamedTuple):
    """How a group of words attends to a few images."""

    similarity: Tensor  # [N, g, P]
    over_words: Tensor  # [N, g, P], softmax of the similarity over each caption's words
    attention: Tensor  # [N, g, P]
    mixed: Tensor  # [N, g, P], attention times Gram matrix
    norms: Tensor  # [N, g], of the contexts
    cosines: Tensor  # [N, g], of contexts and words


def forward(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    temp_attention: Tensor,
    temp_words: Tensor,
) -> Tensor:
    """Return Z [B, B]: how well caption i (row) matches image j (column)."""
    groups, waves = _plan(patches, tokens, token_mask, patch_mask)
    dtype = torch.promote_types(patches.dtype, torch.float32)
    scores = patches.new_empty(len(patches), len(patches), dtype=dtype)
    for images in waves:
        for words in groups:
            logits = _tile(words, images, temp_attention).cosines * temp_words
            logits.index_fill_(0, words.padding, -torch.inf)
            for block in words.blocks:
                scores[block.captions, images.where] = _by_caption(logits, block).logsumexp(1)
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
    """Return the gradients of patches, tokens and the two temperatures, in the scores' dtype."""
    groups, waves = _plan(patches, tokens, token_mask, patch_mask)
    d_patches = torch.zeros_like(patches, dtype=scores.dtype)
    d_features = [torch.zeros_like(words.features) for words in groups]
    d_temp_attention, d_temp_words = scores.new_zeros(()), scores.new_zeros(())
    tiny = torch.finfo(scores.dtype).tiny
    for images in waves:
        patch_features = images.patches.flatten(0, 1)
        d_wave = d_patches[images.where]
        d_gram = torch.zeros_like(images.gram)
        for words, d_group in zip(groups, d_features, strict=True):
            tile = _tile(words, images, temp_attention)

            # A word takes the share of its caption's gradient that it has in the log-sum-exp.
            share = torch.exp(tile.cosines * temp_words - scores[words.captions, images.where])
            share.mul_(d_scores[words.captions, images.where]).index_fill_(0, words.padding, 0)
            d_temp_words += (share * tile.cosines).sum()
            d_cosines = share * temp_words

            # cosine = dot / divisor, divisor = max(|w| |c|, MIN_NORM)
            divisor = words.norms * tile.norms
            d_dot = d_cosines / divisor.clamp_min(MIN_NORM)
            d_divisor = -(d_dot * tile.cosines) * (divisor > MIN_NORM)
            d_norms = (d_divisor * tile.norms).sum(1, keepdim=True)
            d_group += words.features * (d_norms / words.norms.clamp_min(tiny))
            # The Gram matrix is symmetric: twice the gradient of |c|^2 is all that is needed.
            d_square = d_divisor * words.norms / tile.norms.clamp_min(tiny)

            # From here on, gradients take the place of what they no longer need.
            d_attention = tile.similarity.mul_(d_dot[..., None])
            d_attention.addcmul_(tile.mixed, d_square[..., None])
            d_sharpened = _softmax_backward(d_attention, tile.attention, -1)
            d_temp_attention += torch.dot(d_sharpened.flatten(), tile.over_words.flatten())
            d_over_words = d_sharpened.mul_(temp_attention)
            d_similarity = torch.mul(tile.attention, d_dot[..., None], out=tile.similarity)
            for block in words.blocks:
                _by_caption(d_similarity, block).add_(
                    _softmax_backward(
                        _by_caption(d_over_words, block), _by_caption(tile.over_words, block), 1
                    )
                )

            flat = d_similarity.flatten(1)
            d_group += matmul(flat, patch_features)
            d_wave += matmul(flat.T, words.features).view_as(d_wave)
            weighted = torch.mul(tile.attention, d_square[..., None], out=tile.mixed)
            d_gram.baddbmm_(weighted.permute(1, 2, 0), tile.attention.transpose(0, 1))
        d_wave.baddbmm_(d_gram, images.patches)
    d_tokens = torch.zeros_like(tokens, dtype=scores.dtype).flatten(0, 1)
    for words, d_group in zip(groups, d_features, strict=True):
        d_tokens[words.places] = d_group
    return d_patches, d_tokens.view_as(tokens), d_temp_attention, d_temp_words


def _plan(
    patches: Tensor, tokens: Tensor, token_mask: Tensor, patch_mask: Tensor | None
) -> tuple[list[_Words], Iterator[_Images]]:
    """Return groups of words and waves of images whose tiles fit into the workspace."""
    dtype = torch.promote_types(patches.dtype, torch.float32)
    budget = workspace_bytes() // _LIVE_TILES
    if patches.device.type == "cpu":
        budget = min(budget, _CPU_TILE_BYTES)
    most_rows = budget // (patches.shape[1] * dtype.itemsize)
    groups = _pack(tokens, token_mask, dtype, most_rows)
    size = max(1, most_rows // max(len(words.places) for words in groups))
    return groups, _waves(patches, patch_mask, dtype, size)


def _pack(tokens: Tensor, token_mask: Tensor, dtype: torch.dtype, most_rows: int) -> list[_Words]:
    """Return all captions, the longest first, in groups of one block or of `most_rows` at most."""
    T = tokens.shape[1]
    lengths, order = token_mask.sum(1).sort(descending=True, stable=True)
    valid_first = (~token_mask).to(torch.uint8).argsort(dim=1, stable=True)
    longest_first = lengths.tolist()
    if longest_first[-1] == 0:  # the check before the op cannot look into a compiled graph
        raise ValueError(
            f"local_alignment_loss: caption {order[-1].item()} has no valid word. Leave it out of "
            "the batch."
        )
    groups: list[list[_Block]] = []
    start = most_rows
    for captions, length in zip(order.split(_BLOCK), longest_first[::_BLOCK], strict=True):
        stop = start + len(captions) * length
        if stop > most_rows:
            groups.append([])
            start, stop = 0, stop - start
        groups[-1].append(_Block(captions, slice(start, stop), length))
        start = stop
    packed = []
    for blocks in groups:
        places = torch.cat(
            [(valid_first[c, :length] + c[:, None] * T).flatten() for c, _, length in blocks]
        )
        padding = (~token_mask.flatten()[places]).nonzero()[:, 0]
        features = tokens.flatten(0, 1)[places].to(dtype).index_fill_(0, padding, 0)
        norms = features.norm(dim=1, keepdim=True)
        packed.append(_Words(blocks, places, places // T, padding, features, norms))
    return packed


def _waves(
    patches: Tensor, patch_mask: Tensor | None, dtype: torch.dtype, size: int
) -> Iterator[_Images]:
    for start in range(0, len(patches), size):
        where = slice(start, start + size)
        wave = patches[where].to(dtype).contiguous()
        masked = None
        if patch_mask is not None:
            masked = ~patch_mask[where]
            wave = wave.masked_fill(masked[..., None], 0)
        yield _Images(where, wave, wave @ wave.mT, masked)


def _tile(words: _Words, images: _Images, temp_attention: Tensor) -> _Tile:
    similarity = matmul(words.features, images.patches.flatten(0, 1).T)
    similarity = similarity.unflatten(1, images.patches.shape[:2])
    similarity.index_fill_(0, words.padding, -torch.inf)
    over_words = torch.empty_like(similarity)
    for block in words.blocks:
        torch.softmax(_by_caption(similarity, block), 1, out=_by_caption(over_words, block))
    similarity.index_fill_(0, words.padding, 0)
    attention = over_words * temp_attention
    if images.masked is not None:
        attention.masked_fill_(images.masked, -torch.inf)
    attention = attention.softmax(-1)
    mixed = torch.empty_like(attention)
    torch.bmm(attention.transpose(0, 1), images.gram, out=mixed.transpose(0, 1))
    dot = (attention * similarity).sum(-1)
    norms = (attention * mixed).sum(-1).clamp_min_(0).sqrt_()
    cosines = dot / (words.norms * norms).clamp_min_(MIN_NORM)
    return _Tile(similarity, over_words, attention, mixed, norms, cosines)


def _by_caption(rows: Tensor, block: _Block) -> Tensor:
    """Return the view [b, t, ...] of a block's rows."""
    return rows[block.rows].unflatten(0, (-1, block.length))


def _softmax_backward(d_output: Tensor, output: Tensor, dim: int) -> Tensor:
    return torch._softmax_backward_data(d_output, output, dim, output.dtype)
