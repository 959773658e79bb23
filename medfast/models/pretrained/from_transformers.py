"""CLIP and the BERT family, as the transformers library saves them."""

from __future__ import annotations

from typing import Any

from medfast.models.pretrained import from_timm
from medfast.models.pretrained.files import Weights
from medfast.models.pretrained.tower import (
    Tower,
    Weight,
    below,
    prefix_of,
    renamed,
    together,
)

CLIP = "transformers CLIP"
TEXT = "transformers text"

# transformers' names of a CLIP image tower -> timm's.
IMAGE_NAMES = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("pre_layrnorm.", "norm_pre."),
    ("post_layernorm.", "norm."),
    ("encoder.layers.", "blocks."),
    (".layer_norm", ".norm"),
    (".self_attn.out_proj.", ".attn.proj."),
)
# What stands in names of queries, keys and values: transformers' for each, timm's for all.
ATTENTION = (".self_attn.{}_proj.", ".attn.qkv.")
# The first BERT checkpoints kept TensorFlow's names.
_OLD_NORMS = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
# Buffers of old versions; heads that medfast has not.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_BERT_HEADS = ("pooler.", "cls.", "lm_head.", "classifier.", "qa_outputs.")
_CLIP_HEADS = ("classifier.", "visual_projection.", "text_projection.", "logit_scale")


def find(weights: Weights) -> tuple[Tower | None, Tower | None]:
    """Return the image and the text tower of CLIP, or of a BERT in its place."""
    config = _config(weights)
    image_config = getattr(config, "vision_config", config)
    text_config = getattr(config, "text_config", config)
    image = text = None
    prefix = prefix_of(weights.tensors, "embeddings.class_embedding", weights.source)
    if prefix is not None:
        image = Tower(
            CLIP,
            _image(below(weights.tensors, prefix)),
            projection=_projection(weights, "visual_projection.weight"),
            activation=getattr(image_config, "hidden_act", None),
            heads=getattr(image_config, "num_attention_heads", None),
        )
    prefix = prefix_of(weights.tensors, "embeddings.token_embedding.weight", weights.source)
    if prefix is not None:
        text = Tower(
            CLIP,
            renamed(below(weights.tensors, prefix), (), drop=(*_BUFFERS, *_CLIP_HEADS)),
            projection=_projection(weights, "text_projection.weight"),
            activation=getattr(text_config, "hidden_act", None),
            heads=getattr(text_config, "num_attention_heads", None),
        )
    prefix = prefix_of(weights.tensors, "embeddings.word_embeddings.weight", weights.source)
    if prefix is not None and text is None:
        text = bert(weights, prefix, text_config, TEXT)
    return image, text


def bert(weights: Weights, prefix: str, config: Any, format: str) -> Tower:
    """Return a text tower of the BERT family by the names of BertModel.

    RoBERTa is BERT whose positions start at the row after that of padding, and whose tokens are all
    of one type.

    Args:
        weights: The source.
        prefix: Beginning of the tower's names.
        config: Its configuration; None where the source has none.
        format: What the source is, in words.
    """
    found = renamed(below(weights.tensors, prefix), _OLD_NORMS, drop=(*_BUFFERS, *_BERT_HEADS))
    positions = found.get("embeddings.position_embeddings.weight")
    types = found.get("embeddings.token_type_embeddings.weight")
    roberta = types is not None and len(types.tensor) == 1
    if roberta and positions is not None and getattr(config, "model_type", None) != "bert":
        first = (getattr(config, "pad_token_id", None) or 1) + 1
        found["embeddings.position_embeddings.weight"] = Weight(
            positions.tensor[first:], positions.names
        )
    return Tower(
        format,
        found,
        activation=getattr(config, "hidden_act", None),
        heads=getattr(config, "num_attention_heads", None),
    )


def _config(weights: Weights) -> Any:
    """Return the configuration with the defaults of its model type, None without one."""
    if not weights.config or "model_type" not in weights.config:
        return None
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**weights.config)
    except Exception:  # whatever a type that transformers does not know may hold
        return None


def _image(found: dict[str, Weight]) -> dict[str, Weight]:
    names = renamed(found, IMAGE_NAMES, drop=(*_BUFFERS, *_CLIP_HEADS))
    return from_timm.with_batch(together(names, *ATTENTION))


def _projection(weights: Weights, name: str) -> Weight | None:
    prefix = prefix_of(weights.tensors, name, weights.source)
    return None if prefix is None else Weight(weights.tensors[prefix + name], (prefix + name,))
