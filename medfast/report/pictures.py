"""Pictures of the report: thumbnails and attention overlays as data URIs."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

_COLOUR_MAP = "inferno"
_OPACITY = 0.85

LEAST_PEAK = 4.0
"""Peak weight, in multiples of an even spread, below which a word is not drawn at full strength."""


def thumbnail(image: Image.Image, size: int) -> Image.Image:
    """Return `image` in RGB with no side longer than `size` pixels."""
    small = image.convert("RGB")
    small.thumbnail((size, size))
    return small


def data_uri(image: Image.Image) -> str:
    """Return `image` as a JPEG inside a `data:` address."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=78, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def peak(weights: np.ndarray) -> float:
    """Return the greatest of `weights` [H, W] in multiples of an even spread."""
    import numpy as np

    finite = np.nan_to_num(np.asarray(weights, dtype=np.float64), posinf=0.0, neginf=0.0)
    return float(finite.max(initial=0.0) * finite.size)


def overlay(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """Lay the attention of one word over a grey copy of `image`.

    Colour and opacity are `weights / max(weights.max(), LEAST_PEAK / (H * W))`: every word shows
    where it looks most, and a word that looks everywhere alike stays pale.

    Args:
        image: RGB, at the size of the result.
        weights: [H, W], of the patches that tile the image, summing to 1.
    """
    import numpy as np
    from PIL import Image

    weights = np.nan_to_num(np.asarray(weights, dtype=np.float32), posinf=0.0, neginf=0.0)
    strength = Image.fromarray(weights * (weights.size / max(peak(weights), LEAST_PEAK)))
    smooth = np.asarray(strength.resize(image.size, Image.Resampling.BICUBIC))
    return Image.fromarray(_paint(np.asarray(image.convert("L")), smooth))


def colour_scale() -> str:
    """Return the overlay's colours from no weight to full weight, over mid-grey, as CSS colours."""
    import numpy as np

    strength = np.linspace(0.0, 1.0, 9)
    colours = _paint(np.full(strength.shape, 128, np.uint8), strength)
    return ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in colours)


def _paint(grey: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Return RGB [..., 3]: `grey` [...] turning into the colour map as `strength` [...] grows."""
    import matplotlib
    import numpy as np

    strength = np.clip(strength, 0.0, 1.0)  # bicubic interpolation overshoots at edges
    colour = 255 * matplotlib.colormaps[_COLOUR_MAP](strength)[..., :3]
    alpha = _OPACITY * strength[..., None]
    return ((1 - alpha) * grey[..., None] + alpha * colour).round().astype(np.uint8)
