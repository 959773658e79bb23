"""`lit`: InfoNCE with a locked, pretrained image tower (Zhai 2022, arXiv 2111.07991)."""

from __future__ import annotations

from medfast.methods.clip import Clip


class Lit(Clip):
    """The text tower learns to read out what the image tower knows; projections are trained."""

    locks_image = True
