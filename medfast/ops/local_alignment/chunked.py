"""The pair scores of local_alignment_loss, a tile of words x images at a time.

The context c_w never exists: with S = W V^T and attention A, c.w = sum_p A_p S_p and
|c|^2 = A^T (V V^T) A. Only the scores are kept for the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from medfast.ops import packing, tiles
from medfast.ops.local_alignment.reference import MIN_NORM
from medfast.ops.matmul import bmm_into
from medfast.ops.packing import Images, Plan, Words
from medfast.ops.workspace import workspace_bytes

_OP = "local_alignment_loss"
# Tensors of a tile's size that the backward of plain PyTorch holds at once.
_LIVE = 9


@dataclass(frozen=True)
class Wave:
    """What all tiles of a wave of images share."""

    images: Images
    # [g, P, P], each image's Gram matrix: the terms of which it is the sum, as products take them.
    # Rounded to bf16 alone, it would not do where a context nearly vanishes, whose square is the
    # difference of sums as large as the patches' squares.
    grams: list[Tensor]


@dataclass(frozen=True)
class Tile:
    """How a group of N words attends to the P patches of g images."""

    words: Words
    wave: Wave
    norms: Tensor  # [N], of the words
    similarity: Tensor  # [N, g, P]
    # [N, g, P], softmax of the similarity over each caption's words; empty if attends_again
    over_words: Tensor
    attention: Tensor  # [N, g, P], as products take it
    mixed: Tensor  # [N, g, P], attention times Gram matrix
    # [N, g], in the passes' order: sums over the patches of the attention times the similarity;
    # only of passes that have `dots`
    dots: Tensor


class Passes:
    """What local_alignment_loss does with a tile, in plain PyTorch."""

    # Captions that are padded to one length.
    block = 8
    # Whether `gradient` computes the attention itself.
    attends_again = False
    # Whether `attend` writes the dots.
    dots = False

    def __init__(self, temp_attention: Tensor, temp_words: Tensor) -> None:
        self.temp_attention, self.temp_words = temp_attention, temp_words

    def attend(self, tile: Tile) -> None:
        """Write both softmaxes of the similarity, the attention alone if `attends_again`."""
        similarity = tile.similarity.index_fill(0, tile.words.padding, -torch.inf)
        for block in tile.words.blocks:
            torch.softmax(block.of(similarity), 1, out=block.of(tile.over_words))
        del similarity
        attention = tile.over_words * self.temp_attention
        if tile.wave.images.mask is not None:
            attention.masked_fill_(~tile.wave.images.mask, -torch.inf)
        tile.attention.copy_(torch.softmax(attention, -1, out=attention))

    def scores(self, tile: Tile) -> Tensor:
        """Return Z [captions of the group, g]."""
        logits = self._cosines(tile)[0] * self.temp_words
        logits.index_fill_(0, tile.words.padding, -torch.inf)
        return torch.cat([block.of(logits).logsumexp(1) for block in tile.words.blocks])

    def gradient(
        self,
        tile: Tile,
        scores: Tensor,
        d_scores: Tensor,
        d_similarity: Tensor,
        weighted: Tensor,
        d_norms: Tensor,
    ) -> tuple[Tensor | float, Tensor | float]:
        """Write the gradient of the similarity and the attention times that of |c|^2, twice.

        Args:
            tile: Overwritten.
            scores: [captions of the group, g].
            d_scores: Likewise.
            d_similarity: Where the first goes, [N, g, P].
            weighted: Where the second goes, [N, g, P].
            d_norms: To what the gradients of the words' norms are added, [N].

        Returns:
            The gradients of the two temperatures, in fp64.
        """
        tiny = torch.finfo(scores.dtype).tiny
        cosines, norms = self._cosines(tile)
        caption = tile.words.caption_of_row
        # A word takes the share of its caption's gradient that it has in the log-sum-exp.
        share = torch.exp(cosines * self.temp_words - scores[caption]).mul_(d_scores[caption])
        share.index_fill_(0, tile.words.padding, 0)
        d_temp_words = (share * cosines).sum()

        # cosine = dot / divisor, divisor = max(|w| |c|, MIN_NORM)
        divisor = tile.norms[:, None] * norms
        d_dot = share * self.temp_words / divisor.clamp_min(MIN_NORM)
        d_divisor = -(d_dot * cosines) * (divisor > MIN_NORM)
        # The Gram matrix is symmetric: twice the gradient of |c|^2 is all that is needed.
        d_square = d_divisor * tile.norms[:, None] / norms.clamp_min(tiny)

        attention = tile.attention.to(scores.dtype)
        d_attention = tile.similarity * d_dot[..., None]
        d_attention.addcmul_(tile.mixed, d_square[..., None])
        d_sharpened = _softmax_backward(d_attention, attention, -1)
        d_temp_attention = torch.dot(d_sharpened.flatten(), tile.over_words.flatten())
        d_over_words = d_sharpened.mul_(self.temp_attention)
        d_words = attention * d_dot[..., None]
        for block in tile.words.blocks:
            block.of(d_words).add_(
                _softmax_backward(block.of(d_over_words), block.of(tile.over_words), 1)
            )
        d_similarity.copy_(d_words)
        weighted.copy_(attention * d_square[..., None])
        d_norms += (d_divisor * norms).sum(1)
        return d_temp_attention.double(), d_temp_words.double()

    def _cosines(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Return the cosines of words and contexts and the contexts' norms, [N, g]."""
        dot = (tile.attention * tile.similarity).sum(-1)
        norms = (tile.attention * tile.mixed).sum(-1).clamp_min_(0).sqrt_()
        # Of a context that nearly vanishes rounding may leave less than its share along the word.
        tiny = torch.finfo(dot.dtype).tiny
        norms = torch.maximum(norms, dot.abs() / tile.norms[:, None].clamp_min(tiny))
        return dot / (tile.norms[:, None] * norms).clamp_min_(MIN_NORM), norms


