"""`clip`: InfoNCE between global features (Radford 2021, arXiv 2103.00020)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from medfast.data.loader import Batch
from medfast.methods.base import Method
from medfast.models.pair import Features


class Clip(Method):
    ops: ClassVar[tuple[str, ...]] = ("clip_loss",)
    terms: ClassVar[dict[str, float]] = {"clip": 1.0}

    def forward(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        return {
            "clip": self.op("clip_loss")(
                features.image,
                features.text,
                features.logit_scale,
                positives=self.positives(batch),
            )
        }
