"""Embeddings of images and captions, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medfast.data.loader import Loader
from medfast.data.skipped import SkippedSamples
from medfast.data.tokens import Tokenizer
from medfast.device import autocast
from medfast.errors import UsageError
from medfast.models.pair import ImageTextModel


@dataclass(frozen=True)
class Embeddings:
    """Unit features of the N readable pairs of a split, on the CPU in fp32.

    Attributes:
        image: [N, D].
        text: [N, D].
        index: Position of each pair in the split, int64 [N].
        group: Study of each pair, int64 [N].
    """

    image: Tensor
    text: Tensor
    index: Tensor
    group: Tensor


@dataclass(frozen=True)
class Encoder:
    """A model ready to embed: its tokenizer, device and number format."""

    model: ImageTextModel
    tokenizer: Tokenizer
    device: torch.device
    precision: str

    @torch.inference_mode()
    def pairs(self, loader: Loader, skipped: SkippedSamples) -> Embeddings:
        """Return the embeddings of a split."""
        self.model.eval()
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for batch in loader.epoch(0):
            skipped.add(batch.skipped)
            if len(batch) == 0:
                continue
            here = batch.to(self.device)
            with autocast(self.precision, self.device):
                image, _ = self.model.encode_image(here.images)
                text, _ = self.model.encode_text(here.ids, here.mask)
            parts.append((image.cpu(), text.cpu(), batch.index, batch.group))
        if not parts:
            raise UsageError(
                "no image of the held-out pairs can be read; nothing can be evaluated."
            )
        image, text, index, group = (torch.cat(column) for column in zip(*parts, strict=True))
        return Embeddings(image, text, index, group)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Return the unit features [N, D] of N texts."""
        self.model.eval()
        parts = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(texts[start : start + batch_size])
            with autocast(self.precision, self.device):
                text, _ = self.model.encode_text(
                    tokens.ids.to(self.device), tokens.mask.to(self.device)
                )
            parts.append(text.cpu())
        return torch.cat(parts)
