"""`declip`: InfoNCE plus SimSiam, masked words, more views and nearest captions (Li 2022)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from medfast.data.loader import Batch
from medfast.data.tokens import NOT_PREDICTED
from medfast.data.views import Extra
from medfast.methods.bank import FeatureBank
from medfast.methods.clip import Clip
from medfast.methods.heads import MaskedLanguageHead, SimSiam
from medfast.models.pair import Features, ImageTextModel

BANK_SIZE = 65536


class Declip(Clip):
    """A second view of the image, a second one of the caption, and captions with masked tokens.

    - `simsiam`: the views of an image predict one another.
    - `mlm`: the masked tokens of a caption are told from the rest, in a causal text tower from
      those before them.
    - `multi_view`: InfoNCE, the mean over the pairs of views beside the main one. The second view
      of an image meets captions, and so is not flipped.
    - `nearest`: InfoNCE of images with the nearest neighbours of their captions among the last
      65,536 captions; they are not trained through.
    """

    terms: ClassVar[dict[str, float]] = {
        "clip": 0.4,
        "simsiam": 0.2,
        "mlm": 0.2,
        "multi_view": 0.2,
        "nearest": 0.2,
    }
    extra = Extra(images=1, flip=False, texts=1, masked=True)

    simsiam: SimSiam
    masked_language: MaskedLanguageHead
    bank: FeatureBank

    def add_heads(self, model: ImageTextModel, width: int) -> None:
        text_tower = model.text_tower
        self.simsiam = SimSiam(model.image_tower.width, width // 2)
        self.masked_language = MaskedLanguageHead(text_tower.width, text_tower.vocab_size)
        self.bank = FeatureBank(BANK_SIZE, model.text_projection.out_features)

    def encode(self, model: ImageTextModel, batch: Batch) -> Features:
        pooled, pooled_view = (model.image_tower(x)[0] for x in (batch.images, *batch.views))
        text, _ = model.encode_text(batch.ids, batch.mask)
        text_view, _ = model.encode_text(batch.texts[0].ids, batch.texts[0].mask)
        assert batch.masked is not None
        _, hidden = model.text_tower(batch.masked.ids, batch.mask)
        extra = {
            "image view": model.project_image(pooled_view),
            "text view": text_view,
            "pooled": pooled,
            "pooled view": pooled_view,
            "masked": hidden[batch.masked.labels != NOT_PREDICTED],
        }
        image = model.project_image(pooled)
        return Features(image, text, None, None, model.logit_scale.exp(), extra)

    def heads(self, features: Features) -> Features:
        extra = dict(features.extra)
        for name in ("pooled", "pooled view"):
            extra[f"projected {name}"], extra[f"predicted {name}"] = self.simsiam(extra.pop(name))
        return replace(features, extra={**extra, "masked": self.masked_language(extra["masked"])})

    def forward(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        contrast = partial(
            self.op("clip_loss"),
            logit_scale=features.logit_scale,
            positives=self.positives(batch),
        )
        extra = features.extra
        images = (features.image, extra["image view"])
        texts = (features.text, extra["text view"])
        _, *others = itertools.product(images, texts)
        assert batch.masked is not None
        labels = batch.masked.labels[batch.masked.labels != NOT_PREDICTED]
        simsiam = simsiam_loss(
            (extra["projected pooled"], extra["projected pooled view"]),
            (extra["predicted pooled"], extra["predicted pooled view"]),
        )
        losses = {
            **super().forward(features, batch),
            "simsiam": self.mean(simsiam),
            "mlm": self.mean(F.cross_entropy(extra["masked"].float(), labels, reduction="none")),
            "multi_view": torch.stack([contrast(*views) for views in others]).mean(),
            "nearest": contrast(features.image, self.bank.nearest(features.text.detach())),
        }
        if self.training:
            self.bank.push(features.text.detach(), self.ring)
        return losses


def simsiam_loss(projected: tuple[Tensor, Tensor], predicted: tuple[Tensor, Tensor]) -> Tensor:
    """Return of each image, [B], how unlike its views' predictions are to each other's projections.

    It is the mean of both negative cosines; the least is -1. Projections are not trained through
    (Chen and He 2021, arXiv 2011.10566).

    Args:
        projected: Of both views, [B, D] each.
        predicted: Likewise.
    """
    (z1, z2), (p1, p2) = ((x.float() for x in pair) for pair in (projected, predicted))
    first = F.cosine_similarity(p1, z2.detach(), dim=-1)
    second = F.cosine_similarity(p2, z1.detach(), dim=-1)
    return -(first + second) / 2
