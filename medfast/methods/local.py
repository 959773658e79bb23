"""`local`: InfoNCE plus word-to-patch alignment (Huang 2021, GLoRIA)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from medfast.data.loader import Batch
from medfast.methods.clip import Clip
from medfast.models.pair import Features
from medfast.ops import word_patch_attention


class Local(Clip):
    ops: ClassVar[tuple[str, ...]] = ("clip_loss", "local_alignment_loss")
    terms: ClassVar[dict[str, float]] = {"clip": 1.0, "local": 1.0}
    needs_tokens = True

    def forward(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        patches, tokens = features.local()
        local = self.op("local_alignment_loss")(patches, tokens, batch.word_mask)
        return {**super().forward(features, batch), "local": local}

    def word_maps(self, features: Features, batch: Batch) -> Tensor:
        patches, tokens = features.local()
        return word_patch_attention(patches.float(), tokens.float(), batch.word_mask)
