"""What every method is to the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medfast import distributed, ops
from medfast.data.loader import Batch
from medfast.data.views import Extra
from medfast.distributed import Ring
from medfast.errors import UsageError
from medfast.models.pair import Features, ImageTextModel
from medfast.ops.dispatch import choose


class Method(nn.Module, ABC):
    """A contrastive method: its loss terms, their weights, and what it asks of data and model.

    A step calls, in this order, `encode` on each part of the batch, `heads` on the features of the
    whole batch, and the method itself for its losses.

    Args:
        impl: Implementation of the ops, as in `medfast.ops`.
        group_positives: Count pairs of one study as positives of one another in global losses.
        weights: Weights of single terms that differ from the published ones.

    Over several ranks every loss is this rank's part: the mean of the parts is the loss of all
    ranks' pairs.

    Attributes:
        ring: The ranks that train together, if there are several.
        terms: Published weight of each loss term by its name.
        weights: Weight of each, with those that were asked for.
        ops: The ops that compute the terms.
        extra: What it needs of every pair beside its main view and its caption.
        needs_tokens: The model must project patches and tokens too.
        locks_image: The image tower is not trained.
        late_interaction: Evaluations score a pair by its patches and words, as `filip_scores`
            does, and not by the cosine of its global features.
        maps_title: Heading of what `word_maps` shows.
        maps_note: What a weight of `word_maps` is, where that is not plain.

    Raises:
        UsageError: `weights` names a term that the method has not.
    """

    terms: ClassVar[dict[str, float]]
    ops: ClassVar[tuple[str, ...]]
    extra: ClassVar[Extra] = Extra()
    needs_tokens: ClassVar[bool] = False
    locks_image: ClassVar[bool] = False
    late_interaction: ClassVar[bool] = False
    maps_title: ClassVar[str] = "Word-to-patch attention"
    maps_note: ClassVar[str] = ""

    def __init__(
        self,
        impl: str = "auto",
        group_positives: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.ring: Ring | None = None
        self.impl = impl
        self.group_positives = group_positives
        for term in weights or {}:
            if term not in self.terms:
                key = type(self).__name__.lower()
                raise UsageError(
                    f"--loss-weights: {key} has no term {term!r}; its terms are "
                    f"{', '.join(self.terms)}."
                )
        self.weights = {**self.terms, **(weights or {})}

    def add_heads(self, model: ImageTextModel, width: int) -> None:
        """Make what the method trains or keeps beside the towers of `model`; nothing, as a rule.

        Args:
            model: The towers.
            width: Hidden width of the published heads.
        """

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

    def encode(self, model: ImageTextModel, batch: Batch) -> Features:
        """Return the features of a batch; each pair's own, whatever the others are."""
        return model(batch.images, batch.ids, batch.mask)

    def heads(self, features: Features) -> Features:
        """Return the features of a whole batch after the method's own heads."""
        return features

    @abstractmethod
    def forward(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """Return the loss terms by name, each an fp32 scalar, before `weights`."""

    def op(self, name: str) -> Callable[..., Any]:
        """Return the op `name` of `medfast.ops`, over the pairs of all ranks, with its `impl`."""
        if self.ring is None:
            return partial(getattr(ops, name), impl=self.impl)
        return partial(getattr(distributed, name), ring=self.ring, impl=self.impl)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of values [n], 0 without any; over ranks, this one's part of theirs."""
        total = values.sum()
        if self.ring is None:
            return total / max(1, len(values))
        count = self.ring.sum(total.new_tensor(len(values)))
        return total * self.ring.world / count.clamp(min=1)

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
