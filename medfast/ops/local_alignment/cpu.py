"""The passes of local_alignment_loss with csrc's kernels: few walks over a tile."""

from __future__ import annotations

from torch import Tensor

from medfast import _C
from medfast.ops.local_alignment.chunked import Passes, Tile
from medfast.ops.local_alignment.reference import MIN_NORM
from medfast.ops.packing import Images


class CpuPasses(Passes):
    block = 1
    attends_again = True
    dots = True

    def __init__(self, temp_attention: Tensor, temp_words: Tensor) -> None:
        super().__init__(temp_attention, temp_words)
        self._attention, self._words = temp_attention.item(), temp_words.item()

    def attend(self, tile: Tile) -> None:
        mask = patch_mask_of(tile.wave.images, tile.similarity)
        _C.local_alignment_attend(
            *_shape(tile),
            tile.similarity.data_ptr(),
            mask.data_ptr(),
            self._attention,
            tile.attention.data_ptr(),
            tile.dots.data_ptr(),
        )

    def scores(self, tile: Tile) -> Tensor:
        scores = tile.similarity.new_empty(len(tile.words.blocks), tile.similarity.shape[1])
        _C.local_alignment_scores(
            *_shape(tile),
            tile.attention.data_ptr(),
            tile.mixed.data_ptr(),
            tile.dots.data_ptr(),
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
        mask = patch_mask_of(tile.wave.images, tile.similarity)
        return _C.local_alignment_gradient(
            *_shape(tile),
            tile.similarity.data_ptr(),
            mask.data_ptr(),
            tile.mixed.data_ptr(),
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
        )


def patch_mask_of(images: Images, like: Tensor) -> Tensor:
    """Return 1 for every patch that counts and 0 for the others, [g, P], in the dtype of `like`."""
    if images.mask is None:
        return like.new_ones(images.patches.shape[:2])
    return images.mask.to(like.dtype)


def _shape(tile: Tile) -> tuple[int, int, int, int]:
    _, g, P = tile.similarity.shape
    return tile.words.starts.data_ptr(), len(tile.words.blocks), g, P
