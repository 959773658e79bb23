"""A pair of CLIP's own towers as a `CLIPModel` of transformers."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from medfast.export.shapes import clip_image, clip_text
from medfast.export.trained import Trained
from medfast.models.pair import ImageTextModel
from medfast.models.pretrained import from_timm, from_transformers
from medfast.models.pretrained.tower import apart, below, inverse, renamed

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PIXELS = "preprocessor_config.json"

# Pillow's number of the filter.
_BILINEAR = 2


def settings(trained: Trained) -> dict[str, Any] | None:
    """Return the content of `config.json`; None if the towers are not both CLIP's."""
    model, size = trained.model, trained.config.preset.image_size
    image, text = clip_image(model.image_tower), clip_text(model.text_tower)
    if image is None or text is None:
        return None
    embed_dim = model.image_projection.out_features
    config = model.text_tower.trunk.config
    length = trained.tokenizer.context_length
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": embed_dim,
        "text_config": {
            **json.loads(config.to_json_string()),
            "max_position_embeddings": length,
            "projection_dim": embed_dim,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": size,
            "patch_size": model.image_tower.trunk.patch_embed.patch_size[0],
            "hidden_size": image.width,
            "intermediate_size": image.hidden,
            "num_hidden_layers": image.layers,
            "num_attention_heads": image.heads,
            "hidden_act": image.activation,
            "projection_dim": embed_dim,
        },
    }


def pixels(trained: Trained) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json`."""
    preset = trained.config.preset
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preset.image_size},
        "resample": _BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": preset.image_size, "width": preset.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preset.mean),
        "image_std": list(preset.std),
    }


def tensors(model: ImageTextModel, context_length: int) -> dict[str, Tensor]:
    """Return the weights of the pair by the names of `CLIPModel`.

    Args:
        model: The pair.
        context_length: Most tokens of a text; further positions, which none reaches, are left out.
    """
    state = model.state_dict()
    part, joint = from_transformers.ATTENTION
    image = apart(from_timm.without_batch(below(state, "image_tower.trunk.")), joint, part)
    towers = {
        "vision_model": renamed(image, inverse(from_transformers.IMAGE_NAMES)),
        # As in transformers before version 5.
        "text_model": renamed(below(state, "text_tower.trunk."), [("text_model.", "")]),
    }
    found = {
        f"{tower}.{name}": weight.tensor
        for tower, own in towers.items()
        for name, weight in own.items()
    }
    positions = "text_model.embeddings.position_embedding.weight"
    return {
        **found,
        positions: found[positions][:context_length],
        "visual_projection.weight": state["image_projection.weight"],
        "text_projection.weight": state["text_projection.weight"],
        "logit_scale": state["logit_scale"],
    }
