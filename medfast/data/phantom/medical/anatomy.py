"""The drawn anatomy of every body section and where its findings may lie.

Structures are painted from back to front, in the grey levels and body coordinates of `Canvas`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from medfast.data.phantom.canvas import Canvas, stripes
from medfast.data.phantom.placing import Zone

_BOTH_SIDES = (-1, 1)


@dataclass(frozen=True)
class Section:
    """How a body section is drawn, and where findings may lie in it."""

    draw: Callable[[Canvas], None]
    zone: Zone


def _chest_radiograph(c: Canvas) -> None:
    c.value += 0.05
    c.paint(c.ellipse(0, 0.5, 0.98, 1.5, softness=3), 0.5)
    # Both lungs in one mask, so that they share their texture.
    lungs = [
        c.ellipse(side * 0.45, -0.05, 0.36, 0.7, side * -6, softness=4) for side in _BOTH_SIDES
    ]
    c.paint(np.maximum(*lungs), 0.16 + 0.03 * c.noise(14))
    # Mediastinum, vertebrae, heart, ribs.
    c.paint(c.inside(0.13 - np.abs(c.x), 3), 0.62)
    c.paint(stripes(c.y * 5, 2) * c.inside(0.1 - np.abs(c.x), 3), 0.7, 0.5)
    c.paint(c.ellipse(0.12, 0.3, 0.27, 0.32, 25, softness=5), 0.6)
    ribs = stripes(c.y * c.rng.uniform(3.4, 4.2) + c.x**2 * 1.6, 3)
    c.paint(ribs * c.inside(0.93 - np.abs(c.x), 3) * (c.y > -0.75), 0.62, 0.25)
    for side in _BOTH_SIDES:
        # Diaphragm, clavicle.
        c.paint(c.ellipse(side * 0.5, 0.83, 0.48, 0.28, softness=4), 0.58)
        c.paint(c.capsule(side * 0.1, -0.68, side * 0.85, -0.82, 0.035), 0.72, 0.7)


def _pelvis_radiograph(c: Canvas) -> None:
    c.value += 0.04
    c.paint(c.ellipse(0, 0.1, 1.05, 1.25, softness=4), 0.2 + 0.03 * c.noise(8))
    for side in _BOTH_SIDES:
        # Iliac wing with its crest, the bone down to the hip.
        wing = c.depth(side * 0.52, -0.3, 0.32, 0.5, side * -28)
        c.paint(c.inside(wing, 1.5), 0.45)
        c.paint(c.inside(0.025 - np.abs(wing)), 0.6)
        c.paint(c.capsule(side * 0.44, -0.1, side * 0.57, 0.25, 0.13), 0.45)
        # Femur: neck, shaft, head.
        c.paint(c.capsule(side * 0.66, 0.38, side * 0.86, 0.5, 0.09), 0.5)
        c.paint(c.capsule(side * 0.88, 0.5, side * 0.82, 1.3, 0.1), 0.52)
        c.paint(c.ellipse(side * 0.6, 0.33, 0.15, 0.15), 0.56)
        # Ischium around the obturator foramen.
        c.paint(c.ellipse(side * 0.27, 0.62, 0.24, 0.2, side * 30), 0.5)
        c.paint(c.ellipse(side * 0.28, 0.62, 0.13, 0.1, side * 30), 0.18)
    # Pelvic inlet, sacrum, lumbar spine.
    c.paint(c.ellipse(0, 0.18, 0.3, 0.27), 0.2)
    c.paint(c.ellipse(0, -0.22, 0.2, 0.32), 0.55)
    spine = c.ellipse(0, -0.75, 0.13, 0.4)
    c.paint(spine, 0.58, 0.7)
    c.paint(stripes(c.y * 5, 3) * spine, 0.66, 0.5)


def _hand_radiograph(c: Canvas) -> None:
    c.value += 0.04
    # Thumb first: it points to the midline, as in a pair of hands laid palm down.
    tips = [(0.1, 0.0), (0.25, -0.75), (0.43, -0.88), (0.62, -0.8), (0.8, -0.55)]
    bases = [(0.3, 0.4), (0.34, 0.12), (0.44, 0.08), (0.54, 0.1), (0.64, 0.16)]
    for side in _BOTH_SIDES:
        # Soft tissue of palm and forearm.
        c.paint(c.ellipse(side * 0.47, 0.32, 0.3, 0.4, softness=2), 0.24)
        c.paint(c.capsule(side * 0.47, 0.6, side * 0.47, 1.3, 0.17), 0.24)
        for (x1, y1), (x0, y0) in zip(tips, bases, strict=True):
            c.paint(c.capsule(side * x0, y0, side * x1, y1, 0.08), 0.24)
            joints = stripes(np.hypot(c.x - side * x0, c.y - y0) * 3.2, 8)
            bone = c.capsule(side * x0, y0 + 0.1, side * x1, y1 + 0.02, 0.038)
            c.paint(bone, 0.58 - 0.35 * joints)
        # Wrist, ulna and radius.
        c.paint(c.ellipse(side * 0.46, 0.52, 0.17, 0.11), 0.46 + 0.06 * c.noise(20))
        c.paint(c.capsule(side * 0.39, 0.72, side * 0.39, 1.3, 0.06), 0.55)
        c.paint(c.capsule(side * 0.54, 0.74, side * 0.55, 1.3, 0.045), 0.55)


def _trunk_ct(c: Canvas, height: float) -> None:
    """Draw fat under the skin, muscle and the scanner's table."""
    c.paint(c.ellipse(0, 0, 0.96, height), 0.24)
    c.paint(c.ellipse(0, 0, 0.86, height - 0.09), 0.41)
    table = height + 0.08 - 0.12 * c.x**2
    c.paint(c.inside(0.015 - np.abs(c.y - table)), 0.35)