class _Walk:
    """The tiles of a plan, one after the other in the same memory, the first ones in `kept`."""

    def __init__(self, plan: Plan, kept: Tensor, is_known: bool, passes: Passes) -> None:
        self._plan, self._passes = plan, passes
        self._kept, self._is_known = kept, is_known
        self.norms = [words.features.norm(dim=1, dtype=plan.dtype) for words in plan.groups]
        self._similarity, self._mixed = plan.buffer(plan.dtype), plan.buffer(plan.dtype)
        self._over_words = None if passes.attends_again else plan.buffer(plan.dtype)
        self._attention = plan.buffer(plan.operand)
        self._empty = self._attention.memory[:0]

    def waves(self) -> Iterator[Wave]:
        """Yield the waves of images."""
        for images in self._plan.images():
            g, P, _ = images.patches.shape
            grams = images.patches.new_empty(g, P, P, dtype=self._plan.dtype)
            bmm_into(grams, images.patches, images.patches.mT)
            terms = [grams.to(images.patches.dtype)]
            if terms[0] is not grams:
                terms.append((grams - terms[0]).to(images.patches.dtype))
            yield Wave(images, terms)

    def tile(self, k: int, wave: Wave) -> Tile:
        """Return how the words of group k attend to the images."""
        words, images = self._plan.groups[k], wave.images
        attention = self._attention.of(words, images)
        over_words = self._empty
        if self._over_words is not None:
            over_words = self._over_words.of(words, images)
        size = attention.numel()
        is_kept = 2 * size <= len(self._kept)
        is_known = is_kept and self._is_known
        if is_kept:
            memory, self._kept = self._kept.split([2 * size, len(self._kept) - 2 * size])
            similarity, mixed = memory.view(2, *attention.shape)
        else:
            similarity, mixed = (x.of(words, images) for x in (self._similarity, self._mixed))
        dots = self._empty
        if self._passes.dots and not is_known:
            dots = similarity.new_empty(similarity.shape[:2])
        tile = Tile(words, wave, self.norms[k], similarity, over_words, attention, mixed, dots)
        if not is_known:
            images.similarity(words, similarity)
        if not (is_known and self._passes.attends_again):
            self._passes.attend(tile)
        if not is_known:
            by_image = mixed.transpose(0, 1), attention.transpose(0, 1)
            for i, term in enumerate(wave.grams):
                bmm_into(*by_image, term, accumulate=i > 0)
        return tile


