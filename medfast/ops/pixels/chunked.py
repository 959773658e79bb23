"""Crops in plain PyTorch, normalised a few images at a time; a GPU is never waited for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medfast.ops.tiles import blocks
from medfast.ops.workspace import workspace_bytes


def normalize_crops(
    images: Tensor,
    factor: Sequence[float],
    shift: Sequence[float],
    offsets: Tensor | None,
    size: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Return `images * factor + shift` of the crops, channels last.

    Args:
        images: uint8 [B, 3, H, W].
        factor: Of each channel.
        shift: Of each channel.
        offsets: Rows and columns where crops begin, int32 [B, 2]; None stands for zeros.
        size: Of a crop.
        dtype: Of the result.
    """
    wide = torch.promote_types(dtype, torch.float32)
    found = torch.empty(
        (len(images), 3, *size),
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last,
    )
    by_channel = [_by_channel(values, found, wide) for values in (factor, shift)]
    fitting = max(1, workspace_bytes() // (found[0].numel() * wide.itemsize))
    for part in blocks(len(images), fitting):
        crops = _crops(images[part], None if offsets is None else offsets[part], size)
        found[part] = torch.addcmul(by_channel[1], crops.to(wide), by_channel[0])
    return found


def _by_channel(values: Sequence[float], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [3, 1, 1]. Each is filled in: to copy them would make a GPU wait."""
    found = like.new_empty((3, 1, 1), dtype=dtype)
    for channel, value in enumerate(values):
        found[channel] = value
    return found


def _crops(images: Tensor, offsets: Tensor | None, size: tuple[int, int]) -> Tensor:
    height, width = size
    if offsets is None:
        return images[:, :, :height, :width]
    pixels = images.permute(0, 2, 3, 1)
    number, rows, columns = (
        torch.arange(n, device=images.device) for n in (len(images), height, width)
    )
    rows, columns = offsets[:, :1] + rows, offsets[:, 1:] + columns
    crops = pixels[number[:, None, None], rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2)