def _vertebra_ct(c: Canvas) -> None:
    c.paint(c.ellipse(0, 0.4, 0.15, 0.12), 0.85)
    c.paint(c.capsule(0, 0.5, 0, 0.65, 0.035), 0.85)
    c.paint(c.capsule(-0.2, 0.55, 0.2, 0.55, 0.03), 0.85)
    c.paint(c.ellipse(0, 0.54, 0.05, 0.045), 0.35)


def _chest_ct(c: Canvas) -> None:
    _trunk_ct(c, 0.8)
    ribs = c.inside(0.03 - np.abs(c.depth(0, 0, 0.83, 0.68)))
    c.paint(ribs * stripes(np.arctan2(c.y, c.x) * 2.1, 0.6), 0.8)
    vessels = np.clip(c.noise(18) - 0.9, 0, 1)
    for side in _BOTH_SIDES:
        c.paint(c.ellipse(side * 0.45, 0.02, 0.33, 0.58), 0.07)
        c.paint(c.ellipse(side * 0.42, 0.02, 0.26, 0.5) * vessels, 0.35)
    # Heart, aorta.
    c.paint(c.ellipse(0.1, -0.15, 0.24, 0.28, 30), 0.52)
    c.paint(c.ellipse(0.14, 0.25, 0.09, 0.09), 0.56)
    _vertebra_ct(c)


def _abdomen_ct(c: Canvas) -> None:
    _trunk_ct(c, 0.82)
    c.paint(c.ellipse(0, -0.05, 0.76, 0.6), 0.22)
    # Liver, stomach, spleen.
    c.paint(c.ellipse(-0.4, -0.15, 0.38, 0.44, 10), 0.46 + 0.02 * c.noise(12))
    c.paint(c.ellipse(0.3, -0.3, 0.3, 0.22, -15), 0.36)
    c.paint(c.ellipse(0.6, -0.02, 0.15, 0.32, -15), 0.46)
    for side in _BOTH_SIDES:
        # Kidney and its pelvis.
        c.paint(c.ellipse(side * 0.42, 0.36, 0.16, 0.2, side * 20), 0.6)
        c.paint(c.ellipse(side * 0.36, 0.37, 0.06, 0.08, side * 20), 0.3)
    # Aorta, vena cava.
    c.paint(c.ellipse(0.06, 0.16, 0.07, 0.07), 0.6)
    c.paint(c.ellipse(-0.1, 0.15, 0.08, 0.06), 0.55)
    _vertebra_ct(c)


def _brain(c: Canvas, white: float, cortex: float, fluid: float) -> None:
    """Draw what lies inside the skull, in the levels of white matter, cortex and fluid."""
    whole = c.ellipse(0, 0, 0.71, 0.87)
    c.paint(whole, cortex)
    c.paint(c.ellipse(0, 0, 0.56, 0.72, softness=8), white)
    # The zero line of smooth noise meanders as furrows do.
    furrows = np.clip(1 - np.abs(c.noise(11)) / 0.35, 0, 1)
    c.paint(furrows * whole * (1 - c.ellipse(0, 0, 0.5, 0.66, softness=12)), fluid, 0.45)
    # The cleft between the hemispheres, the ventricles.
    c.paint(c.inside(0.012 - np.abs(c.x)) * whole, fluid, 0.7)
    for side in _BOTH_SIDES:
        c.paint(c.ellipse(side * 0.11, -0.2, 0.06, 0.2, side * 14), fluid)
        c.paint(c.ellipse(side * 0.13, 0.2, 0.055, 0.2, side * -20), fluid)


