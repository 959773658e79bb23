"""What the general pictures show: scenes of everyday life, and coloured things in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medfast.data.phantom.cases import (
    COUNTS,
    DETAILS,
    NO_FINDING,
    NORMAL_SHARE,
    SIDES,
    SIZES,
    Case,
    Finding,
    choose,
    with_twin,
)

# The settings of each scene; the order fixes the class indices.
SCENES: dict[str, tuple[str, ...]] = {
    "meadow": ("sunny", "cloudy", "sunset"),
    "beach": ("sunny", "cloudy", "sunset"),
    "street": ("sunny", "cloudy", "night"),
    "room": ("brick wall", "striped wall", "plain wall"),
    "snow": ("sunny", "cloudy", "night"),
    "desert": ("sunny", "sunset", "night"),
}
SETTINGS = tuple(dict.fromkeys(setting for settings in SCENES.values() for setting in settings))
# The scenes in which each thing is found.
THINGS: dict[str, tuple[str, ...]] = {
    "ball": ("meadow", "beach", "street", "room", "snow"),
    "balloon": ("meadow", "beach", "street", "room", "snow", "desert"),
    "bird": ("meadow", "beach", "street", "snow", "desert"),
    "boat": ("beach",),
    "car": ("meadow", "street", "snow", "desert"),
    "chair": ("meadow", "beach", "room"),
    "cup": ("room",),
    "flower": ("meadow", "room", "desert"),
    "house": ("meadow", "snow", "desert"),
    "lamp": ("room",),
    "tree": ("meadow", "street", "snow"),
    "umbrella": ("beach", "street", "desert"),
}
# Things stand on the ground unless they fly or swim.
FLYING, SWIMMING = ("balloon", "bird"), ("boat",)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
# No other leaves grow.
TREE_COLOURS = ("red", "orange", "yellow", "green")
# The same names as in the medical domain, so that the same evaluations ask for them.
CLASSES: dict[str, tuple[str, ...]] = {
    "modality": tuple(SCENES),
    "setting": SETTINGS,
    "finding": (*THINGS, NO_FINDING),
    **DETAILS,
    "colour": COLOURS,
}

GREY_SHARE = 0.12


@dataclass(frozen=True)
class Thing(Finding):
    """One to three things of a kind, all of one size and colour and on one side."""

    colour: str


@dataclass(frozen=True)
class Scene(Case):
    """A photograph of a scene, empty or with things; a grey one does not show their colour."""

    finding: Thing | None
    setting: str
    grey: bool

    def names(self) -> dict[str, str]:
        """Return the class under every label set that applies."""
        names = {**super().names(), "setting": self.setting}
        if self.finding is not None and not self.grey:
            names["colour"] = self.finding.colour
        return names


def family(rng: np.random.Generator) -> list[Scene]:
    """Draw a scene and, for about half of them, its twin."""
    kind = choose(rng, tuple(THINGS))
    scene = choose(rng, THINGS[kind])
    setting = choose(rng, SCENES[scene])
    grey = rng.random() < GREY_SHARE
    if rng.random() < NORMAL_SHARE:
        return [Scene(scene, None, setting, grey)]
    colour = choose(rng, TREE_COLOURS if kind == "tree" else COLOURS)
    thing = Thing(kind, choose(rng, SIDES), choose(rng, SIZES), choose(rng, COUNTS), colour)
    return [Scene(scene, member, setting, grey) for member in with_twin(thing, rng)]
