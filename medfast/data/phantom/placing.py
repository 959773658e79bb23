"""Where findings lie: on their side, and far enough apart to be counted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medfast.data.phantom.canvas import Canvas
from medfast.data.phantom.cases import COUNTS, Finding

# The ellipse (x, y, rx, ry) in body coordinates in which findings are centred on the viewer's
# right; on the left it is the mirror image.
Zone = tuple[float, float, float, float]

# Centres keep this many radii apart, and a margin that keeps small neighbours apart as well.
_SPACING, _MARGIN = 2.35, 0.03
_CANDIDATES = 512


def centres(canvas: Canvas, finding: Finding, zone: Zone, radius: float) -> NDArray[np.float64]:
    """Return one pixel position (x, y) per piece [N, 2], far enough apart to be counted."""
    x, y, rx, ry = zone
    number = COUNTS.index(finding.count) + 1
    angle = canvas.rng.uniform(0, 2 * np.pi, (_CANDIDATES, number))
    # A single one lies anywhere in the zone; several keep to its rim, where they have room.
    reach = canvas.rng.uniform(0, 1, (_CANDIDATES, number)) ** (0.5 / number)
    body = np.stack([x + rx * reach * np.cos(angle), y + ry * reach * np.sin(angle)], axis=-1)
    if finding.side == "left":
        body[..., 0] *= -1
    points = canvas.to_pixels(body)
    if number == 1:
        return points[0]
    # Of many tries at once, the first with enough room, else the roomiest.
    one, other = np.triu_indices(number, 1)
    gaps = np.linalg.norm(points[:, one] - points[:, other], axis=-1).min(axis=1)
    enough = gaps >= (_SPACING * radius + _MARGIN) * canvas.unit
    return points[np.argmax(enough) if enough.any() else np.argmax(gaps)]
