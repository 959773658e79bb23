"""A model as open_clip's: its settings, and its weights by open_clip's names.

CLIP's own towers become open_clip's. Any other image tower stays timm's, and any other text tower
transformers': open_clip builds them through these libraries, which take their shape from
`config.json`.
"""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from medfast.errors import UsageError
from medfast.export.shapes import Shape, clip_image, clip_text
from medfast.export.trained import Trained
from medfast.models.pair import ImageTextModel
from medfast.models.presets import Preset
from medfast.models.pretrained import from_open_clip, from_timm
from medfast.models.pretrained.tower import below, inverse, renamed, together

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"


def settings(trained: Trained, place: str) -> dict[str, Any]:
    """Return the content of `open_clip_config.json`.

    Args:
        trained: What is exported.
        place: Where the folder is to lie, as "local-dir:PATH" or "hf-hub:ORG/NAME".

    Raises:
        UsageError: open_clip has no such tower.
    """
    model, preset = trained.model, trained.config.preset
    image, text = clip_image(model.image_tower), clip_text(model.text_tower)
    activations = {shape.activation for shape in (image, text) if shape is not None}
    if len(activations) > 1 or activations - {"gelu", "quick_gelu"}:
        raise UsageError(
            f"--model {trained.config.model}: the activations of its towers are "
            f"{' and '.join(sorted(activations))}, and open_clip has gelu for both or quick_gelu "
            "for both; train a preset with one of these."
        )
    return {
        "model_cfg": {
            "embed_dim": model.image_projection.out_features,
            **({"quick_gelu": True} if activations == {"quick_gelu"} else {}),
            "vision_cfg": _vision(preset, model, image, place),
            "text_cfg": _text(trained, text, place),
        },
        "preprocess_cfg": {
            "mean": list(preset.mean),
            "std": list(preset.std),
            "interpolation": "bilinear",
            "resize_mode": "shortest",
        },
    }


def tower_config(trained: Trained) -> dict[str, Any]:
    """Return what timm and transformers read of the towers that open_clip builds through them.

    Both look for it in `config.json`, under keys that the other does not know. It is empty where
    open_clip's settings say all.
    """
    model, preset = trained.model, trained.config.preset
    config: dict[str, Any] = {}
    if clip_text(model.text_tower) is None:
        config = json.loads(model.text_tower.trunk.config.to_json_string())
    arguments = _timm_arguments(preset)
    if clip_image(model.image_tower) is None and arguments:
        size = preset.image_size
        config |= {
            "architecture": preset.image,
            "num_classes": 0,
            "model_args": arguments,
            "pretrained_cfg": {
                "architecture": preset.image,
                "num_classes": 0,
                "input_size": [3, size, size],
                "mean": list(preset.mean),
                "std": list(preset.std),
                "interpolation": "bilinear",
            },
        }
    return config


def tensors(model: ImageTextModel, context_length: int) -> dict[str, Tensor]:
    """Return the weights of the pair by open_clip's names.

    Args:
        model: The pair.
        context_length: Most tokens of a text; further positions, which none reaches, are left out.
    """
    state = model.state_dict()
    found = {"logit_scale": state["logit_scale"]}
    image = below(state, "image_tower.trunk.")
    projection = state["image_projection.weight"]
    if clip_image(model.image_tower) is None:
        found |= {f"visual.trunk.{name}": weight.tensor for name, weight in image.items()}
        found["visual.head.proj.weight"] = projection
    else:
        own = renamed(from_timm.without_batch(image), inverse(from_open_clip.IMAGE_NAMES))
        found |= {f"visual.{name}": weight.tensor for name, weight in own.items()}
        found["visual.proj"] = projection.mT
    # The name of transformers' CLIP before version 5 stands before some of ours.
    text = renamed(below(state, "text_tower.trunk."), [("text_model.", "")])
    projection = state["text_projection.weight"]
    if clip_text(model.text_tower) is None:
        found |= {f"text.transformer.{name}": weight.tensor for name, weight in text.items()}
        found["text.proj.weight"] = projection
    else:
        joint, part = from_open_clip.ATTENTION
        own = renamed(together(text, part, joint), inverse(from_open_clip.TEXT_NAMES))
        found |= {name: weight.tensor for name, weight in own.items()}
        found["positional_embedding"] = found["positional_embedding"][:context_length]
        found["text_projection"] = projection.mT
    return found


def _vision(
    preset: Preset, model: ImageTextModel, shape: Shape | None, place: str
) -> dict[str, Any]:
    trunk = model.image_tower.trunk
    if shape is None:
        return {
            "image_size": preset.image_size,
            "timm_model_name": place if _timm_arguments(preset) else preset.image,
            "timm_model_pretrained": False,
            "timm_pool": from_timm.pooling(trunk),
            "timm_proj": "linear",
        }
    return {
        "image_size": preset.image_size,
        "patch_size": trunk.patch_embed.patch_size[0],
        "width": shape.width,
        "layers": shape.layers,
        "head_width": shape.width // shape.heads,
        "mlp_ratio": shape.hidden / shape.width,
    }


def _timm_arguments(preset: Preset) -> dict[str, Any]:
    """Return what tells the image tower from timm's model of its name."""
    import timm

    arguments = dict(preset.image_args)
    known = timm.get_pretrained_cfg(preset.image)
    # The weights of others do not depend on the size.
    if known is not None and known.fixed_input_size and known.input_size[-1] != preset.image_size:
        arguments["img_size"] = preset.image_size
    return arguments


def _text(trained: Trained, shape: Shape | None, place: str) -> dict[str, Any]:
    tower, tokenizer = trained.model.text_tower, trained.tokenizer
    config, (kind, _, name) = tower.trunk.config, place.partition(":")
    common = {
        "context_length": tokenizer.context_length,
        "vocab_size": tower.vocab_size,
        # Whatever stands here, of a local folder open_clip takes the tokenizer that lies there.
        "hf_tokenizer_name": name if kind == "hf-hub" else ".",
    }
    if shape is not None:
        # transformers, too, reads the id 2 as the sign of a configuration that does not tell.
        by_id = config.eos_token_id != 2
        return {
            **common,
            "width": shape.width,
            "layers": shape.layers,
            "heads": shape.heads,
            "mlp_ratio": shape.hidden / shape.width,
            **({"pool_type": "eos", "eos_id": config.eos_token_id} if by_id else {}),
        }
    if config.model_type != "bert":
        raise UsageError(
            f"--model {trained.config.model}: its text tower is a {config.model_type} of "
            "transformers, which open_clip does not pool as medfast does; train a preset with "
            "CLIP's text tower or BERT."
        )
    special = tokenizer.special_ids
    if special.get("pad_token_id") == special.get("eos_token_id"):
        raise UsageError(
            f"--model {trained.config.model}: its tokenizer pads with the token that ends a text, "
            "which open_clip then hides from BERT; train with another --tokenizer."
        )
    return {
        **common,
        "hf_model_name": name,
        "hf_model_pretrained": False,
        "hf_proj_type": "linear",
        "hf_pooler_type": "mean_pooler",
    }
