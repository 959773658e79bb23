"""local_alignment_loss of bf16 on a CPU that multiplies it: what is in between stays in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast import _C
from medfast.ops import packing, tiles
from medfast.ops.local_alignment.cpu import patch_mask_of
from medfast.ops.local_alignment.reference import MIN_NORM
from medfast.ops.packing import Images
from medfast.ops.workspace import lend, workspace_bytes

_OP = "local_alignment_loss"


class _Batch:
    """All words of a batch, for csrc, with some images at a time."""

    def __init__(
        self, tokens: Tensor, token_mask: Tensor, temp_attention: Tensor, temp_words: Tensor
    ) -> None:
        self.words = packing.all_words(_OP, tokens, token_mask)
        self.norms = self.words.features.norm(dim=1, dtype=torch.float32)
        self._temp_attention, self._temp_words = temp_attention.item(), temp_words.item()

    def with_images(self, images: Images) -> _C.LocalAlignmentBatch:
        """Return what csrc takes; it knows where tensors are, and does not keep them."""
        self._in_use = images.patches, patch_mask_of(images, self.norms)
        patches, mask = self._in_use
        g, P, D = patches.shape
        return _C.LocalAlignmentBatch(
            starts=self.words.starts.data_ptr(),
            captions=len(self.words.blocks),
            images=g,
            patches=P,
            depth=D,
            words=self.words.features.data_ptr(),
            features=patches.data_ptr(),
            patch_mask=mask.data_ptr(),
            norms=self.norms.data_ptr(),
            temp_attention=self._temp_attention,
            temp_words=self._temp_words,
            min_norm=MIN_NORM,
        )


def forward(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    temp_attention: Tensor,
    temp_words: Tensor,
) -> Tensor:
    """Return Z [N, M], as `chunked.forward`."""
    batch = _Batch(tokens, token_mask, temp_attention, temp_words)
    scores = batch.norms.new_empty(len(tokens), len(patches))
    images = packing.images(patches, patch_mask, slice(len(patches)))
    batch.with_images(images).scores(scores.data_ptr())
    return torch.empty_like(scores).index_copy_(0, batch.words.captions, scores)


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
    """Return the gradients of patches, in their dtype, tokens and the two temperatures."""
    M, P, _ = patches.shape
    batch = _Batch(tokens, token_mask, temp_attention, temp_words)
    words = batch.words
    N = len(words.places)
    # The gradient of the similarity is all that is ever there as a whole, of so many images.
    most = max(1, workspace_bytes() // (N * P * patches.itemsize))
    waves = list(tiles.blocks(M, most))
    largest = max(wave.stop - wave.start for wave in waves)
    d_similarity = lend(N * P * largest, patches, patches.dtype)
    d_patches = torch.empty_like(patches, memory_format=torch.contiguous_format)
    d_words = words.memory_of_gradient(torch.float32)
    d_norms = torch.zeros_like(batch.norms)
    d_temps = [0.0, 0.0]
    for where in waves:
        images = packing.images(patches, patch_mask, where)
        d_norms_by_image = d_norms.new_zeros(len(images.patches), N)
        of_pairs, d_pairs = (x[words.captions, where].contiguous() for x in (scores, d_scores))
        found = batch.with_images(images).gradients(
            scores=of_pairs.data_ptr(),
            d_scores=d_pairs.data_ptr(),
            accumulate=where.start > 0,
            d_similarity=d_similarity.data_ptr(),
            d_words=d_words.data_ptr(),
            d_patches=d_patches[where].data_ptr(),
            d_norms=d_norms_by_image.data_ptr(),
        )
        d_temps = [total + part for total, part in zip(d_temps, found, strict=True)]
        d_norms += d_norms_by_image.sum(0)
    words.add_gradient_of_norms(batch.norms, d_norms, d_words)
    d_temp_attention, d_temp_words = (torch.tensor(d_temp) for d_temp in d_temps)
    return d_patches, packing.unpack([words], [d_words], tokens), d_temp_attention, d_temp_words
