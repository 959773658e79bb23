"""The passes of local_alignment_loss with csrc's kernels: few walks over a tile."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast import _C
from medfast.ops.local_alignment.chunked import Passes, Tile
from medfast.ops.local_alignment.reference import MIN_NORM


class CpuPasses(Passes):
    block = 1
    attends_again = True
    halves_mixed = True
    sums = True

    def __init__(self, temp_attention: Tensor, temp_words: Tensor) -> None:
        super().__init__(temp_attention, temp_words)
        self._attention, self._words = temp_attention.item(), temp_words.item()

    def attend(self, tile: Tile) -> None:
        mask = _patch_mask(tile)
        _C.local_alignment_attend(
            *_shape(tile),
            tile.similarity.data_ptr(),
            mask.data_ptr(),
            self._attention,
            tile.attention.data_ptr(),
            tile.sums[0].data_ptr(),
            _is_bf16(tile),
        )

    def mix(self, tile: Tile) -> None:
        if _is_bf16(tile):
            _C.local_alignment_mix(
                *_shape(tile),
                tile.attention.data_ptr(),
                tile.wave.grams.data_ptr(),
                tile.wave.unit,
                tile.mixed.data_ptr(),
                tile.sums[1].data_ptr(),
            )
            return
        super().mix(tile)
        _C.local_alignment_squares(
            *_shape(tile),
            tile.attention.data_ptr(),
            tile.mixed.data_ptr(),
            tile.sums[1].data_ptr(),
        )

    def scores(self, tile: Tile) -> Tensor:
        scores = tile.similarity.new_empty(len(tile.words.blocks), tile.similarity.shape[1])
        dots, squares = tile.sums
        _C.local_alignment_scores(
            *_shape(tile),
            dots.data_ptr(),
            squares.data_ptr(),
            tile.norms.data_ptr(),
            self._words,
            MIN_NORM,
            scores.data_ptr(),
        )
        return scores

    def gradient(
        self,
        tile: Tile,
        scores: Tensor,
        d_scores: Tensor,
        d_similarity: Tensor,
        weighted: Tensor,
        d_norms: Tensor,
    ) -> tuple[float, float]:
        mask = _patch_mask(tile)
        return _C.local_alignment_gradient(
            *_shape(tile),
            tile.similarity.data_ptr(),
            mask.data_ptr(),
            tile.mixed.data_ptr(),
            tile.wave.unit,
            tile.norms.data_ptr(),
            scores.data_ptr(),
            d_scores.data_ptr(),
            self._attention,
            self._words,
            MIN_NORM,
            tile.attention.data_ptr(),
            d_similarity.data_ptr(),
            weighted.data_ptr(),
            d_norms.data_ptr(),
            _is_bf16(tile),
        )


def _shape(tile: Tile) -> tuple[int, int, int, int]:
    _, g, P = tile.similarity.shape
    return tile.words.starts.data_ptr(), len(tile.words.blocks), g, P


def _patch_mask(tile: Tile) -> Tensor:
    """Return 1 for every patch that counts and 0 for the others, [g, P]."""
    mask = tile.wave.images.mask
    if mask is None:
        return tile.similarity.new_ones(tile.similarity.shape[1:])
    return mask.to(tile.similarity.dtype)


def _is_bf16(tile: Tile) -> bool:
    return tile.attention.dtype == torch.bfloat16