def _brain_ct(c: Canvas) -> None:
    c.paint(c.ellipse(0, 0, 0.84, 1.0), 0.3)
    c.paint(c.ellipse(0, 0, 0.81, 0.97), 0.92)
    _brain(c, white=0.38, cortex=0.44, fluid=0.14)


def _brain_mr(c: Canvas) -> None:
    c.paint(c.ellipse(0, 0, 0.86, 1.0), 0.7)
    c.paint(c.ellipse(0, 0, 0.8, 0.95), 0.05)
    # White matter is brighter than the cortex in some sequences and darker in others.
    levels = (0.48, 0.32) if c.rng.random() < 0.5 else (0.3, 0.5)
    _brain(c, *levels, fluid=0.09)


def _breast_mr(c: Canvas) -> None:
    # Chest wall, lung, heart.
    c.paint(c.ellipse(0, 1.05, 1.25, 0.62), 0.3)
    c.paint(c.ellipse(0, 1.1, 0.6, 0.4), 0.08)
    c.paint(c.ellipse(0.1, 0.95, 0.22, 0.2), 0.5)
    gland = np.clip(0.4 + 0.7 * c.noise(12), 0, 1)
    for side in _BOTH_SIDES:
        c.paint(c.ellipse(side * 0.47, 0.0, 0.41, 0.72), 0.3)
        c.paint(c.ellipse(side * 0.47, -0.72, 0.05, 0.07), 0.42)
        c.paint(c.ellipse(side * 0.47, -0.05, 0.3, 0.55, softness=8) * gland, 0.5, 0.7)


def _pelvis_mr(c: Canvas) -> None:
    c.paint(c.ellipse(0, 0, 0.97, 0.8), 0.55)
    c.paint(c.ellipse(0, 0, 0.85, 0.68), 0.25 + 0.03 * c.noise(10))
    for side in _BOTH_SIDES:
        # Joint space, head and neck of the femur, gluteal muscle.
        c.paint(c.ellipse(side * 0.57, -0.02, 0.21, 0.22), 0.08)
        c.paint(c.ellipse(side * 0.57, -0.02, 0.18, 0.19), 0.45)
        c.paint(c.capsule(side * 0.66, 0.1, side * 0.8, 0.2, 0.08), 0.42)
        fibres = stripes((c.x * side + c.y) * 6, 1)
        c.paint(c.ellipse(side * 0.42, 0.45, 0.32, 0.16, side * -20), 0.2 + 0.1 * fibres)
    # Bladder, uterus or prostate, rectum.
    c.paint(c.ellipse(0, -0.22, 0.24, 0.2), 0.72)
    c.paint(c.ellipse(0, 0.15, 0.16, 0.13), 0.35)
    c.paint(c.ellipse(0, 0.38, 0.11, 0.12), 0.15)


def _thyroid_ultrasound(c: Canvas) -> None:
    # Layers of skin and muscle, the dark band of a neck muscle.
    c.value += 0.26 + 0.05 * stripes(c.y * 4 + 0.2 * c.noise(3), 1)
    c.paint(c.inside(0.08 - np.abs(c.y + 0.62 - 0.1 * c.x**2), 4), 0.14)
    for side in _BOTH_SIDES:
        # Lobe, carotid artery.
        c.paint(c.ellipse(side * 0.45, 0.1, 0.3, 0.5, side * 5, softness=3), 0.42)
        c.paint(c.ellipse(side * 0.9, 0.25, 0.11, 0.11), 0.02)
    # Isthmus, then the windpipe with its bright front wall.
    c.paint(c.inside(0.1 - np.abs(c.y + 0.22)) * c.inside(0.3 - np.abs(c.x), 4), 0.42)
    windpipe = c.depth(0, 0.12, 0.19, 0.24)
    c.paint(c.inside(windpipe, 1.5), 0.03)
    c.paint(c.inside(0.025 - np.abs(windpipe)) * (c.y < 0.1), 0.7)


def _kidney_ultrasound(c: Canvas) -> None:
    c.value += 0.34 + 0.06 * c.noise(6)
    for side in _BOTH_SIDES:
        # Capsule, cortex, sinus.
        c.paint(c.ellipse(side * 0.46, 0.12, 0.33, 0.58, side * -8, softness=2.5), 0.7)
        c.paint(c.ellipse(side * 0.46, 0.12, 0.3, 0.55, side * -8, softness=2.5), 0.22)
        c.paint(c.ellipse(side * 0.44, 0.12, 0.11, 0.36, side * -8, softness=8), 0.42)