def kept_entries(patches: Tensor, tokens: Tensor) -> int:
    """Return how many entries of products to keep, so that the backward need not compute them.

    On a CPU tiles are small: most of the workspace is free for what the forward has computed.
    """
    if patches.device.type != "cpu":
        return 0
    dtype = tiles.summable(patches)
    spare = workspace_bytes() // dtype.itemsize - packing.CPU_ENTRIES
    pairs = tokens[..., 0].numel() * patches[..., 0].numel()
    return max(0, min(spare, 2 * pairs))


def forward(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    kept: Tensor,
    passes: Passes,
) -> Tensor:
    """Return Z [N, M]: how well caption i (row) matches image j (column).

    `kept` is filled for the backward as far as it goes; it may be empty.
    """
    plan = packing.plan(_OP, patches, tokens, token_mask, patch_mask, _LIVE, passes.block)
    walk = _Walk(plan, kept, is_known=False, passes=passes)
    scores = patches.new_empty(len(tokens), len(patches), dtype=plan.dtype)
    for wave in walk.waves():
        for k, words in enumerate(plan.groups):
            scores[words.captions, wave.images.where] = passes.scores(walk.tile(k, wave))
    return scores


def backward(
    d_scores: Tensor,
    scores: Tensor,
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    kept: Tensor,
    passes: Passes,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of patches, in their dtype, and tokens and the two temperatures.

    `kept` is as `forward` left it.
    """
    plan = packing.plan(_OP, patches, tokens, token_mask, patch_mask, _LIVE, passes.block)
    walk = _Walk(plan, kept, is_known=True, passes=passes)
    d_similarity, weighted = plan.buffer(plan.operand), plan.buffer(plan.operand)
    d_patches = torch.empty_like(patches, memory_format=torch.contiguous_format)
    d_groups = plan.gradients()
    d_norms = [torch.zeros_like(norms) for norms in walk.norms]
    d_temps: list[Tensor | float] = [0.0, 0.0]
    for wave in walk.waves():
        images = wave.images
        d_grams = torch.empty_like(wave.grams[0], dtype=plan.dtype)
        of_wave = d_patches[images.where]
        # Sums of one wave are few enough to stay in a cache.
        is_sum = of_wave.dtype == plan.dtype
        d_wave = of_wave if is_sum else torch.empty_like(of_wave, dtype=plan.dtype)
        for k, words in enumerate(plan.groups):
            where = words.captions, images.where
            tile = walk.tile(k, wave)
            d_tile, weights = d_similarity.of(words, images), weighted.of(words, images)
            d_temp = passes.gradient(
                tile, scores[where], d_scores[where], d_tile, weights, d_norms[k]
            )
            d_temps = [total + part for total, part in zip(d_temps, d_temp, strict=True)]
            images.add_products(words, d_tile, d_groups[k], d_wave, is_first=k == 0)
            by_image = (weights.permute(1, 2, 0), tile.attention.transpose(0, 1))
            bmm_into(d_grams, *by_image, accumulate=k > 0)
        bmm_into(d_wave, d_grams.to(plan.operand), images.patches, accumulate=True)
        if not is_sum:
            of_wave.copy_(d_wave)
    for words, norms, d_norm, d_group in zip(
        plan.groups, walk.norms, d_norms, d_groups, strict=True
    ):
        words.add_gradient_of_norms(norms, d_norm, d_group)
    d_temp_attention, d_temp_words = (
        torch.as_tensor(d_temp, dtype=plan.dtype, device=scores.device) for d_temp in d_temps
    )
    return d_patches, packing.unpack(plan.groups, d_groups, tokens), d_temp_attention, d_temp_words


def _softmax_backward(d_output: Tensor, output: Tensor, dim: int) -> Tensor:
    return torch._softmax_backward_data(d_output, output, dim, output.dtype)
