"""normalize_crops with csrc's CUDA kernel, and what torch must know of it."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast import _CUDA

# The codes of csrc/cuda/launch.h.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@torch.library.custom_op("medfast::normalize_crops", mutates_args=())
def normalize_crops(
    images: Tensor,
    factor: list[float],
    shift: list[float],
    offsets: Tensor | None,
    height: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return `images * factor + shift` of the crops [B, 3, height, width]; see `chunked`."""
    images = images.contiguous(memory_format=torch.channels_last)
    offsets = None if offsets is None else offsets.contiguous()
    found = _found(images, height, width, dtype)
    with torch.cuda.device(images.device):
        _CUDA.normalize_crops(
            images.data_ptr(),
            0 if offsets is None else offsets.data_ptr(),
            len(images),
            images.shape[2],
            images.shape[3],
            height,
            width,
            factor,
            shift,
            found.data_ptr(),
            _DTYPES[dtype],
            _stream(images),
        )
    return found


@normalize_crops.register_fake
def _(
    images: Tensor,
    factor: list[float],
    shift: list[float],
    offsets: Tensor | None,
    height: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    return _found(images, height, width, dtype)


def _found(images: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    shape = (len(images), 3, height, width)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)


def _stream(images: Tensor) -> int:
    return torch.cuda.current_stream(images.device).cuda_stream
