"""The definition of normalize_crops: cut, scale to 0 to 1, normalise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normalize_crops(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    offsets: Tensor | None,
    size: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Return the normalised crops; see `medfast.ops.normalize_crops`."""
    wide = torch.promote_types(dtype, torch.float32)
    (h, w), corners = size, [(0, 0)] * len(images) if offsets is None else offsets.tolist()
    crops = [image[:, y : y + h, x : x + w] for image, (y, x) in zip(images, corners, strict=True)]
    centre, spread = (images.new_tensor(v, dtype=wide).view(3, 1, 1) for v in (mean, std))
    values = torch.stack(crops).to(wide) / 255
    return ((values - centre) / spread).to(dtype).contiguous(memory_format=torch.channels_last)
