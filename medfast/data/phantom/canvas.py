"""A soft-edged drawing surface in body coordinates, with a pose and an organic wobble."""

from __future__ import annotations

from copy import copy

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Field = NDArray[np.floating]


def stripes(phase: Field, sharpness: float) -> Field:
    """Return bands, one per unit of `phase`; higher `sharpness` makes them narrower."""
    return (0.5 + 0.5 * np.cos(2 * np.pi * phase)) ** sharpness


class Canvas:
    """A picture in [0, 1] on which anatomy, or a scene, is painted in body coordinates.

    The body spans [-1, 1] in x (to the viewer's right) and y (downwards) over the central square of
    the picture; the pose (shift, turn, scale) and a smooth warp come from `rng`. Never mirrored.

    `value` has shape [height, width], and [3, height, width] in `colour`, where [3, 1, 1] is what
    is painted.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        width: int,
        height: int,
        *,
        colour: bool = False,
        wobble: float = 0.03,
    ) -> None:
        self.rng = rng
        self.shape = (height, width)
        self.unit = min(width, height) / 2
        self._centre = np.array([width / 2, height / 2]) + rng.uniform(-0.05, 0.05, 2) * self.unit
        turn = np.radians(rng.uniform(-6, 6))
        scale = rng.uniform(0.92, 1.06) * rng.uniform(0.97, 1.03, 2)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        self._pose = rotation * scale * self.unit

        columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        offsets = np.stack([columns - self._centre[0], rows - self._centre[1]])
        body = np.einsum("ij,jhw->ihw", np.linalg.inv(self._pose), offsets).astype(np.float32)
        self.x: Field = body[0] + wobble * self.noise(4)
        self.y: Field = body[1] + wobble * self.noise(4)
        self.value: Field = np.zeros((3, *self.shape) if colour else self.shape, np.float32)

    def to_pixels(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the pixel coordinates (x, y) of body points [N, 2]."""
        return points @ self._pose.T + self._centre

    def window(self, x: float, y: float, radius: float, reach: float, turn: float) -> Canvas:
        """Return the part around a pixel as a canvas of its own, with coordinates of its own.

        Args:
            x: Column of the pixel, which is the new origin.
            y: Its row.
            radius: The new unit, in pixels.
            reach: How far the part goes to all sides, in new units.
            turn: Of the new axes, in radians.
        """
        height, width = self.shape
        left, right = max(0, int(x - reach * radius)), min(width, int(x + reach * radius) + 1)
        top, bottom = max(0, int(y - reach * radius)), min(height, int(y + reach * radius) + 1)
        columns, rows = np.meshgrid(
            np.arange(left, right, dtype=np.float32) + (0.5 - x),
            np.arange(top, bottom, dtype=np.float32) + (0.5 - y),
        )
        window = copy(self)
        window.shape, window.unit = rows.shape, radius
        window.x = (columns * np.cos(turn) + rows * np.sin(turn)) / radius
        window.y = (rows * np.cos(turn) - columns * np.sin(turn)) / radius
        window.value = self.value[..., top:bottom, left:right]
        return window

    def noise(self, cells: int) -> Field:
        """Return smooth noise of about unit size with `cells` humps along the short side."""
        rows, columns = (max(2, round(cells * length / self.unit / 2)) for length in self.shape)
        coarse = self.rng.standard_normal((rows, columns), dtype=np.float32)
        height, width = self.shape
        return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))

    def paint(self, mask: Field, value: float | Field, opacity: float = 1.0) -> None:
        """Blend `value` into the picture where `mask` is set."""
        self.value += (value - self.value) * (opacity * mask)

    def inside(self, distance: Field, softness: float = 1.0) -> Field:
        """Return the mask of positive `distance` (body units) with an edge of `softness` pixels."""
        return np.clip(distance * (self.unit / softness) + 0.5, 0, 1)

    def ellipse(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        turn: float = 0.0,
        softness: float = 1.5,
    ) -> Field:
        """Return the mask of an ellipse with centre, radii and turn in degrees."""
        return self.inside(self.depth(x, y, rx, ry, turn), softness)

    def depth(self, x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> Field:
        """Return about how deep each point lies inside an ellipse; negative outside."""
        cos, sin = np.cos(np.radians(turn)), np.sin(np.radians(turn))
        u = ((self.x - x) * cos + (self.y - y) * sin) * (1 / rx)
        v = ((self.y - y) * cos - (self.x - x) * sin) * (1 / ry)
        return (1 - np.sqrt(u * u + v * v)) * min(rx, ry)

    def polygon(self, *corners: tuple[float, float], softness: float = 1.5) -> Field:
        """Return the mask of a convex polygon whose corners go clockwise round it."""
        edges = zip(corners, (*corners[1:], corners[0]), strict=True)
        depths = [
            ((self.y - y0) * (x1 - x0) - (self.x - x0) * (y1 - y0)) / np.hypot(x1 - x0, y1 - y0)
            for (x0, y0), (x1, y1) in edges
        ]
        return self.inside(np.minimum.reduce(depths), softness)

    def box(self, x0: float, y0: float, x1: float, y1: float, softness: float = 1.5) -> Field:
        """Return the mask of an upright rectangle between two of its corners."""
        depth = np.minimum(
            (x1 - x0) / 2 - np.abs(self.x - (x0 + x1) / 2),
            (y1 - y0) / 2 - np.abs(self.y - (y0 + y1) / 2),
        )
        return self.inside(depth, softness)

    def capsule(
        self, x0: float, y0: float, x1: float, y1: float, radius: float, softness: float = 1.5
    ) -> Field:
        """Return the mask of a thick line with round ends."""
        dx, dy = x1 - x0, y1 - y0
        along = ((self.x - x0) * dx + (self.y - y0) * dy) / (dx * dx + dy * dy)
        along = np.clip(along, 0, 1)
        distance = np.hypot(self.x - x0 - along * dx, self.y - y0 - along * dy)
        return self.inside(radius - distance, softness)
