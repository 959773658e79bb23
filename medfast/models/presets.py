"""Named shapes of the two towers. No torch here: the command line lists these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One shape of the two towers.

    Attributes:
        image: Name of a timm model.
        image_size: Side of its square input in pixels.
        text: `model_type` of a transformers configuration, then its other settings.
        context_length: Most tokens of a caption, start and end included.
        vocab_size: Most entries of a tokenizer that is trained for the run.
        embed_dim: D of the shared space.
        image_args: Further arguments of `timm.create_model`.
        crop: Smallest share of the image that a training crop keeps.
        mean: Per-channel mean of the normalised input, in units of [0, 1].
        std: Per-channel standard deviation, likewise.
    """

    image: str
    image_size: int
    text: dict[str, Any]
    context_length: int
    vocab_size: int
    embed_dim: int
    image_args: dict[str, Any] = field(default_factory=dict)
    crop: float = 0.8
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


PRESETS = {
    "tiny": Preset(
        image="resnet10t",
        image_args={
            "channels": (32, 64, 128, 256),
            "stem_type": "",
            "stem_width": 32,
            "output_stride": 16,
        },
        image_size=96,
        text={
            "model_type": "bert",
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        context_length=48,
        vocab_size=2048,
        embed_dim=128,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    ),
    "vit_b16_clip": Preset(
        image="vit_base_patch16_clip_224",
        image_size=224,
        text={
            "model_type": "clip_text_model",
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
        },
        context_length=77,
        vocab_size=49408,
        embed_dim=512,
    ),
}
