"""sparc_loss and its gradients, a few captions of about one length at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from medfast.ops import packing, tiles
from medfast.ops.packing import valid
from medfast.ops.pairwise import softplus
from medfast.ops.sparc.reference import CONSTANT, MIN_NORM
from medfast.ops.workspace import workspace_bytes

# On a CPU, captions at a time that stay in cache.
_CPU_CAPTIONS = 4
# Tensors of the size of the similarities, and of the patches, that are held at once.
_LIVE = 6


@dataclass(frozen=True)
class Pairs:
    """A few pairs. Letters: b pairs, t words of the longest caption, P patches."""

    captions: Tensor  # [b] numbers in the batch
    words: Tensor  # [b, t, D], in the dtype of sums, zeros in padding
    word_mask: Tensor  # [b, t], true for the first of each row
    places: Tensor  # [b * t] in tokens [B * T]
    patches: Tensor  # [b, P, D], likewise
    patch_mask: Tensor  # [b, P]


def forward(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    logit_scale: Tensor,
    threshold: float | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the loss and the gradients of patches, tokens and scale, None without `needs_grad`."""
    B, dtype = len(patches), tiles.summable(patches)
    scale = logit_scale.to(dtype)
    losses = patches.new_empty(B, dtype=dtype)
    d_patches = d_tokens = d_scale = None
    if needs_grad:
        d_patches = torch.empty_like(patches, dtype=dtype, memory_format=torch.contiguous_format)
        d_tokens = torch.zeros_like(tokens, dtype=dtype, memory_format=torch.contiguous_format)
        d_scale = losses.new_zeros((), dtype=torch.float64)
    for pairs in _walk(patches, tokens, token_mask, patch_mask):
        similarity = pairs.words @ pairs.patches.mT
        weights = _align(similarity, pairs, threshold)
        contexts = weights @ pairs.patches
        # Rows and columns of the products are divided by these, not the features themselves.
        norms = [x.norm(dim=2) for x in (contexts, pairs.words)]
        inverse = [1 / x.clamp_min(MIN_NORM) for x in norms]
        cosines = (contexts @ pairs.words.mT).mul_(inverse[0][..., None]).mul_(inverse[1][:, None])
        losses[pairs.captions], d_logits = _contrast(scale * cosines, pairs)
        if d_patches is None or d_tokens is None or d_scale is None:
            continue
        d_logits.div_(B)
        d_cosines = d_logits * cosines
        d_scale += d_cosines.sum(dtype=torch.float64)
        # Through the norms: a vector that was divided by less than its own length has none.
        through = [
            -scale * d_cosines.sum(dim) * factor.square() * (length > MIN_NORM)
            for dim, factor, length in zip((2, 1), inverse, norms, strict=True)
        ]
        mixing = d_logits.mul_(inverse[0][..., None]).mul_(inverse[1][:, None]).mul_(scale)
        d_contexts = mixing @ pairs.words
        d_contexts.addcmul_(contexts, through[0][..., None])
        d_words = mixing.mT @ contexts
        d_words.addcmul_(pairs.words, through[1][..., None])
        d_weights = d_contexts @ pairs.patches.mT
        d_similarity = _align_backward(d_weights, similarity, pairs, threshold)
        d_words.baddbmm_(d_similarity, pairs.patches)
        d_here = weights.mT @ d_contexts
        d_patches[pairs.captions] = d_here.baddbmm_(d_similarity.mT, pairs.words)
        # In padding it is 0.
        d_tokens.view(-1, d_tokens.shape[2])[pairs.places] = d_words.flatten(0, 1)
    return losses.mean(), d_patches, d_tokens, d_scale


