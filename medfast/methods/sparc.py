"""`sparc`: InfoNCE plus words against what they see in their own image (Bica 2024)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from medfast.data.loader import Batch
from medfast.methods.clip import Clip
from medfast.models.pair import Features
from medfast.ops.sparc.reference import align


class Sparc(Clip):
    ops: ClassVar[tuple[str, ...]] = ("clip_loss", "sparc_loss")
    terms: ClassVar[dict[str, float]] = {"clip": 0.5, "fine": 1.0}
    needs_tokens = True
    maps_note = (
        "A word's weights are those of the fine loss: its similarities to the patches, brought to "
        "0 for the least and 1 for the greatest, without those below one over the number of "
        "patches, divided by their sum."
    )

    def forward(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        patches, tokens = features.local()
        fine = self.op("sparc_loss")(patches, tokens, batch.word_mask, features.logit_scale)
        return {**super().forward(features, batch), "fine": fine}

    def word_maps(self, features: Features, batch: Batch) -> Tensor:
        patches, tokens = features.local()
        similarity = tokens.float() @ patches.float().mT
        return align(similarity, torch.ones_like(similarity, dtype=torch.bool), threshold=None)
