"""From a sample to a photograph: the scene, its things, then the marks of the camera."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from medfast.data.phantom.canvas import Canvas
from medfast.data.phantom.cases import PICTURE, Sample
from medfast.data.phantom.exposure import eight_bits, exposed, grain, size
from medfast.data.phantom.general import scenes, things
from medfast.data.phantom.general.cases import Scene
from medfast.data.phantom.general.scenes import rgb

_LUMA = rgb(0.299, 0.587, 0.114)
# The colour of the light on things too; indoors and by day it is nearly white.
_CASTS = {"sunset": rgb(1.0, 0.9, 0.82), "night": rgb(0.74, 0.8, 0.95)}


def render(sample: Sample[Scene]) -> Image.Image:
    """Return the photograph of a sample, grey or RGB, short side 128 to 140 pixels."""
    rng = sample.rng(PICTURE)
    scene = sample.case
    # Straight lines stay almost straight: less wobble than anatomy has.
    canvas = Canvas(rng, *size(rng), colour=True, wobble=0.012)
    scenes.draw(canvas, scene)
    if scene.finding is not None:
        things.draw(canvas, scene.finding, scenes.zone(scene))
    if scene.setting in _CASTS:
        canvas.value *= _CASTS[scene.setting]
    _camera(canvas)
    if scene.grey:
        canvas.value = (canvas.value * _LUMA).sum(axis=0)
    pixels = eight_bits(exposed(canvas.value, rng, (0.3, 0.52)))
    image = Image.fromarray(pixels if scene.grey else np.moveaxis(pixels, 0, -1).copy())
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.6)))
    # Some grey photographs are stored in colour.
    return image.convert("RGB") if scene.grey and rng.random() < 0.5 else image


def _camera(canvas: Canvas) -> None:
    """Add white balance, uneven light, dark corners and grain."""
    balance = rgb(*canvas.rng.uniform(0.95, 1.05, 3))
    corners = canvas.rng.uniform(0, 0.14) * (canvas.x**2 + canvas.y**2)
    light = 1 + 0.04 * canvas.noise(2) - corners
    canvas.value *= balance * light.astype(np.float32)
    canvas.value += grain(canvas, canvas.rng.uniform(0.006, 0.024))
