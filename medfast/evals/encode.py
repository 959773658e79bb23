"""Features of images and captions, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medfast.data.loader import Batch, Loader
from medfast.data.skipped import SkippedSamples
from medfast.data.tokens import Tokenizer, Tokens
from medfast.device import autocast
from medfast.errors import UsageError
from medfast.evals.features import GlobalFeatures, LocalFeatures, Matchable
from medfast.models.pair import ImageTextModel

if TYPE_CHECKING:
    from medfast.evals.models import LibraryModel


@dataclass(frozen=True)
class Embeddings:
    """The N readable pairs of a split.

    Attributes:
        image: Features of the images.
        text: Features of the captions.
        index: Position of each pair in the split, int64 [N].
        group: Study of each pair, int64 [N].
    """

    image: Matchable
    text: Matchable
    index: Tensor
    group: Tensor

    @cached_property
    def ranks(self) -> tuple[Tensor, Tensor]:
        """Rank of each pair among all, int64 [N], of image to text and text to image."""
        return self.image.ranks(self.text)

    def loss(self, scale: float) -> float:
        """Return the contrastive loss of all pairs at once, at this logit scale."""
        return self.image.loss(self.text, scale)


@dataclass(frozen=True)
class Encoder:
    """A model ready to embed.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        device: Where it is.
        precision: Number format of its towers.
        late_interaction: Give features of patches and words, instead of global ones.
        image_size: Side of its square input in pixels, where `load_encoder` tells it.
        name: What tables call it, likewise.
        library: The other library that it is a model of, with its version; "" for medfast's own.
    """

    model: ImageTextModel | LibraryModel
    tokenizer: Tokenizer
    device: torch.device
    precision: str
    late_interaction: bool = False
    image_size: int = 0
    name: str = ""
    library: str = ""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to an image before the model sees it, for the rows of results."""
        tower = self.model.image_tower
        mean, std = ((x.flatten() / 255).tolist() for x in (tower.mean, tower.std))
        return {
            "crop": "central square",
            "resize": "bilinear, antialiased",
            "size": self.image_size,
            **{name: [round(x, 6) for x in own] for name, own in (("mean", mean), ("std", std))},
        }

    @torch.inference_mode()
    def pairs(self, loader: Loader, skipped: SkippedSamples) -> Embeddings:
        """Return the embeddings of a split."""
        self.model.eval()
        parts: list[tuple[Matchable, Matchable, Tensor, Tensor]] = []
        for batch in loader.epoch(0):
            skipped.add(batch.skipped)
            if len(batch) == 0:
                continue
            image, text = self._images(batch.images), self._texts(batch)
            parts.append((image, text, batch.index, batch.group))
        if not parts:
            raise UsageError(
                "no image of the held-out pairs can be read; nothing can be evaluated."
            )
        images, texts, index, group = zip(*parts, strict=True)
        return Embeddings(
            images[0].cat(images), texts[0].cat(texts), torch.cat(index), torch.cat(group)
        )

    @torch.inference_mode()
    def images(self, images: Tensor) -> Matchable:
        """Return the features of N images, uint8 [N, 3, H, W]."""
        self.model.eval()
        return self._images(images)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], batch_size: int = 256) -> Matchable:
        """Return the features of N texts."""
        self.model.eval()
        starts = range(0, len(texts), batch_size)
        parts = [self._texts(self.tokenizer(texts[i : i + batch_size])) for i in starts]
        return parts[0].cat(parts)

    def _images(self, images: Tensor) -> Matchable:
        with autocast(self.precision, self.device):
            image, patches = self.model.encode_image(images.to(self.device))
        return self._features(image, patches, None)

    def _texts(self, tokens: Tokens | Batch) -> Matchable:
        ids, mask, word_mask = (
            x.to(self.device) for x in (tokens.ids, tokens.mask, tokens.word_mask)
        )
        with autocast(self.precision, self.device):
            text, words = self.model.encode_text(ids, mask)
        return self._features(text, words, word_mask)

    def _features(self, unit: Tensor, parts: Tensor | None, mask: Tensor | None) -> Matchable:
        """Return the features that this encoder gives; without `mask`, all parts count."""
        if not self.late_interaction:
            return GlobalFeatures(unit.cpu())
        assert parts is not None  # a method that asks for late interaction asks for tokens
        if mask is None:
            mask = torch.ones(parts.shape[:2], dtype=torch.bool, device=parts.device)
        return LocalFeatures(F.normalize(parts.float(), dim=-1), mask)
