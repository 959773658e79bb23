"""Image and text towers, the pair they form, and its presets."""

from medfast.models.presets import PRESETS, Preset

__all__ = ["PRESETS", "Preset"]
