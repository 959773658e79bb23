"""The findings: their shapes as small masks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medfast.data.phantom.canvas import Canvas, Field
from medfast.data.phantom.cases import Finding
from medfast.data.phantom.placing import Zone, centres

# Radius as a share of half the picture's short side: nothing lies between small and large.
RADII = {"small": (0.088, 0.1), "large": (0.168, 0.182)}


def draw(canvas: Canvas, finding: Finding, zone: Zone, ink: float) -> None:
    """Paint a finding on the canvas, in about the grey level `ink` on toned-down tissue."""
    radius = canvas.rng.uniform(*RADII[finding.size])
    for x, y in centres(canvas, finding, zone, radius):
        _stamp(canvas, finding.kind, x, y, radius * canvas.unit, ink)


def _stamp(canvas: Canvas, kind: str, x: float, y: float, size: float, ink: float) -> None:
    window = canvas.window(x, y, size, 1.7, canvas.rng.uniform(0, 2 * np.pi))
    u, v, tissue = window.x, window.y, window.value
    r = np.hypot(u, v)
    paper = 0.12 if ink > 0.5 else 0.78
    # Quietens the anatomy around the finding, so that its outline can be told from the texture.
    tissue += (paper - tissue) * (0.35 * np.clip(2.6 - 1.6 * r, 0, 1))
    if kind == "cyst":
        tissue += (paper - tissue) * (0.8 * _soft(1 - r, size))
    mask = _soft(_SHAPES[kind](u, v, size, canvas.rng), size)
    tissue += (ink - tissue) * (canvas.rng.uniform(0.82, 0.95) * mask)


def _soft(depth: Field, size: float) -> Field:
    # An edge of about one pixel; depth is in units of the finding's radius.
    return np.clip(depth * (size / 1.2) + 0.5, 0, 1)


# Every shape returns the depth below its outline, negative outside, in the lesion's own turned
# coordinates, in which it fits a circle of radius 1; `size` is that radius in pixels.


def _nodule(u: Field, v: Field, size: float, rng: np.random.Generator) -> Field:
    return 1 - np.hypot(u, v * rng.uniform(0.93, 1.07))


def _cyst(u: Field, v: Field, size: float, rng: np.random.Generator) -> Field:
    half_wall = max(0.1, 0.95 / size)
    return half_wall - np.abs(np.hypot(u, v) - (1.05 - half_wall))


def _spiculated_mass(u: Field, v: Field, size: float, rng: np.random.Generator) -> Field:
    spikes = int(rng.integers(7, 10))
    angle = np.arctan2(v, u)
    length = 0.75 + 0.1 * np.cos(3 * angle + rng.uniform(0, 6))
    return 0.42 + length * np.abs(np.cos(angle * spikes / 2)) ** 4 - np.hypot(u, v)


def _wedge(u: Field, v: Field, size: float, rng: np.random.Generator) -> Field:
    slope = rng.uniform(0.48, 0.6)
    flank = (slope * (u + 1.1) - np.abs(v)) / np.hypot(1, slope)
    return np.minimum(flank, 0.62 - u)


def _calcifications(u: Field, v: Field, size: float, rng: np.random.Generator) -> Field:
    # A sunflower's spiral, shaken: specks about evenly apart and closer than to the next cluster.
    specks = 7 if size < 9 else 13
    index = np.arange(specks) + 0.5
    reach = 0.85 * np.sqrt(index / specks) + rng.uniform(-0.06, 0.06, specks)
    angle = 2.4 * index + rng.uniform(-0.15, 0.15, specks)
    radius = rng.uniform(0.8, 1.2, specks) * max(0.1, 1.0 / size)
    distance = np.hypot(u[..., None] - reach * np.cos(angle), v[..., None] - reach * np.sin(angle))
    return (radius - distance).max(axis=-1)


def _crescent(u: Field, v: Field, size: float, rng: np.random.Generator) -> Field:
    return np.minimum(1.05 - np.hypot(u, v), np.hypot(u - rng.uniform(0.45, 0.55), v) - 0.82)


_SHAPES: dict[str, Callable[[Field, Field, float, np.random.Generator], Field]] = {
    "nodule": _nodule,
    "cyst": _cyst,
    "spiculated mass": _spiculated_mass,
    "wedge": _wedge,
    "calcifications": _calcifications,
    "crescent": _crescent,
}
