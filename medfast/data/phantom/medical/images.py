"""From a sample to a picture: anatomy, findings, then the marks of the modality's acquisition."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from medfast.data.phantom.canvas import Canvas, Field
from medfast.data.phantom.cases import PICTURE, Sample
from medfast.data.phantom.exposure import eight_bits, exposed, grain, size
from medfast.data.phantom.medical import anatomy, findings
from medfast.data.phantom.medical.cases import MedicalCase

_STAIN = np.array([[0.20, 0.10, 0.36], [0.80, 0.48, 0.66], [0.98, 0.95, 0.97]])
_LUMA = np.array([0.299, 0.587, 0.114])


def render(sample: Sample[MedicalCase]) -> Image.Image:
    """Return the picture of a sample, grey or RGB, short side 128 to 140 pixels."""
    rng = sample.rng(PICTURE)
    case = sample.case
    canvas = Canvas(rng, *size(rng))
    section = anatomy.ANATOMY[case.modality, case.organ]
    section.draw(canvas)
    stained = case.modality == "histology"
    if case.finding is not None:
        findings.draw(canvas, case.finding, section.zone, ink=0.06 if stained else 0.97)
    _ACQUISITIONS[case.modality](canvas)
    levels = exposed(canvas.value, rng, (0.42, 0.66) if stained else (0.24, 0.44))
    grey = Image.fromarray(eight_bits(levels))
    if rng.random() < 0.3:
        grey = grey.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.6)))
    return _coloured(grey, stained, rng)


def _smeared(field: Field) -> Field:
    """Return the field averaged over neighbours in a row and in a column, of unit size."""
    rows = field + np.roll(field, 1, axis=1) + np.roll(field, 2, axis=1)
    return (rows + np.roll(rows, 1, axis=0)) / np.float32(6**0.5)


def _radiograph(canvas: Canvas) -> None:
    canvas.value += grain(canvas, canvas.rng.uniform(0.01, 0.035)) + 0.03 * canvas.noise(2)


def _ct(canvas: Canvas) -> None:
    # Reconstruction noise is coarser than a pixel and fills the air around the body as well.
    strength = canvas.rng.uniform(0.01, 0.03)
    canvas.value += grain(canvas, strength) + strength * canvas.noise(50)


def _mr(canvas: Canvas) -> None:
    # The coil's uneven sensitivity, then the noise of a magnitude image.
    canvas.value *= 1 + 0.12 * canvas.noise(2)
    strength = canvas.rng.uniform(0.01, 0.03)
    canvas.value = np.hypot(canvas.value + grain(canvas, strength), grain(canvas, strength))


def _ultrasound(canvas: Canvas) -> None:
    # The envelope of two speckle fields, each smeared along the echo's width.
    speckle = np.hypot(*(_smeared(grain(canvas, 1.0)) for _ in range(2)))
    canvas.value *= 1 + canvas.rng.uniform(0.25, 0.4) * (speckle - 1)
    canvas.value *= 1.08 - 0.15 * canvas.y
    fan = np.abs(np.arctan2(canvas.x, canvas.y + 1.9))
    radius = np.hypot(canvas.x, canvas.y + 1.9)
    inside = canvas.inside((0.56 - fan) * radius) * canvas.inside(2.85 - radius)
    canvas.value *= inside * canvas.inside(radius - 1.0)


def _histology(canvas: Canvas) -> None:
    canvas.value += grain(canvas, 0.025) + 0.03 * canvas.noise(3)


_ACQUISITIONS = {
    "radiograph": _radiograph,
    "ct": _ct,
    "mr": _mr,
    "ultrasound": _ultrasound,
    "histology": _histology,
}


def _coloured(grey: Image.Image, stained: bool, rng: np.random.Generator) -> Image.Image:
    """Return a stained section in its colours, and other pictures grey or with a faint tint."""
    if stained:
        return _toned(grey, _stain(rng))
    chance = rng.random()
    if chance < 0.6:
        return grey
    if chance < 0.85:
        return grey.convert("RGB")
    return _toned(grey, np.outer([0.0, 0.5, 1.0], rng.uniform(0.93, 1.0, 3)))


def _stain(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the colours of dark, middle and light; about one section in four is nearly grey."""
    colours = _STAIN + rng.uniform(-0.07, 0.07, (3, 3))
    saturation = rng.uniform(0, 0.15) if rng.random() < 0.25 else rng.uniform(0.4, 1.1)
    grey = (colours @ _LUMA)[:, None]
    return np.clip(grey + saturation * (colours - grey), 0, 1)


def _toned(grey: Image.Image, colours: NDArray[np.float64]) -> Image.Image:
    """Return the picture with its levels mapped along the line through three colours."""
    levels = np.linspace(0, 1, 256)
    table = np.stack([np.interp(levels, (0, 0.5, 1), channel) for channel in colours.T], axis=1)
    return Image.fromarray((table[np.asarray(grey)] * 255).astype(np.uint8))
