"""A soft-edged drawing surface in body coordinates, with a pose and an organic wobble."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Field = NDArray[np.floating]


class Canvas:
    """A grey picture in [0, 1] on which anatomy is painted in body coordinates.

    The body spans [-1, 1] in x (to the viewer's right) and y (downwards) over the central square of
    the picture; the pose (shift, turn, scale) and a smooth warp come from `rng`. Never mirrored.
    """

    def __init__(self, rng: np.random.Generator, width: int, height: int) -> None:
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
        self.x: Field = body[0] + 0.03 * self.noise(4)
        self.y: Field = body[1] + 0.03 * self.noise(4)
        self.value: Field = np.zeros(self.shape, np.float32)

    def to_pixels(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the pixel coordinates (x, y) of body points [N, 2]."""
        return points @ self._pose.T + self._centre

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

    def capsule(
        self, x0: float, y0: float, x1: float, y1: float, radius: float, softness: float = 1.5
    ) -> Field:
        """Return the mask of a thick line with round ends."""
        dx, dy = x1 - x0, y1 - y0
        along = ((self.x - x0) * dx + (self.y - y0) * dy) / (dx * dx + dy * dy)
        along = np.clip(along, 0, 1)
        distance = np.hypot(self.x - x0 - along * dx, self.y - y0 - along * dy)
        return self.inside(radius - distance, softness)
