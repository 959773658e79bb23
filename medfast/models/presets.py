"""Named shapes of the two towers. No torch here: the command line lists these."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
        head_width: Hidden width of the heads that some methods train beside the towers.
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
    head_width: int = 4096
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


_BERT_BASE = {
    "model_type": "bert",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}


def _clip_text(activation: str) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "hidden_act": activation,
    }


def _vit_b16(image: str, text: dict[str, Any], vocab_size: int) -> Preset:
    return Preset(
        image=image,
        image_size=224,
        text=text,
        context_length=77,
        vocab_size=vocab_size,
        embed_dim=512,
    )


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
        head_width=512,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    ),
    # CLIP's shape as open_clip trains it. OpenAI's own weights have QuickGELU in its place.
    "vit_b16_clip": _vit_b16("vit_base_patch16_clip_224", _clip_text("gelu"), 49408),
    "vit_b16_clip_quickgelu": _vit_b16(
        "vit_base_patch16_clip_quickgelu_224", _clip_text("quick_gelu"), 49408
    ),
    # The plain ViT: normalised as its ImageNet weights of timm's are and with CLIP's text tower, or
    # normalised as CLIP and with BERT, as BiomedCLIP is.
    "vit_b16": replace(
        _vit_b16("vit_base_patch16_224", _clip_text("gelu"), 49408),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    "vit_b16_bert": _vit_b16("vit_base_patch16_224", _BERT_BASE, 30522),
}
