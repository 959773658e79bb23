"""The drawn background of every scene, and where things may be in it.

Backgrounds are painted from far to near, in colour, in the body coordinates of `Canvas`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medfast.data.phantom.canvas import Canvas, Field, stripes
from medfast.data.phantom.general.cases import FLYING, SWIMMING, Scene
from medfast.data.phantom.placing import Zone


def rgb(red: float, green: float, blue: float) -> Field:
    """Return a colour as it is painted."""
    return np.array([red, green, blue], np.float32)[:, None, None]


# Where the horizon is, and around which centres lie, for things that fly and all others.
_LOW, _HIGH = 0.52, -0.46
_SKY_ZONE: Zone = (0.47, -0.22, 0.2, 0.52)
_GROUND_ZONE: Zone = (0.47, 0.22, 0.2, 0.52)

# The sky above and at the horizon, the light on the ground and the light on all.
_SKIES = {
    "sunny": (rgb(0.22, 0.46, 0.86), rgb(0.7, 0.86, 0.98)),
    "cloudy": (rgb(0.5, 0.56, 0.64), rgb(0.78, 0.8, 0.82)),
    "sunset": (rgb(0.34, 0.28, 0.52), rgb(0.98, 0.62, 0.36)),
    "night": (rgb(0.03, 0.05, 0.16), rgb(0.12, 0.17, 0.36)),
}
_GROUND_LIGHT = {
    "sunny": rgb(1.0, 1.0, 1.0),
    "cloudy": rgb(0.84, 0.86, 0.88),
    "sunset": rgb(0.82, 0.62, 0.54),
    "night": rgb(0.3, 0.36, 0.52),
}
_WHITE = rgb(1, 1, 1)


def zone(scene: Scene) -> Zone:
    """Return where the scene's things may be centred, on the viewer's right."""
    return _SKY_ZONE if _flies(scene) else _GROUND_ZONE


def draw(c: Canvas, scene: Scene) -> None:
    """Paint the scene without its things: they have room above or below its horizon."""
    horizon = (_LOW if _flies(scene) else _HIGH) + c.rng.uniform(-0.06, 0.06)
    _BACKGROUNDS[scene.modality](c, scene, horizon)


def _flies(scene: Scene) -> bool:
    return scene.finding is not None and scene.finding.kind in FLYING


def _meadow(c: Canvas, scene: Scene, horizon: float) -> None:
    _sky(c, scene.setting, horizon)
    light = _GROUND_LIGHT[scene.setting]
    _hills(c, horizon, 0.12, rgb(0.28, 0.44, 0.4) * light)
    grass = 0.9 + 0.11 * c.noise(60) + 0.12 * (c.y - horizon)
    _ground(c, horizon, rgb(0.42, 0.6, 0.24) * light * grass)
    # Small white blossoms.
    c.paint(np.clip(c.noise(40) * 2 - 4, 0, 1) * (c.y > horizon + 0.1), light, 0.8)


def _beach(c: Canvas, scene: Scene, horizon: float) -> None:
    _sky(c, scene.setting, horizon)
    light = _GROUND_LIGHT[scene.setting]
    waves = stripes(c.y * c.rng.uniform(7, 10) + 0.5 * c.noise(6), 2)
    _ground(c, horizon, rgb(0.14, 0.4, 0.52) * light * (0.85 + 0.3 * waves))
    swims = scene.finding is not None and scene.finding.kind in SWIMMING
    shore = (1.0 if swims else horizon + 0.16) + 0.04 * np.sin(
        c.x * c.rng.uniform(2, 4) + c.rng.uniform(0, 6)
    )
    sand = 0.95 + 0.06 * c.noise(60)
    _ground(c, shore, rgb(0.84, 0.74, 0.56) * light * sand, softness=3)
    # Foam where the waves end.
    c.paint(c.inside(0.022 - np.abs(c.y - shore), 2), light, 0.8)


def _street(c: Canvas, scene: Scene, horizon: float) -> None:
    _sky(c, scene.setting, horizon)
    light = _GROUND_LIGHT[scene.setting]
    # A row of houses of equal width and unequal height, in brick, with windows.
    along = (c.x + 3) * c.rng.uniform(1.6, 2.2) + c.rng.uniform(0, 1)
    house = along.astype(int)
    heights, tones = c.rng.uniform((0.22, 0.5), (0.5, 0.85), (16, 2)).astype(np.float32).T
    tops = horizon - heights[house]
    walls = rgb(0.72, 0.6, 0.52) * tones[house] * (0.8 + 0.25 * _bricks(c, 12))
    front = (c.y > tops) * c.inside(horizon - c.y)
    c.paint(front, walls * light)
    panes = (np.abs((along * 3) % 1 - 0.5) < 0.22) * (np.abs((c.y * 5.5) % 1 - 0.5) < 0.26)
    lit = rgb(0.95, 0.82, 0.5) if scene.setting == "night" else rgb(0.3, 0.36, 0.42)
    c.paint(front * panes * (c.y > tops + 0.06), lit, 0.9)
    # Pavement, kerb, road with its dashes.
    _ground(c, horizon, rgb(0.66, 0.65, 0.63) * light)
    kerb = horizon + 0.12
    _ground(c, kerb, rgb(0.4, 0.41, 0.43) * light * (1 + 0.06 * c.noise(60)))
    c.paint(c.inside(0.015 - np.abs(c.y - kerb)), light, 0.5)
    dashes = c.inside(0.022 - np.abs(c.y - (kerb + 1) / 2)) * (stripes(c.x * 1.7, 1) > 0.5)
    c.paint(dashes, light, 0.8)


def _room(c: Canvas, scene: Scene, horizon: float) -> None:
    # Lit from a side, so that no part of the wall is like another.
    glow = 0.9 + c.rng.uniform(-0.12, 0.12) * c.x + 0.03 * c.noise(3)
    if scene.setting == "brick wall":
        c.value += rgb(0.66, 0.46, 0.38) * glow * (0.72 + 0.32 * _bricks(c, 7))
    elif scene.setting == "striped wall":
        bands = stripes(c.x * c.rng.uniform(3.2, 4.6), 0.5)
        c.value += rgb(0.78, 0.72, 0.62) * glow + rgb(0.1, 0.14, 0.12) * (bands - 0.5)
    else:
        c.value += rgb(0.8, 0.77, 0.7) * glow * (1 + 0.015 * c.noise(40))
    if c.rng.random() < 0.6:
        _framed_picture(c, c.rng.uniform(-0.6, 0.6), horizon - c.rng.uniform(0.3, 0.4))
    # Boards that run towards the viewer, and the skirting.
    across = c.x / np.clip(c.y - horizon + 0.9, 0.3, None)
    boards = 0.82 + 0.2 * stripes(across * 5, 0.15)
    _ground(c, horizon, rgb(0.62, 0.45, 0.3) * boards)
    c.paint(c.inside(0.035 - np.abs(c.y - horizon)), rgb(0.88, 0.86, 0.82))


def _snow(c: Canvas, scene: Scene, horizon: float) -> None:
    _sky(c, scene.setting, horizon)
    light = _GROUND_LIGHT[scene.setting]
    _hills(c, horizon, 0.16, rgb(0.62, 0.7, 0.82) * light)
    # A far wood of firs: a row of narrow teeth.
    teeth = np.abs((c.x * c.rng.uniform(8, 11)) % 1 - 0.5)
    firs = c.inside(c.y - horizon + 0.06 + 0.04 * np.sin(c.x * 5) - 0.16 * teeth)
    c.paint(firs, rgb(0.16, 0.25, 0.24) * light)
    drifts = 0.92 + 0.06 * c.noise(4)
    _ground(c, horizon, rgb(0.9, 0.94, 1.0) * light * drifts, softness=3)
    if scene.setting == "cloudy":
        c.paint(np.clip(c.noise(34) * 2 - 3.4, 0, 1), _WHITE, 0.9)


def _desert(c: Canvas, scene: Scene, horizon: float) -> None:
    _sky(c, scene.setting, horizon)
    light = _GROUND_LIGHT[scene.setting]
    _hills(c, horizon, 0.14, rgb(0.68, 0.5, 0.34) * light)
    # Ripples that the wind left, and the shaded side of a dune.
    ripples = stripes(c.y * 9 + c.x * c.rng.uniform(-3, 3) + 0.7 * c.noise(5), 1)
    _ground(c, horizon, rgb(0.86, 0.66, 0.42) * light * (0.86 + 0.16 * ripples))
    crest = horizon + 0.35 + 0.14 * np.sin(c.x * c.rng.uniform(1.5, 3) + c.rng.uniform(0, 6))
    dune = c.inside(c.y - crest) * np.clip(1 - 2 * (c.y - crest), 0, 1)
    c.paint(dune, rgb(0.5, 0.34, 0.24) * light, 0.35)


def _sky(c: Canvas, setting: str, horizon: float) -> None:
    top, bottom = _SKIES[setting]
    height = np.clip((c.y + 1.1) * (1 / (horizon + 1.1)), 0, 1)
    c.value += top + (bottom - top) * height
    x, y = c.rng.uniform(-0.9, 0.9), c.rng.uniform(-0.95, -0.75)
    if setting == "night":
        c.paint(np.clip(c.noise(48) * 3 - 6.5, 0, 1), _WHITE, 0.9)
        c.paint(c.ellipse(x, y, 0.09, 0.09), rgb(0.95, 0.94, 0.86))
        return
    if setting == "sunset":
        y = horizon - 0.05
    if setting != "cloudy":
        # The sun in its glow.
        glow = np.clip(1 - np.hypot(c.x - x, c.y - y) * 2.2, 0, 1) ** 2
        c.paint(glow, rgb(1.0, 0.93, 0.78), 0.7)
        c.paint(c.ellipse(x, y, 0.1, 0.1, softness=3), rgb(1.0, 0.98, 0.9))
    cover = 0.75 if setting == "cloudy" else -0.6
    clouds = np.clip(0.7 * c.noise(4) + 0.35 * c.noise(10) + cover, 0, 1)
    c.paint(clouds, rgb(0.94, 0.93, 0.93), 0.75)


def _hills(c: Canvas, horizon: float, height: float, colour: Field) -> None:
    """Paint two rows of far hills, the farther one paler."""
    for distance, haze in ((1.0, 0.5), (0.5, 0.2)):
        waves = np.sin(c.x * c.rng.uniform(2, 5) + c.rng.uniform(0, 6))
        crest = horizon - height * distance * (0.75 + 0.25 * waves)
        c.paint(c.inside(c.y - crest), colour + haze * (rgb(0.7, 0.74, 0.78) * colour.mean()))


def _ground(c: Canvas, start: float | Field, colour: Field, softness: float = 1.5) -> None:
    """Paint all that lies below `start`."""
    c.paint(c.inside(c.y - start, softness), colour)


def _bricks(c: Canvas, rows: float) -> Field:
    """Return 1 on bricks and 0 in the joints, `rows` of them per body unit."""
    row = c.y * rows
    along = c.x * (rows / 2.2) + 0.5 * (np.floor(row) % 2)
    joint = np.minimum(0.5 - np.abs(row % 1 - 0.5), 2.2 * (0.5 - np.abs(along % 1 - 0.5)))
    return np.clip(joint * 6, 0, 1)


def _framed_picture(c: Canvas, x: float, y: float) -> None:
    c.paint(c.box(x - 0.22, y - 0.17, x + 0.22, y + 0.17), rgb(0.3, 0.22, 0.16))
    c.paint(c.box(x - 0.18, y - 0.13, x + 0.18, y + 0.13), rgb(0.74, 0.78, 0.8))
    c.paint(c.box(x - 0.18, y + 0.03, x + 0.18, y + 0.13), rgb(0.5, 0.55, 0.48))


_BACKGROUNDS: dict[str, Callable[[Canvas, Scene, float], None]] = {
    "meadow": _meadow,
    "beach": _beach,
    "street": _street,
    "room": _room,
    "snow": _snow,
    "desert": _desert,
}
