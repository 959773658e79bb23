"""The shape of towers that are CLIP's own, as open_clip and transformers describe them."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from medfast.models.pair import ImageTower, TextTower
from medfast.models.pretrained import from_timm


class Shape(NamedTuple):
    """A transformer of CLIP's.

    Attributes:
        width: Of a feature.
        hidden: Width of a layer's perceptron.
        layers: How many.
        heads: Of attention, in a layer.
        activation: "gelu" or "quick_gelu".
    """

    width: int
    hidden: int
    layers: int
    heads: int
    activation: str


def clip_image(tower: ImageTower) -> Shape | None:
    """Return the shape of a ViT that is CLIP's; None for any other image tower."""
    trunk = tower.trunk
    # What sets CLIP's apart: a norm before the layers, and patches without a bias.
    if not isinstance(getattr(trunk, "norm_pre", None), nn.LayerNorm):
        return None
    activation, heads = from_timm.layer_settings(trunk)
    if trunk.patch_embed.proj.bias is not None or activation is None or heads is None:
        return None
    hidden = trunk.blocks[0].mlp.fc1.out_features
    return Shape(tower.width, hidden, len(trunk.blocks), heads, activation)


def clip_text(tower: TextTower) -> Shape | None:
    """Return the shape of CLIP's text transformer; None for any other text tower."""
    config = tower.trunk.config
    if config.model_type != "clip_text_model":
        return None
    return Shape(
        *(config.hidden_size, config.intermediate_size, config.num_hidden_layers),
        *(config.num_attention_heads, config.hidden_act),
    )
