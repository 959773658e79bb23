"""Heads that methods train beside the towers."""

from __future__ import annotations

import itertools

from torch import Tensor, nn


def mlp(*widths: int, last_norm: bool = False) -> nn.Sequential:
    """Return linear layers of these widths with batch norm and ReLU between them.

    Args:
        widths: Of the input and of each layer's output.
        last_norm: Batch norm after the last layer too, without scale and shift.
    """
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths[:-1]):
        # The norm's shift is the bias.
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=not last_norm))
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)


class SimSiam(nn.Module):
    """Projection and prediction of SimSiam (Chen and He 2021, arXiv 2011.10566).

    Args:
        width_in: Width of the image tower.
        width: Of projections, 2048 as published; the predictor's bottleneck is a quarter of it.
    """

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.projector = mlp(width_in, width, width, width, last_norm=True)
        self.predictor = mlp(width, width // 4, width)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return projections and predictions, both [B, width], of tower features [B, C]."""
        projected = self.projector(pooled)
        return projected, self.predictor(projected)


class MaskedLanguageHead(nn.Module):
    """BERT's head for masked tokens (Devlin 2019, arXiv 1810.04805), its decoder not tied.

    Args:
        width: Width of the text tower.
        vocab_size: Entries of the tokenizer.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, vocab_size)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits [n, vocab_size] of masked positions [n, C]."""
        return self.layers(hidden)
