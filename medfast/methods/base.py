"""What every method is to the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from medfast.data.loader import Batch
from medfast.errors import UsageError
from medfast.models.pair import Features
from medfast.ops.dispatch import choose


class Method(nn.Module, ABC):
    """A contrastive method: its loss terms, their weights, and what it asks of the model.

    Args:
        impl: Implementation of the ops, as in `medfast.ops`.
        group_positives: Count pairs of one study as positives of one another in global losses.

    Attributes:
        weights: Weight of each loss term by its name.
        ops: The ops that compute the terms.
        needs_tokens: The model must project patches and tokens too.
        late_interaction: Evaluations score a pair by its patches and words, as `filip_scores`
            does, and not by the cosine of its global features.
        maps_title: Heading of what `word_maps` shows.
        maps_note: What a weight of `word_maps` is, where that is not plain.
    """

    weights: ClassVar[dict[str, float]]
    ops: ClassVar[tuple[str, ...]]
    needs_tokens: ClassVar[bool] = False
    late_interaction: ClassVar[bool] = False
    maps_title: ClassVar[str] = "Word-to-patch attention"
    maps_note: ClassVar[str] = ""

    def __init__(self, impl: str = "auto", group_positives: bool = False) -> None:
        super().__init__()
        self.impl = impl
        self.group_positives = group_positives

    def check_impl(self, device: torch.device) -> None:
        """Refuse, before any work, an implementation that cannot run here.

        Raises:
            UsageError: one of the method's ops has no such implementation on `device`.
        """
        for op in self.ops:
            try:
                choose(op, self.impl, torch.empty(0, device=device))
            except RuntimeError as error:
                raise UsageError(f"--fused-loss {self.impl}: {error}") from None

    @abstractmethod
    def forward(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """Return the loss terms by name, each an fp32 scalar, before `weights`."""

    def word_maps(self, features: Features, batch: Batch) -> Tensor | None:
        """Return the weights of each word on the patches of its own image, for the eye.

        Returns:
            [B, T, P] in fp32, whose rows sum to 1 where the caption has a word; None without
            token features.
        """
        return None

    def positives(self, batch: Batch) -> Tensor | None:
        """Return the group ids [B] for the global loss, or None for the diagonal alone."""
        return batch.group if self.group_positives else None
