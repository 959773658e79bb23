"""The checkpoints of medfast's own runs."""

from __future__ import annotations

from medfast.models.presets import PRESETS
from medfast.models.pretrained import from_timm
from medfast.models.pretrained.files import Weights
from medfast.models.pretrained.tower import Tower, Weight, below

FORMAT = "medfast"


def find(weights: Weights) -> tuple[Tower | None, Tower | None]:
    """Return the image and the text tower of a run."""
    preset = PRESETS.get(weights.run.get("model", ""))
    image: tuple[str | None, int | None] = (None, None)
    text: tuple[str | None, int | None] = (None, None)
    if preset is not None:
        image = from_timm.described(preset.image, preset.image_args)
        text = preset.text.get("hidden_act"), preset.text.get("num_attention_heads")
    return _tower(weights, "image", "patch", *image), _tower(weights, "text", "token", *text)


def _tower(
    weights: Weights, side: str, part: str, activation: str | None, heads: int | None
) -> Tower | None:
    found = below(weights.tensors, f"{side}_tower.trunk.")
    if not found:
        return None
    return Tower(
        FORMAT,
        # The name of transformers' CLIP before version 5.
        {name.removeprefix("text_model."): weight for name, weight in found.items()},
        projection=_matrix(weights, f"{side}_projection.weight"),
        local_projection=_matrix(weights, f"{part}_projection.weight"),
        activation=activation,
        heads=heads,
    )


def _matrix(weights: Weights, name: str) -> Weight | None:
    return Weight(weights.tensors[name], (name,)) if name in weights.tensors else None
