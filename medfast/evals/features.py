"""Features of images and of texts, and how well the ones match the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from medfast.ops import clip_loss, filip_loss, filip_scores, paired_ranks

if TYPE_CHECKING:
    from typing_extensions import Self

# Pairs whose own scores come from one rectangle of scores.
_OWN_PAIRS = 32


class Matchable(ABC):
    """Features of N images, or of N texts, of one kind: the ones can be matched with the others."""

    @abstractmethod
    def __getitem__(self, rows: Sequence[int]) -> Self:
        """Return the features of some rows."""

    @classmethod
    @abstractmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Return the features of all parts, one after the other."""

    @abstractmethod
    def ranks(self, texts: Self) -> tuple[Tensor, Tensor]:
        """Return the ranks of each row's partner, of image to text and text to image.

        Ties count against the query, as in `medfast.ops.retrieval_rank`.

        Args:
            texts: Features of N texts, row i belonging to image i.

        Returns:
            Both int64 [N]; 0 is the best.
        """

    @abstractmethod
    def loss(self, texts: Self, scale: float) -> float:
        """Return the contrastive loss of the images with text i belonging to image i."""

    @abstractmethod
    def own_scores(self, texts: Self) -> Tensor:
        """Return how well text i matches image i, [N], comparable among texts of one image."""

    @abstractmethod
    def class_scores(self, classes: Sequence[Self]) -> Tensor:
        """Return how well K classes, each given by its texts, match each image, [N, K]."""


@dataclass(frozen=True)
class GlobalFeatures(Matchable):
    """Unit features; an image and a text match as well as their cosine says.

    Attributes:
        unit: [N, D], on the CPU in fp32.
    """

    unit: Tensor

    def __getitem__(self, rows: Sequence[int]) -> Self:
        return type(self)(self.unit[rows])

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        return cls(torch.cat([part.unit for part in parts]))

    def ranks(self, texts: Self) -> tuple[Tensor, Tensor]:
        return paired_ranks(self.unit, texts.unit)

    def loss(self, texts: Self, scale: float) -> float:
        return clip_loss(self.unit, texts.unit, scale).item()

    def own_scores(self, texts: Self) -> Tensor:
        return (self.unit * texts.unit).sum(1)

    def class_scores(self, classes: Sequence[Self]) -> Tensor:
        """Return the cosines with the classes' features, each the mean over the class's texts."""
        means = torch.stack([texts.unit.mean(0) for texts in classes])
        return self.unit @ F.normalize(means, dim=-1).T


@dataclass(frozen=True)
class LocalFeatures(Matchable):
    """Unit features of parts, patches or words, which match by late interaction (FILIP).

    Texts compete for an image by its image-to-text scores, images for a text by its text-to-image
    scores; both are those of `medfast.ops.filip_scores`. All are computed where the features lie:
    N x N of them, smaller than the features themselves up to tens of thousands of pairs.

    Attributes:
        unit: [N, L, D] in fp32.
        mask: bool [N, L], true for the parts that count.
    """

    unit: Tensor
    mask: Tensor

    def __getitem__(self, rows: Sequence[int]) -> Self:
        return type(self)(self.unit[rows], self.mask[rows])

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        longest = max(part.mask.shape[1] for part in parts)
        more = [longest - part.mask.shape[1] for part in parts]
        return cls(
            torch.cat([F.pad(x.unit, (0, 0, 0, n)) for x, n in zip(parts, more, strict=True)]),
            torch.cat([F.pad(x.mask, (0, n)) for x, n in zip(parts, more, strict=True)]),
        )

    def ranks(self, texts: Self) -> tuple[Tensor, Tensor]:
        image_to_text, text_to_image = self._scores(texts)
        return _diagonal_ranks(image_to_text), _diagonal_ranks(text_to_image)

    def loss(self, texts: Self, scale: float) -> float:
        return filip_loss(self.unit, texts.unit, texts.mask, scale, patch_mask=self.mask).item()

    def own_scores(self, texts: Self) -> Tensor:
        N = len(self.unit)
        blocks = [range(start, min(start + _OWN_PAIRS, N)) for start in range(0, N, _OWN_PAIRS)]
        own = [self[rows]._scores(texts[rows])[0].diagonal() for rows in blocks]
        return torch.cat(own).cpu()

    def class_scores(self, classes: Sequence[Self]) -> Tensor:
        """Return the image-to-text scores, the mean over the texts of each class."""
        image_to_text, _ = self._scores(self.cat(classes))
        of_class = image_to_text.split([len(texts.unit) for texts in classes], dim=1)
        return torch.stack([scores.mean(1) for scores in of_class], dim=1).cpu()

    def _scores(self, texts: Self) -> tuple[Tensor, Tensor]:
        """Return the scores of all images and texts, [N, M] and [M, N]."""
        return filip_scores(self.unit, texts.unit, texts.mask, patch_mask=self.mask)


def _diagonal_ranks(scores: Tensor) -> Tensor:
    """Return how many others of its row each diagonal score is not above, int64 [N]."""
    # Not "at least": what NaN is compared with is neither.
    not_below = ~(scores < scores.diagonal()[:, None])
    return not_below.fill_diagonal_(False).sum(1).cpu()
