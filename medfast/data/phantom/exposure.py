"""What the camera does to a picture of any domain: its size, its grain and its exposure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medfast.data.phantom.canvas import Canvas, Field


def size(rng: np.random.Generator) -> tuple[int, int]:
    """Return width and height of a picture, the short side 128 to 140 pixels."""
    short = int(rng.integers(128, 141))
    long = int(short * rng.uniform(1.05, 1.2)) if rng.random() < 0.3 else short
    return (long, short) if rng.random() < 0.5 else (short, long)


def grain(canvas: Canvas, strength: float) -> Field:
    """Return noise that differs from pixel to pixel."""
    return strength * canvas.rng.standard_normal(canvas.shape, dtype=np.float32)


def exposed(value: Field, rng: np.random.Generator, means: tuple[float, float]) -> Field:
    """Return the picture with a gamma for a random mean, and a random range.

    The target knows nothing of the content, so neither modality nor finding shows in the mean.
    """
    value = np.clip(value, 0.004, 1)
    target = rng.uniform(*means)
    logs = np.log(value)
    sparse = logs[..., ::4, ::4]
    low, high = 0.55, 1.8
    for _ in range(8):
        gamma = (low + high) / 2
        if np.exp(gamma * sparse).mean() > target:
            low = gamma
        else:
            high = gamma
    black, white = rng.uniform(0, 0.16), rng.uniform(0.76, 1.0)
    return black + (white - black) * np.exp(gamma * logs)


def eight_bits(levels: Field) -> NDArray[np.uint8]:
    """Return levels in [0, 1] as whole numbers up to 255."""
    return np.clip(levels * 255 + 0.5, 0, 255).astype(np.uint8)