def _uterus_ultrasound(c: Canvas) -> None:
    c.value += 0.3 + 0.05 * c.noise(5)
    # Bladder, outline and wall of the uterus, its lining on both sides of the cavity.
    c.paint(c.ellipse(0, -0.72, 0.42, 0.2, softness=3), 0.02)
    c.paint(c.ellipse(0, 0.15, 0.86, 0.58, softness=3), 0.5)
    c.paint(c.ellipse(0, 0.15, 0.82, 0.54, softness=3), 0.24)
    c.paint(c.ellipse(0, 0.12, 0.62, 0.05, softness=3), 0.62)
    c.paint(c.capsule(-0.55, 0.12, 0.55, 0.12, 0.008), 0.1, 0.6)


def _nuclei(c: Canvas, density: float) -> None:
    """Scatter cell nuclei: the crests of fine noise."""
    c.paint(np.clip(c.noise(44) * 2.5 - 3.2 + density, 0, 1), 0.3, 0.6)


def _colon_histology(c: Canvas) -> None:
    """Draw glands, rings of epithelium around a lumen, on a shaken honeycomb."""
    c.value += 0.66 + 0.04 * c.noise(10)
    _nuclei(c, 0.4)
    spacing, radius = 0.44, 0.17
    reach = max(c.shape) / c.unit / 2 + 0.2
    for row, y in enumerate(np.arange(-reach, reach, spacing * 0.87)):
        for x in np.arange(-reach, reach, spacing) + spacing / 2 * (row % 2):
            shift = c.rng.uniform(-0.05, 0.05, 2)
            rx, ry = radius * c.rng.uniform(0.8, 1.15, 2)
            gland = c.depth(x + shift[0], y + shift[1], rx, ry, c.rng.uniform(0, 180))
            c.paint(c.inside(gland, 2), 0.5)
            c.paint(c.inside(gland - 0.45 * radius, 3), 0.86)


def _skin_histology(c: Canvas) -> None:
    # The dermis with its fibres, then the epidermis with its ridges, the horny layer and the air.
    c.value += 0.64 + 0.07 * (stripes(c.y * 4 + c.x + 0.6 * c.noise(5), 1) - 0.5)
    _nuclei(c, 0.0)
    ridges = -0.6 + 0.07 * np.sin(c.x * c.rng.uniform(9, 13) + c.rng.uniform(0, 6))
    c.paint(c.inside(ridges - c.y, 2), 0.44)
    c.paint(c.inside(-0.76 - c.y, 2), 0.78)
    c.paint(c.inside(-0.86 + 0.02 * c.noise(20) - c.y, 2), 0.97)


def _breast_histology(c: Canvas) -> None:
    c.value += 0.64 + 0.05 * c.noise(8)
    _nuclei(c, 0.2)
    for x, y in c.rng.uniform(-1.1, 1.1, (34, 2)):
        # A fat cell.
        c.paint(c.ellipse(x, y, *c.rng.uniform(0.09, 0.18, 2)), 0.86, 0.75)
    for x, y in c.rng.uniform(-0.9, 0.9, (6, 2)):
        # A duct and its lumen.
        c.paint(c.ellipse(x, y, 0.11, 0.11, softness=3), 0.52)
        c.paint(c.ellipse(x, y, 0.05, 0.05, softness=2), 0.85)


ANATOMY: dict[tuple[str, str], Section] = {
    ("radiograph", "chest"): Section(_chest_radiograph, (0.46, -0.05, 0.18, 0.55)),
    ("radiograph", "pelvis"): Section(_pelvis_radiograph, (0.5, 0.0, 0.2, 0.54)),
    ("radiograph", "hand"): Section(_hand_radiograph, (0.46, 0.2, 0.18, 0.55)),
    ("ct", "chest"): Section(_chest_ct, (0.46, 0.0, 0.2, 0.52)),
    ("ct", "abdomen"): Section(_abdomen_ct, (0.46, 0.0, 0.2, 0.52)),
    ("ct", "brain"): Section(_brain_ct, (0.42, 0.0, 0.16, 0.55)),
    ("mr", "brain"): Section(_brain_mr, (0.42, 0.0, 0.16, 0.55)),
    ("mr", "breast"): Section(_breast_mr, (0.47, 0.0, 0.18, 0.55)),
    ("mr", "pelvis"): Section(_pelvis_mr, (0.48, 0.0, 0.2, 0.53)),
    ("ultrasound", "thyroid"): Section(_thyroid_ultrasound, (0.45, 0.1, 0.18, 0.54)),
    ("ultrasound", "kidney"): Section(_kidney_ultrasound, (0.46, 0.12, 0.18, 0.54)),
    ("ultrasound", "uterus"): Section(_uterus_ultrasound, (0.44, 0.15, 0.2, 0.54)),
    ("histology", "colon"): Section(_colon_histology, (0.48, 0.0, 0.2, 0.6)),
    ("histology", "skin"): Section(_skin_histology, (0.48, 0.12, 0.2, 0.55)),
    ("histology", "breast"): Section(_breast_histology, (0.48, 0.0, 0.2, 0.6)),
}
