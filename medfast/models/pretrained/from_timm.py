"""timm's image towers: their names are medfast's own."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from medfast.models.pretrained.files import Weights
from medfast.models.pretrained.tower import Tower, Weight, below, prefix_of

FORMAT = "timm"

# Beginnings of the names of classifiers, as timm calls them.
HEADS = ("head.", "head_dist.", "fc.", "classifier.", "pre_logits.")
# What a ViT and a ResNet have, whatever is before the name.
_ANCHORS = ("patch_embed.proj.weight", "layer1.0.conv1.weight")
# What timm keeps with dimensions of size 1 before those of CLIP, and how many.
_BATCH = (("cls_token", 2), ("pos_embed", 1))
_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh"}


def find(weights: Weights, trunk: Any) -> Tower | None:
    """Return the image tower of a source with timm's names."""
    config = weights.config or {}
    prefixes = (prefix_of(weights.tensors, name, weights.source) for name in _ANCHORS)
    prefix = next((p for p in prefixes if p is not None), None)
    if prefix is None:
        known = "architecture" in config or weights.tensors.keys() & trunk.state_dict().keys()
        if not known:
            return None
    return tower(
        below(weights.tensors, prefix or ""),
        FORMAT,
        config.get("architecture"),
        config.get("model_args", {}),
    )


def tower(
    weights: dict[str, Weight], format: str, architecture: str | None, args: dict[str, Any]
) -> Tower:
    """Return an image tower of timm.

    Args:
        weights: By timm's names.
        format: What the source is, in words.
        architecture: timm's name of the model; None where the source does not tell.
        args: Other arguments of `timm.create_model`.
    """
    activation, heads = described(architecture, args)
    return Tower(format, weights, _clip_projection(weights), activation=activation, heads=heads)


def layer_settings(trunk: Any) -> tuple[str | None, int | None]:
    """Return the activation and the number of heads of a timm model; None where it has none."""
    block = next(iter(getattr(trunk, "blocks", ())), None)
    activation = type(getattr(getattr(block, "mlp", None), "act", None)).__name__
    return _ACTIVATIONS.get(activation), getattr(getattr(block, "attn", None), "num_heads", None)


def pooling(trunk: Any) -> str | None:
    """Return timm's word for how a model pools."""
    pool = getattr(trunk, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    return pool if isinstance(pool, str) else None


def with_batch(weights: dict[str, Weight]) -> dict[str, Weight]:
    """Return weights of CLIP with the batch dimension that timm keeps in two of them."""
    result = dict(weights)
    for name, dims in _BATCH:
        if name in weights:
            tensor, names = weights[name]
            result[name] = Weight(tensor[(None,) * dims], names)
    return result


def without_batch(weights: dict[str, Weight]) -> dict[str, Weight]:
    """Return timm's weights as CLIP keeps them: what `with_batch` takes back."""
    result = dict(weights)
    for name, dims in _BATCH:
        tensor, names = weights[name]
        result[name] = Weight(tensor[(0,) * dims], names)
    return result


def fitted(weights: Mapping[str, Weight], trunk: Any) -> dict[str, Weight]:
    """Return weights as timm's own loading fits them to a model of another resolution."""
    own = trunk.state_dict()
    name = "patch_embed.proj.weight"
    theirs, ours = weights.get(name), own.get(name)
    fits = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if fits is None or (theirs is None) != (ours is None):
        return dict(weights)
    if theirs is not None and ours is not None:
        # timm would resample patches of another size, too: these are of another model.
        same = theirs.tensor.ndim != 4 or theirs.tensor.shape[2:] == ours.shape[2:]
        if not same or not _resampled("pos_embed", weights, own, trunk):
            return dict(weights)
    names = {id(weight.tensor): weight.names for weight in weights.values()}
    tensors = fits({name: weight.tensor for name, weight in weights.items()}, trunk)
    return {
        name: Weight(tensor, names.get(id(tensor)) or weights[name].names)
        for name, tensor in tensors.items()
        if id(tensor) in names or name in weights
    }


def _resampled(
    name: str, weights: Mapping[str, Weight], own: Mapping[str, Tensor], trunk: Any
) -> bool:
    """Return whether position embeddings are as in the model, or of a square as timm asks."""
    if name not in weights or name not in own or weights[name].tensor.ndim != 3:
        return name not in own
    count = weights[name].tensor.shape[1]
    prefix = 0 if getattr(trunk, "no_embed_class", False) else trunk.num_prefix_tokens
    patches = max(count - prefix, 0)
    return count == own[name].shape[1] or math.isqrt(patches) ** 2 == patches > 0


def described(architecture: str | None, args: dict[str, Any]) -> tuple[str | None, int | None]:
    """Return the activation and the heads of the timm model of this name."""
    import timm

    if architecture is None or not timm.is_model(architecture):
        return None, None
    try:
        with torch.device("meta"):
            return layer_settings(timm.create_model(architecture, **args))
    except (TypeError, ValueError, RuntimeError, AssertionError):  # arguments of another version
        return None, None


def _clip_projection(weights: Mapping[str, Weight]) -> Weight | None:
    """Return the classifier where it is CLIP's projection, to which timm gives a bias of zeros."""
    weight, bias = weights.get("head.weight"), weights.get("head.bias")
    if weight is None or bias is None or bias.tensor.is_meta or bias.tensor.any():
        return None
    return Weight(weight.tensor, (*weight.names, *bias.names))
