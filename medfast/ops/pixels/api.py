"""The public function normalize_crops: checks, choice of implementation, documentation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medfast.ops import dispatch
from medfast.ops.pixels import chunked, reference

_OP = "normalize_crops"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def normalize_crops(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    offsets: Tensor | None = None,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    impl: str = "auto",
) -> Tensor:
    """Return crops of decoded images as an image tower takes them: normalised, channels last.

        out[b, c, i, j] = (images[b, c, y_b + i, x_b + j] / 255 - mean_c) / std_c

    in fp32, or fp64 for fp64, then rounded to `dtype`. "cuda" does it in one pass that reads each
    byte once and writes the result alone. It was not yet run on a GPU: "auto" does not choose it.

    Args:
        images: Decoded images, uint8 [B, 3, H, W]; channels last in memory as both loaders hand
            them over, else "cuda" copies them.
        mean: Of red, green and blue, where white is 1.
        std: Likewise, above 0.
        offsets: The first row and column (y, x) of each crop, int32 [B, 2]. None stands for zeros.
        size: Rows and columns of a crop. None stands for the whole image.
        dtype: Of the result: bf16, fp16, fp32 or, but for "cuda", fp64.
        impl: "auto", "cuda", "torch" or "reference".

    Returns:
        [B, 3, *size] of `dtype`, channels last.

    Raises:
        ValueError: An argument has another shape, dtype or device, a crop leads out of its image
            (looked at on a CPU only: on a GPU "cuda" takes the nearest crop that does not), or
            `impl` is unknown.
        RuntimeError: `impl` cannot run here.

    Example:
        >>> import torch
        >>> from medfast.ops import normalize_crops
        >>> images = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
        >>> corner = torch.tensor([[1, 2]], dtype=torch.int32)
        >>> crops = normalize_crops(images, [0.5] * 3, [0.25] * 3, offsets=corner, size=(3, 2))
        >>> crops.shape, crops.unique()
        (torch.Size([1, 3, 3, 2]), tensor([2.], dtype=torch.bfloat16))
    """
    size = _check(images, mean, std, offsets, size, dtype)
    chosen = dispatch.choose(_OP, impl, images)
    if chosen == "reference":
        return reference.normalize_crops(images, mean, std, offsets, size, dtype)
    factor = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    if chosen == "cuda":
        if dtype == torch.float64:
            raise RuntimeError(
                f"{_OP}: impl='cuda' cannot run here: it computes in fp32, dtype is fp64. "
                "Use impl='torch' or impl='auto'."
            )
        from medfast.ops.pixels import cuda

        return cuda.normalize_crops(images, factor, shift, offsets, *size, dtype)
    return chunked.normalize_crops(images, factor, shift, offsets, size, dtype)


def _check(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    offsets: Tensor | None,
    size: tuple[int, int] | None,
    dtype: torch.dtype,
) -> tuple[int, int]:
    """Refuse what does not fit together; return the size of a crop."""
    must = "uint8 [B, 3, H, W] with no size of 0"
    if not isinstance(images, Tensor):
        raise dispatch.argument_error(_OP, "images", must, type(images), "Pass a tensor.")
    if (
        images.dtype != torch.uint8
        or images.dim() != 4
        or images.shape[1] != 3
        or 0 in images.shape
    ):
        got = f"{images.dtype} {list(images.shape)}"
        raise dispatch.argument_error(_OP, "images", must, got, "Pass decoded RGB images.")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or not all(math.isfinite(v) for v in values):
            must = "three finite numbers"
            raise dispatch.argument_error(_OP, name, must, values, "Pass one per channel.")
    if min(std) <= 0:
        raise dispatch.argument_error(_OP, "std", "above 0", std, "Pass values of the training.")
    if dtype not in _DTYPES:
        must = f"one of {', '.join(map(str, _DTYPES))}"
        raise dispatch.argument_error(_OP, "dtype", must, dtype, "Convert the result.")
    height, width = images.shape[2:]
    rows, columns = (height, width) if size is None else size
    if not (0 < rows <= height and 0 < columns <= width):
        must = f"from 1 to those of the images, {height} x {width}"
        raise dispatch.argument_error(_OP, "size", must, size, "Crop less.")
    if offsets is not None:
        _check_offsets(offsets, images, height - rows, width - columns)
    return rows, columns


def _check_offsets(offsets: Tensor, images: Tensor, last_row: int, last_column: int) -> None:
    must = f"int32 [{len(images)}, 2]"
    if not isinstance(offsets, Tensor):
        raise dispatch.argument_error(_OP, "offsets", must, type(offsets), "Pass a tensor.")
    if offsets.dtype != torch.int32 or list(offsets.shape) != [len(images), 2]:
        got = f"{offsets.dtype} {list(offsets.shape)}"
        raise dispatch.argument_error(_OP, "offsets", must, got, "Pass (y, x) per image.")
    dispatch.check_device(_OP, "offsets", offsets, images)
    # Looking at values would make a GPU wait, and cannot be compiled.
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        most = offsets.new_tensor([last_row, last_column])
        outside = ((offsets < 0) | (offsets > most)).any(1).nonzero()
        if len(outside):
            first = offsets[outside[0, 0]].tolist()
            must = f"from [0, 0] to {most.tolist()}, so that crops stay within the images"
            raise dispatch.argument_error(_OP, "offsets", must, first, "Check size and offsets.")
