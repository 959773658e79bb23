"""The image tower, the text tower and the shared space between them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from medfast.data.tokens import Tokenizer
from medfast.errors import UsageError
from medfast.models.presets import Preset

LOG_SCALE_INIT = math.log(1 / 0.07)
LOG_SCALE_MAX = math.log(100)


@dataclass(frozen=True)
class Features:
    """What the model says of a batch of B pairs.

    Attributes:
        image: Unit global image features [B, D].
        text: Unit global text features [B, D].
        patches: Projected patch features [B, P, D], not normalised; None unless asked for.
        tokens: Projected token features [B, T, D], not normalised; None unless asked for.
        logit_scale: The learnable scale, exponentiated, a scalar.
        extra: What one method alone asks for, by its own names; rows follow the batch.
    """

    image: Tensor
    text: Tensor
    patches: Tensor | None
    tokens: Tensor | None
    logit_scale: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def local(self) -> tuple[Tensor, Tensor]:
        """Return patches and tokens of a model that was asked for them."""
        assert self.patches is not None
        assert self.tokens is not None
        return self.patches, self.tokens

    def parts(self) -> dict[str, Tensor]:
        """Return all that is there of single pairs, by name: all but the scale."""
        own = {name: getattr(self, name) for name in _PARTS}
        return {name: x for name, x in own.items() if x is not None} | dict(self.extra)

    def with_parts(self, parts: Mapping[str, Tensor]) -> Features:
        """Return the features with others in place of their `parts`."""
        return Features(
            *(parts["image"], parts["text"], parts.get("patches"), parts.get("tokens")),
            self.logit_scale,
            {name: x for name, x in parts.items() if name not in _PARTS},
        )


_PARTS = ("image", "text", "patches", "tokens")


class ImageTower(nn.Module):
    """A timm model that gives one global feature and a feature per patch.

    Args:
        preset: Shape of the tower and normalisation of its input.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        import timm

        args: dict[str, Any] = {"num_classes": 0, **preset.image_args}
        if preset.image.startswith(("vit_", "deit")):
            args["img_size"] = preset.image_size
        trunk: Any = timm.create_model(preset.image, **args)
        _check_patches(trunk, preset.image_size)
        self.trunk = trunk
        self.width: int = trunk.num_features
        self.register_buffer(
            "mean", torch.tensor(preset.mean).view(3, 1, 1) * 255, persistent=False
        )
        self.register_buffer("std", torch.tensor(preset.std).view(3, 1, 1) * 255, persistent=False)
        with torch.no_grad():
            size = (1, 3, preset.image_size, preset.image_size)
            patches = self.eval()(torch.zeros(size, dtype=torch.uint8))[1].shape[1]
        # Patches are rows of a square, side x side.
        self.grid = (math.isqrt(patches), math.isqrt(patches))
        self.train()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        return next(self.trunk.parameters()).dtype

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return global [B, C] and patch [B, P, C] features of uint8 images [B, 3, H, W]."""
        pixels = ((images - self.mean) / self.std).to(self.dtype)
        features = self.trunk.forward_features(pixels)
        pooled = self.trunk.forward_head(features, pre_logits=True)
        if features.ndim == 4:
            channels_last = getattr(self.trunk, "output_fmt", "NCHW") == "NHWC"
            patches = features.flatten(1, 2) if channels_last else features.flatten(2).mT
        else:
            patches = features[:, self.trunk.num_prefix_tokens :]
        return pooled, patches


class TextTower(nn.Module):
    """A transformers model that gives one global feature and a feature per token.

    Args:
        preset: Shape of the tower.
        vocab_size: Entries of the tokenizer.
        special_ids: Ids of the tokens that the configuration names, such as `pad_token_id`.
    """

    def __init__(self, preset: Preset, vocab_size: int, special_ids: dict[str, int]) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        shape = dict(preset.text)
        config = AutoConfig.for_model(
            shape.pop("model_type"),
            **shape,
            vocab_size=vocab_size,
            max_position_embeddings=preset.context_length,
            **special_ids,
        )
        # BERT's own pooler is trained by next-sentence prediction, which does not exist here.
        args = {"add_pooling_layer": False} if config.model_type == "bert" else {}
        self.trunk: Any = AutoModel.from_config(config, **args)
        self.width: int = config.hidden_size
        self.vocab_size = vocab_size
        # A token sees those before it alone.
        self.is_causal: bool = config.model_type == "clip_text_model"
        # Its layers are computed again in the backward.
        self.is_checkpointed = False

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the transformer."""
        encoder = self.trunk.encoder
        return encoder.layers if hasattr(encoder, "layers") else encoder.layer

    def grow(self, vocab_size: int) -> None:
        """Give further tokens an embedding, drawn after all other weights."""
        if vocab_size > self.vocab_size:
            self.trunk.resize_token_embeddings(vocab_size, mean_resizing=False)
            self.vocab_size = vocab_size

    def _fast_attention(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which attention between the few words of captions is fast.

        In bf16 on a CPU the backward of torch's fused attention takes 4 to 8 times the time of the
        plain products, whose scores [B, heads, T, T] are small here.
        """
        dtype = self.trunk.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        is_slow = device.type == "cpu" and dtype == torch.bfloat16 and torch.is_grad_enabled()
        # Checkpointed layers are computed again outside of this context.
        if is_slow and not self.is_checkpointed:
            return sdpa_kernel(SDPBackend.MATH)
        return contextlib.nullcontext()

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return global [B, C] and token [B, T, C] features of token ids [B, T].

        The global feature is the one at the end token where the model has such a pooler (CLIP),
        else the mean over the tokens of `mask`.
        """
        # Padding comes last, where no token of a causal tower looks. Without a mask such a tower
        # takes the faster attention, and nobody waits for a GPU to say whether there is padding.
        seen = None if self.is_causal else mask
        with self._fast_attention(ids.device):
            output = self.trunk(input_ids=ids, attention_mask=seen)
        tokens = output.last_hidden_state
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            weight = mask.unsqueeze(-1).to(tokens.dtype)
            pooled = (tokens * weight).sum(1) / weight.sum(1)
        return pooled, tokens


class ImageTextModel(nn.Module):
    """Two towers, their projections into the shared space and the learnable logit scale.

    Args:
        preset: Shape of the towers.
        vocab_size: Entries of the tokenizer.
        special_ids: See `TextTower`.
        token_features: Also project patches and tokens, for losses and maps that need them.
    """

    def __init__(
        self,
        preset: Preset,
        vocab_size: int,
        special_ids: dict[str, int],
        token_features: bool = False,
    ) -> None:
        super().__init__()
        self.image_tower = ImageTower(preset)
        self.text_tower = TextTower(preset, vocab_size, special_ids)
        self.image_projection = _projection(self.image_tower.width, preset.embed_dim)
        self.text_projection = _projection(self.text_tower.width, preset.embed_dim)
        self.patch_projection: nn.Linear | None = None
        self.token_projection: nn.Linear | None = None
        if token_features:
            self.patch_projection = _projection(self.image_tower.width, preset.embed_dim)
            self.token_projection = _projection(self.text_tower.width, preset.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(LOG_SCALE_INIT))

    def train(self, mode: bool = True) -> ImageTextModel:
        """Set the mode of what is trained; what is locked stays as in evaluation."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            # Its dropout and batch statistics are locked too.
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return unit global [B, D] and, where built, patch [B, P, D] features."""
        pooled, patches = self.image_tower(images)
        local = self.patch_projection(patches) if self.patch_projection else None
        return self.project_image(pooled), local

    def project_image(self, pooled: Tensor) -> Tensor:
        """Return unit features [B, D] of the image tower's global ones [B, C]."""
        return F.normalize(self.image_projection(pooled).float(), dim=-1)

    def encode_text(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return unit global [B, D] and, where built, token [B, T, D] features."""
        pooled, tokens = self.text_tower(ids, mask)
        local = self.token_projection(tokens) if self.token_projection else None
        return F.normalize(self.text_projection(pooled).float(), dim=-1), local

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Features:
        """Return the features of B pairs: uint8 images [B, 3, H, W], ids and mask [B, T]."""
        image, patches = self.encode_image(images)
        text, tokens = self.encode_text(ids, mask)
        return Features(image, text, patches, tokens, self.logit_scale.exp())

    def checkpoint_activations(self) -> None:
        """Let the towers compute activations again in the backward instead of keeping them."""
        self.image_tower.trunk.set_grad_checkpointing(True)
        self.text_tower.is_checkpointed = True
        text: Any = self.text_tower.trunk
        text.config.use_cache = False  # it would warn that it cannot keep both
        if hasattr(text, "activation_checkpointing_enable"):
            text.activation_checkpointing_enable()
        else:  # its name before transformers 5
            text.gradient_checkpointing_enable()

    def units(self) -> list[nn.Module]:
        """Return what is best kept in parts: the layers of both towers, and then these."""
        image = getattr(self.image_tower.trunk, "blocks", ())
        return [*image, self.image_tower, *self.text_tower.layers, self.text_tower]

    def cast(self, dtype: torch.dtype) -> None:
        """Keep the weights in `dtype`; the scale and what normalises pixels stay in fp32."""
        for name, module in self.named_children():
            (module.trunk if name.endswith("_tower") else module).to(dtype)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the scale in [1, 100], as CLIP does after each step."""
        self.logit_scale.clamp_(0, LOG_SCALE_MAX)


def _check_patches(trunk: Any, image_size: int) -> None:
    """Refuse an image that patches do not fill.

    Raises:
        UsageError: they do not.
    """
    side = getattr(getattr(trunk, "patch_embed", None), "patch_size", (1, 1))[0]
    if image_size % side:
        fits = image_size - image_size % side or side
        raise UsageError(
            f"--force-image-size must be a multiple of the patch size {side}; got {image_size}. "
            f"Use {fits} or {fits + side}."
        )


def _projection(width: int, embed_dim: int) -> nn.Linear:
    layer = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(layer.weight, std=width**-0.5)
    return layer


def build_model(preset: Preset, tokenizer: Tokenizer, token_features: bool) -> ImageTextModel:
    """Return the untrained model of `preset` for the vocabulary of `tokenizer`.

    Weights do not depend on tokens that were added to it, nor on `token_features`.
    """
    vocab_size = len(tokenizer) - tokenizer.added
    model = ImageTextModel(preset, vocab_size, tokenizer.special_ids, token_features)
    model.text_tower.grow(len(tokenizer))
    return model
