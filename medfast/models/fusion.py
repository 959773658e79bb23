"""The head that answers a question about an image from patch and word features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A smaller deviation of standardised features may be the rounding of fp16 alone.
_LEAST = 1e-2


class FusionHead(nn.Module):
    """Words attend to one another and to the patches, layer by layer; their mean names the answer.

    Each layer is a pre-norm transformer decoder layer (Vaswani 2017) without a causal mask: 1.05
    million weights at the default width, two layers 2.1 million. Beside them are the projections of
    both towers' features and of the answer, and one embedding per patch, since a convolutional
    tower does not say where a patch lies.

    Args:
        patch_width: Features of a patch.
        patches: P, patches of an image.
        word_width: Features of a word.
        answers: K, candidate answers.
        width: Of the layers.
        layers: How many.
        heads: Of each attention.
        dropout: Within the layers, in training.
    """

    def __init__(
        self,
        patch_width: int,
        patches: int,
        word_width: int,
        answers: int,
        width: int = 256,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.patch_scale = _ChannelScale(patch_width)
        self.word_scale = _ChannelScale(word_width)
        self.patch_projection = nn.Linear(patch_width, width)
        self.word_projection = nn.Linear(word_width, width)
        self.place = nn.Parameter(0.02 * torch.randn(patches, width))
        # Stands for the patches of every image where there is none.
        self.no_image = nn.Parameter(0.02 * torch.randn(1, width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width,
                heads,
                dim_feedforward=4 * width,
                dropout=dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, answers)

    @torch.no_grad()
    def measure(self, patches: Tensor, words: Tensor, mask: Tensor) -> None:
        """Take from features of training questions how far each channel of them varies.

        Towers have channels that are much the same for all images, in which the little that varies
        would be lost.

        Args:
            patches: As of `forward`.
            words: As of `forward`.
            mask: As of `forward`.
        """
        self.patch_scale.measure(patches.flatten(0, 1))
        self.word_scale.measure(words[mask])

    def forward(self, patches: Tensor | None, words: Tensor, mask: Tensor) -> Tensor:
        """Return the logits [B, K] of the candidate answers.

        Args:
            patches: Features [B, P, patch_width] of the images; None answers without them.
            words: Features [B, T, word_width] of the questions' tokens.
            mask: True for every token but padding, bool [B, T].
        """
        if patches is None:
            seen = self.no_image.expand(len(words), -1, -1)
        else:
            seen = self.patch_projection(self.patch_scale(patches)) + self.place
        said = self.word_projection(self.word_scale(words))
        for layer in self.layers:
            said = layer(said, seen, tgt_key_padding_mask=~mask)
        weight = mask.unsqueeze(-1).to(said.dtype)
        mean = (self.norm(said) * weight).sum(1) / weight.sum(1)
        return self.classifier(mean)


class _ChannelScale(nn.Module):
    """Features of which every channel has mean 0 and variance 1 over a data set.

    Args:
        width: Channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def measure(self, features: Tensor) -> None:
        """Take mean and deviation of the channels from features [N, C]."""
        own = standardised(features)
        self.mean.copy_(own.mean(0))
        self.std.copy_(own.std(0, correction=0).clamp(min=_LEAST))

    def forward(self, features: Tensor) -> Tensor:
        return (standardised(features) - self.mean) / self.std


def standardised(features: Tensor) -> Tensor:
    """Return features in fp32, each row with mean 0 and variance 1: towers differ in their scale.

    What has been standardised stays as it is, and fits fp16.
    """
    # The usual 1e-5 is more than the variance of some towers' features.
    return F.layer_norm(features.float(), features.shape[-1:], eps=1e-12)