def _walk(
    patches: Tensor, tokens: Tensor, token_mask: Tensor, patch_mask: Tensor | None
) -> Iterator[Pairs]:
    """Yield the pairs, those with the longest captions first."""
    (B, P, D), T = patches.shape, tokens.shape[1]
    if patch_mask is None:
        patch_mask = torch.ones(B, P, dtype=torch.bool, device=patches.device)
    # A pair's products of words with patches, words and features, and the patches themselves.
    entries = (T + P) * max(T, P, D)
    most = workspace_bytes() // (_LIVE * entries * tiles.summable(patches).itemsize)
    if patches.device.type == "cpu":
        most = min(most, _CPU_CAPTIONS)
    for words in packing.pack("sparc_loss", tokens, token_mask, max(1, most), most_rows=0):
        captions = words.captions
        mask = token_mask.flatten()[words.places].view(len(captions), -1)
        features = words.features.to(tiles.summable(tokens)).view(*mask.shape, D)
        wave = valid(patches[captions], patch_mask[captions])
        yield Pairs(captions, features, mask, words.places, wave, patch_mask[captions])


def _align(similarity: Tensor, pairs: Pairs, threshold: float | None) -> Tensor:
    """Return the weights [b, t, P] of the patches for the words, from their similarities."""
    shares, *_ = _shares(similarity, pairs, threshold)
    return shares.div_(shares.sum(-1, keepdim=True))


def _align_backward(
    d_weights: Tensor, similarity: Tensor, pairs: Pairs, threshold: float | None
) -> Tensor:
    """Return the gradient of the similarities [b, t, P] from that of the weights."""
    shares, spread, is_constant, lowest, highest = _shares(similarity, pairs, threshold)
    total = shares.sum(-1, keepdim=True)
    mean = (d_weights * shares).sum(-1, keepdim=True) / total
    gradient = ((d_weights - mean) / (total * spread)).masked_fill_((shares == 0), 0)
    gradient.masked_fill_(is_constant, 0)
    # The lowest and the highest move every share of their row.
    of_highest = (gradient * shares).sum(-1, keepdim=True)
    of_lowest = gradient.sum(-1, keepdim=True) - of_highest
    gradient.scatter_add_(-1, highest, -of_highest)
    return gradient.scatter_add_(-1, lowest, -of_lowest)


def _contrast(logits: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return the loss of each pair [b] and the gradient of its logits [b, t, t]."""
    mask = pairs.word_mask
    own = logits.diagonal(dim1=1, dim2=2).masked_fill(~mask, 0)
    is_other = mask[:, :, None] & mask[:, None]
    is_other.diagonal(dim1=1, dim2=2).zero_()
    others = logits.masked_fill(~is_other, -torch.inf)
    rows, columns = others.logsumexp(2), others.logsumexp(1)
    count = 2 * mask.sum(1, keepdim=True)
    losses = (softplus(rows - own) + softplus(columns - own)) / count
    d_own = torch.sigmoid(rows - own) + torch.sigmoid(columns - own)
    rows, columns = torch.logaddexp(rows, own), torch.logaddexp(columns, own)
    gradient = (others - rows[..., None]).exp_().add_((others - columns[:, None]).exp_())
    gradient.diagonal(dim1=1, dim2=2).copy_(-d_own)
    return losses.sum(1), gradient.div_(count[..., None])


def _shares(similarity: Tensor, pairs: Pairs, threshold: float | None) -> tuple[Tensor, ...]:
    mask = pairs.patch_mask[:, None]
    high, highest = similarity.masked_fill(~mask, -torch.inf).max(-1, keepdim=True)
    low, lowest = similarity.masked_fill(~mask, torch.inf).min(-1, keepdim=True)
    spread = high - low
    is_constant = spread <= CONSTANT * torch.maximum(high.abs(), low.abs())
    spread.masked_fill_(is_constant, 1)
    least = 1 / mask.sum(-1, keepdim=True) if threshold is None else threshold
    shares = (similarity - low).div_(spread)
    shares.masked_fill_(~mask | (shares < least), 0)
    shares = torch.where(is_constant, mask.to(shares.dtype), shares)
    return shares, spread, is_constant, lowest, highest
