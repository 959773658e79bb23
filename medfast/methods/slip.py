"""`slip`: InfoNCE plus SimCLR on two more views of the image (Mu 2022, arXiv 2112.12750)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from medfast.data.loader import Batch
from medfast.data.views import Extra
from medfast.methods.clip import Clip
from medfast.methods.heads import mlp
from medfast.models.pair import Features, ImageTextModel

TEMPERATURE = 0.1
HEAD_DIM = 256


class Slip(Clip):
    """The views beside the main one meet each other, never a caption, and so may be flipped."""

    ops: ClassVar[tuple[str, ...]] = ("clip_loss", "simclr_loss")
    terms: ClassVar[dict[str, float]] = {"clip": 1.0, "simclr": 1.0}
    extra = Extra(images=2)

    head: nn.Module

    def add_heads(self, model: ImageTextModel, width: int) -> None:
        self.head = mlp(model.image_tower.width, width, width, HEAD_DIM)

    def encode(self, model: ImageTextModel, batch: Batch) -> Features:
        first, second = (model.image_tower(view)[0] for view in batch.views)
        features = super().encode(model, batch)
        return replace(features, extra={"first view": first, "second view": second})

    def heads(self, features: Features) -> Features:
        views = {name: self.head(view) for name, view in features.extra.items()}
        return replace(features, extra=views)

    def forward(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        first, second = (F.normalize(view.float(), dim=-1) for view in features.extra.values())
        simclr = self.op("simclr_loss")(first, second, 1 / TEMPERATURE)
        return {**super().forward(features, batch), "simclr": simclr}
