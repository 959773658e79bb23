"""`filip`: late interaction of patches and words (Yao 2022, arXiv 2111.07783)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from medfast.data.loader import Batch
from medfast.errors import UsageError
from medfast.methods.base import Method
from medfast.models.pair import Features


class Filip(Method):
    """All words and all patches take part: none is pruned. Global features are not trained.

    Raises:
        UsageError: `group_positives`, which only a global loss knows.
    """

    ops: ClassVar[tuple[str, ...]] = ("filip_loss",)
    terms: ClassVar[dict[str, float]] = {"filip": 1.0}
    needs_tokens = True
    late_interaction = True
    maps_title = "Word-to-patch similarity"
    maps_note = (
        "This method has no attention: a word's weights are its cosines with the patches, those "
        "below zero taken as zero, divided by their sum."
    )

    def __init__(
        self,
        impl: str = "auto",
        group_positives: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(impl, group_positives, weights)
        if group_positives:
            raise UsageError(
                "--group-positives is for methods with a global loss, which filip has not; leave "
                "it out, or take --method local or sparc."
            )

    def forward(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        patches, tokens = _unit(features)
        filip = self.op("filip_loss")(patches, tokens, batch.word_mask, features.logit_scale)
        return {"filip": filip}

    def word_maps(self, features: Features, batch: Batch) -> Tensor:
        patches, tokens = _unit(features)
        return F.normalize((tokens @ patches.mT).clamp(min=0), p=1, dim=-1)


def _unit(features: Features) -> tuple[Tensor, Tensor]:
    """Return unit patch and token features, in fp32 whatever the towers' dtype."""
    patches, tokens = (F.normalize(x.float(), dim=-1) for x in features.local())
    return patches, tokens
