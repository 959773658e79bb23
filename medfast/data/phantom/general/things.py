"""The things: small coloured drawings, each within a circle, placed like findings."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medfast.data.phantom.canvas import Canvas, Field, stripes
from medfast.data.phantom.general.cases import FLYING, Thing
from medfast.data.phantom.general.scenes import rgb
from medfast.data.phantom.placing import Zone, centres

# Radius as a share of half the picture's short side: nothing lies between small and large.
RADII = {"small": (0.1, 0.112), "large": (0.172, 0.188)}

PAINTS = {
    "red": rgb(0.84, 0.1, 0.1),
    "orange": rgb(0.98, 0.5, 0.06),
    "yellow": rgb(0.97, 0.86, 0.14),
    "green": rgb(0.1, 0.56, 0.2),
    "blue": rgb(0.12, 0.3, 0.84),
    "purple": rgb(0.54, 0.18, 0.68),
}
_WHITE, _GREY, _BLACK = rgb(0.95, 0.95, 0.95), rgb(0.55, 0.56, 0.58), rgb(0.08, 0.08, 0.09)
_WOOD, _GLASS, _BEAK = rgb(0.36, 0.24, 0.15), rgb(0.62, 0.74, 0.82), rgb(0.9, 0.6, 0.2)


def draw(canvas: Canvas, thing: Thing, zone: Zone) -> None:
    """Paint the things on the canvas, each a little different in shade and turn."""
    radius = canvas.rng.uniform(*RADII[thing.size])
    for x, y in centres(canvas, thing, zone, radius):
        turn = np.radians(canvas.rng.uniform(-9, 9))
        window = canvas.window(x, y, radius * canvas.unit, 1.2, turn)
        paint = PAINTS[thing.colour] * np.float32(canvas.rng.uniform(0.9, 1.04))
        if thing.kind not in FLYING:
            # A shadow on the ground.
            window.paint(window.ellipse(0.08, 0.9, 0.85, 0.16, softness=3), _BLACK, 0.35)
        _DRAWINGS[thing.kind](window, paint)


# Every drawing lies in the circle of radius 1 around the origin, y downwards.


def _lit(c: Canvas, paint: Field) -> Field:
    """Return the paint lighter towards the top left and darker towards the bottom right."""
    return paint * np.clip(1 - 0.16 * (c.x + c.y), 0.7, 1.2)


def _ball(c: Canvas, paint: Field) -> None:
    ball = c.ellipse(0, 0, 0.95, 0.95)
    c.paint(ball, _lit(c, paint))
    c.paint(ball * c.inside(0.13 - np.abs(c.y + 0.25 * c.x**2)), _WHITE)
    c.paint(c.ellipse(-0.35, -0.5, 0.2, 0.14, -40, softness=3), _WHITE, 0.7)


def _balloon(c: Canvas, paint: Field) -> None:
    c.paint(c.capsule(0, 0.5, 0.06, 0.97, 0.03), _WHITE, 0.8)
    c.paint(c.ellipse(0, -0.25, 0.66, 0.72), _lit(c, paint))
    c.paint(c.polygon((0, 0.4), (0.13, 0.58), (-0.13, 0.58)), paint * 0.8)
    c.paint(c.ellipse(-0.24, -0.55, 0.16, 0.1, -45, softness=3), _WHITE, 0.75)


def _bird(c: Canvas, paint: Field) -> None:
    # Tail, body, head, beak, then the raised wing.
    c.paint(c.polygon((-0.55, 0.05), (-0.4, 0.3), (-0.98, 0.42)), paint * 0.8)
    c.paint(c.ellipse(-0.05, 0.16, 0.6, 0.3, -8), _lit(c, paint))
    c.paint(c.ellipse(0.55, 0.0, 0.24, 0.22), _lit(c, paint))
    c.paint(c.polygon((0.74, -0.1), (0.99, 0.04), (0.74, 0.12)), _BEAK)
    c.paint(c.polygon((-0.5, -0.9), (0.3, 0.12), (-0.28, 0.14)), paint * 0.74)
    c.paint(c.ellipse(0.6, -0.05, 0.06, 0.06), _BLACK)


def _boat(c: Canvas, paint: Field) -> None:
    c.paint(c.capsule(0, -0.9, 0, 0.2, 0.04), _WOOD)
    c.paint(c.polygon((0.08, -0.85), (0.6, 0.05), (0.08, 0.05)), _WHITE)
    c.paint(c.polygon((-0.08, -0.65), (-0.08, 0.05), (-0.48, 0.05)), _WHITE * 0.88)
    c.paint(c.polygon((-0.98, 0.16), (0.98, 0.16), (0.62, 0.78), (-0.66, 0.78)), _lit(c, paint))
    c.paint(c.box(-0.8, 0.3, 0.8, 0.38), _WHITE, 0.7)


def _car(c: Canvas, paint: Field) -> None:
    c.paint(c.polygon((-0.42, -0.5), (0.3, -0.5), (0.62, 0.1), (-0.72, 0.1)), paint * 0.9)
    c.paint(c.box(-0.98, -0.02, 0.98, 0.52), _lit(c, paint))
    c.paint(c.polygon((-0.36, -0.4), (-0.06, -0.4), (-0.06, -0.02), (-0.54, -0.02)), _GLASS)
    c.paint(c.polygon((0.04, -0.4), (0.25, -0.4), (0.46, -0.02), (0.04, -0.02)), _GLASS)
    for x in (-0.54, 0.54):
        c.paint(c.ellipse(x, 0.54, 0.25, 0.25), _BLACK)
        c.paint(c.ellipse(x, 0.54, 0.1, 0.1), _GREY)
    c.paint(c.ellipse(0.92, 0.12, 0.08, 0.08), _WHITE)


def _chair(c: Canvas, paint: Field) -> None:
    for x, top in ((-0.5, 0.2), (0.46, 0.2), (-0.28, 0.1), (0.28, 0.1)):
        c.paint(c.capsule(x, top, x * 1.05, 0.8, 0.08), paint * 0.7)
    c.paint(c.box(-0.5, -0.85, 0.42, 0.1), _lit(c, paint))
    c.paint(c.box(-0.36, -0.58, 0.28, -0.46), paint * 0.6)
    c.paint(c.box(-0.36, -0.3, 0.28, -0.18), paint * 0.6)
    c.paint(c.polygon((-0.52, 0.05), (0.42, 0.05), (0.62, 0.34), (-0.64, 0.34)), paint * 0.9)


def _cup(c: Canvas, paint: Field) -> None:
    c.paint(c.inside(0.1 - np.abs(c.depth(0.55, 0.1, 0.36, 0.4))), paint * 0.8)
    c.paint(c.polygon((-0.72, -0.52), (0.6, -0.52), (0.44, 0.85), (-0.54, 0.85)), _lit(c, paint))
    c.paint(c.ellipse(-0.06, -0.52, 0.66, 0.2), paint * 0.85)
    c.paint(c.ellipse(-0.06, -0.5, 0.54, 0.13), _WOOD)
    c.paint(c.capsule(-0.45, -0.1, -0.38, 0.55, 0.06, softness=3), _WHITE, 0.6)


def _flower(c: Canvas, paint: Field) -> None:
    c.paint(c.capsule(0, 0.2, 0.05, 0.95, 0.08), rgb(0.16, 0.34, 0.12))
    c.paint(c.ellipse(0.26, 0.66, 0.24, 0.09, -35), rgb(0.24, 0.48, 0.2))
    angle, far = np.arctan2(c.y + 0.25, c.x), np.hypot(c.x, c.y + 0.25)
    petals = 0.5 + 0.2 * np.abs(np.cos(angle * 3)) - far
    c.paint(c.inside(petals), _lit(c, paint) * (0.86 + 0.2 * np.abs(np.cos(angle * 3))))
    c.paint(c.ellipse(0, -0.25, 0.17, 0.17), rgb(0.98, 0.92, 0.7))


def _house(c: Canvas, paint: Field) -> None:
    boards = 0.88 + 0.16 * stripes(c.y * 5, 0.5)
    c.paint(c.box(-0.74, -0.16, 0.74, 0.88), _lit(c, paint) * boards)
    c.paint(c.box(0.3, -0.88, 0.5, -0.3), _GREY)
    c.paint(c.polygon((0, -0.92), (0.94, -0.12), (-0.94, -0.12)), rgb(0.32, 0.27, 0.25))
    c.paint(c.box(-0.12, 0.34, 0.2, 0.88), _WOOD)
    for x in (-0.45, 0.5):
        c.paint(c.box(x - 0.17, 0.06, x + 0.17, 0.38), _WHITE)
        c.paint(c.box(x - 0.11, 0.12, x + 0.11, 0.32), _GLASS * 0.7)


def _lamp(c: Canvas, paint: Field) -> None:
    c.paint(c.capsule(0, -0.1, 0, 0.8, 0.07), _BLACK)
    c.paint(c.ellipse(0, 0.84, 0.44, 0.12), _BLACK)
    c.paint(c.polygon((-0.36, -0.95), (0.36, -0.95), (0.8, 0.08), (-0.8, 0.08)), _lit(c, paint))
    c.paint(c.ellipse(0, 0.08, 0.76, 0.1), rgb(1.0, 0.95, 0.75))


def _tree(c: Canvas, paint: Field) -> None:
    c.paint(c.polygon((-0.1, 0.1), (0.1, 0.1), (0.16, 0.92), (-0.16, 0.92)), _WOOD)
    leaves = _lit(c, paint) * (0.84 + 0.14 * c.noise(7))
    for x, y, r in ((-0.4, 0.02, 0.44), (0.4, 0.0, 0.45), (0.0, -0.4, 0.54)):
        c.paint(c.ellipse(x, y, r, r), leaves)


def _umbrella(c: Canvas, paint: Field) -> None:
    c.paint(c.capsule(0, -0.6, 0.0, 0.92, 0.05), _WOOD)
    dome = c.ellipse(0, 0.1, 0.97, 0.98) * c.inside(0.1 - 0.1 * np.abs(np.sin(c.x * 6)) - c.y)
    ribs = 0.8 + 0.2 * stripes(c.x / np.clip(c.y + 1.3, 0.3, None) * 2.4, 0.4)
    c.paint(dome, _lit(c, paint) * ribs)


_DRAWINGS: dict[str, Callable[[Canvas, Field], None]] = {
    "ball": _ball,
    "balloon": _balloon,
    "bird": _bird,
    "boat": _boat,
    "car": _car,
    "chair": _chair,
    "cup": _cup,
    "flower": _flower,
    "house": _house,
    "lamp": _lamp,
    "tree": _tree,
    "umbrella": _umbrella,
}
