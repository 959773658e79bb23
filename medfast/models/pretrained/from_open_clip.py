"""open_clip's models: its own towers, timm's image towers, transformers' text towers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from medfast.errors import UsageError
from medfast.models.pretrained import from_timm, from_transformers
from medfast.models.pretrained.files import Weights
from medfast.models.pretrained.tower import Tower, Weight, apart, below, renamed

FORMAT = "open_clip"

# open_clip's names of an image tower -> timm's.
IMAGE_NAMES = (
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("conv1.", "patch_embed.proj."),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    ("transformer.resblocks.", "blocks."),
    (".ln_", ".norm"),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
# open_clip's names of a text tower -> transformers'.
TEXT_NAMES = (
    ("token_embedding.", "embeddings.token_embedding."),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_final.", "final_layer_norm."),
    ("transformer.resblocks.", "encoder.layers."),
    (".ln_", ".layer_norm"),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
# What an older model keeps of its text tower beside its other names.
_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.")
# open_clip's words for pooling -> timm's; an empty one is the model's own.
_POOLS = {"tok": "token", "": None, None: None}
# Of text: at the end token, by its id or as the greatest, which is one and the same to medfast's
# tower, as it asks its own tokenizer which that is.
_TEXT_POOLS = {"eos": "argmax"}
# What stands in names of queries, keys and values: open_clip's for all, transformers' for each.
ATTENTION = (".attn.in_proj_", ".self_attn.{}_proj.")


def find(weights: Weights) -> tuple[Tower | None, Tower | None]:
    """Return the image and the text tower of an open_clip model, as far as it has them.

    Raises:
        UsageError: the text tower works in another way than medfast's.
    """
    config = weights.open_clip or {}
    # open_clip's default where it has a configuration; unknown without one.
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu" if config else None
    return _image(weights, config, activation), _text(weights, config, activation)


def _image(weights: Weights, config: dict[str, Any], activation: str | None) -> Tower | None:
    vision = config.get("vision_cfg", {})
    if "visual.class_embedding" in weights.tensors:
        found = renamed(below(weights.tensors, "visual."), IMAGE_NAMES, drop=("proj",))
        pool = vision.get("pool_type", "tok") if vision else None
        return Tower(
            FORMAT,
            from_timm.with_batch(found),
            projection=_matrix(weights, "visual.proj"),
            activation=activation,
            heads=vision["width"] // vision.get("head_width", 64) if "width" in vision else None,
            pool=_POOLS.get(pool, pool),
        )
    if any(name.startswith("visual.trunk.") for name in weights.tensors):
        heads = [name for name in weights.tensors if name.startswith("visual.head.")]
        plain = heads == ["visual.head.proj.weight"]
        tower = from_timm.tower(
            below(weights.tensors, "visual.trunk."), FORMAT, vision.get("timm_model_name"), {}
        )
        projection = below(weights.tensors, "visual.head.proj.")["weight"] if plain else None
        pool = vision.get("timm_pool", "avg") if vision else None
        return Tower(**{**vars(tower), "projection": projection, "pool": _POOLS.get(pool, pool)})
    return None


def _text(weights: Weights, config: dict[str, Any], activation: str | None) -> Tower | None:
    tensors, text = weights.tensors, config.get("text_cfg", {})
    if any(name.startswith("text.transformer.embeddings.") for name in tensors):
        tower = from_transformers.bert(weights, "text.transformer.", None, FORMAT)
        pool = text.get("hf_pooler_type", "mean_pooler") if text else None
        if any(name.startswith("text.transformer.pooler.") for name in tensors):
            pool = "cls_pooler"
        projection = below(tensors, "text.proj.").get("weight")
        return replace(tower, projection=projection, pool=pool)
    prefix = "text." if "text.token_embedding.weight" in tensors else ""
    if f"{prefix}token_embedding.weight" not in tensors:
        return None
    if text.get("no_causal_mask"):
        raise UsageError(
            f"{weights.source} holds a text tower without a causal mask (open_clip's "
            "no_causal_mask), which medfast does not have; give other weights."
        )
    found = below(tensors, prefix)
    if not prefix:
        found = {name: weight for name, weight in found.items() if name.startswith(_TEXT)}
    found = renamed(found, TEXT_NAMES, drop=("text_projection", "attn_mask"))
    pool = text.get("pool_type")
    return Tower(
        FORMAT,
        apart(found, *ATTENTION),
        projection=_matrix(weights, f"{prefix}text_projection"),
        activation=activation,
        heads=text.get("heads"),
        pool=_TEXT_POOLS.get(pool, pool),
    )


def _matrix(weights: Weights, name: str) -> Weight | None:
    """Return a projection that is kept as a matrix [C, D], or as a linear layer without bias."""
    if name in weights.tensors:
        return Weight(weights.tensors[name].mT, (name,))
    if f"{name}.weight" in weights.tensors and f"{name}.bias" not in weights.tensors:
        return Weight(weights.tensors[f"{name}.weight"], (f"{name}.weight",))
    return None
