"""normalize_crops beside torchvision's chain of crop, conversion and normalisation."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.compare import comparison
from benchmarks.conftest import Note
from benchmarks.measure import Run, interleave
from medfast.models import PRESETS
from medfast.ops import dispatch, normalize_crops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRESET = PRESETS["vit_b16_clip"]
SIZE = PRESET.image_size
# Decoded images, of which 224 pixels a side are kept.
SIDE = 256
# Of the values, of which bf16 keeps eight bits.
TOLERANCE = 2**-7


def torchvision_chain(images: Tensor, offsets: Tensor) -> Tensor:
    """Return the crops as torchvision's functions make them, one image at a time."""
    from torchvision.transforms.v2 import functional as F

    crops = [
        F.to_dtype(F.crop(image, int(y), int(x), SIZE, SIZE), torch.float32, scale=True)
        for image, (y, x) in zip(images, offsets, strict=True)
    ]
    pixels = F.normalize(torch.stack(crops), list(PRESET.mean), list(PRESET.std))
    return pixels.to(torch.bfloat16, memory_format=torch.channels_last)


@pytest.mark.parametrize("B", [64, 256])
def test_crops(benchmark: Any, note: Note, B: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (B, SIDE, SIDE, 3)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    offsets = torch.randint(SIDE - SIZE + 1, (B, 2), dtype=torch.int32, generator=generator)
    images, offsets = images.to(DEVICE), offsets.to(DEVICE)
    calls = {
        f"medfast {impl}": functools.partial(
            normalize_crops,
            images,
            PRESET.mean,
            PRESET.std,
            offsets=offsets,
            size=(SIZE, SIZE),
            impl=impl,
        )
        for impl in dispatch.IMPLEMENTATIONS["normalize_crops"]
        if impl != "reference" and dispatch.why_not("normalize_crops", impl, images) is None
    }
    chain = functools.partial(torchvision_chain, images, offsets)
    expected = chain().float()
    errors = {name: (call().float() - expected).abs().max().item() for name, call in calls.items()}
    largest = expected.abs().max().item()
    assert all(error <= TOLERANCE * largest for error in errors.values()), errors
    runs = {name: Run(call) for name, call in {**calls, "torchvision": chain}.items()}
    timings = interleave(runs, seconds=3, device=DEVICE)
    rows = [
        {
            "variant": name,
            "own": name != "torchvision",
            "dtype": "bfloat16",
            "errors": {"pixels": errors.get(name, 0.0) / largest},
            **timing.row(),
        }
        for name, timing in timings.items()
    ]
    note(comparison("normalize_crops", shape, rows, DEVICE, passes="forward", clock="device"))
    benchmark.pedantic(next(iter(calls.values())), rounds=3)
