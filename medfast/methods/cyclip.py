"""`cyclip`: InfoNCE plus cyclic consistency (Goel 2022, arXiv 2205.14459)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from medfast.data.loader import Batch
from medfast.methods.clip import Clip
from medfast.models.pair import Features


class Cyclip(Clip):
    ops: ClassVar[tuple[str, ...]] = ("clip_loss", "cyclip_loss")
    terms: ClassVar[dict[str, float]] = {"clip": 1.0, "cross_modal": 0.25, "in_modal": 0.25}

    def forward(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        cross_modal, in_modal = self.op("cyclip_loss")(features.image, features.text)
        terms = {"cross_modal": cross_modal, "in_modal": in_modal}
        return {**super().forward(features, batch), **terms}
