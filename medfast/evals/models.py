"""Encoders of models to evaluate: medfast's own runs, and those of open_clip and transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medfast.data.tokens import Tokenizer, Tokens
from medfast.device import number_format
from medfast.errors import UsageError
from medfast.evals.encode import Encoder
from medfast.models.pair import Features, ImageTextModel, build_model
from medfast.models.pretrained import pretrained_tokenizer
from medfast.models.pretrained.files import Weights, read

# Pixels as open_clip takes them where a model does not say otherwise: CLIP's.
_CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# `model_type` of transformers' pairs of towers that medfast knows how to ask.
_TRANSFORMERS = ("clip", "siglip", "vision-text-dual-encoder")
# Buffers that older versions of the libraries saved with the weights.
_BUFFERS = ("position_ids", "token_type_ids", "attn_mask")

# Takes the library's tower and pixels and returns the global and the patch features.
_ReadImage = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
# Takes the library's tower, ids and mask and returns the global and the token features.
_ReadText = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


def load_encoder(
    source: str, device: torch.device, precision: str = "auto", *, flag: str = "--model"
) -> Encoder:
    """Return the encoder of a model, with its own tokenizer and its own way with pixels.

    It may be a run of medfast, by its folder (of a run that stops early the best epoch, of others
    the last) or by a checkpoint; a model of open_clip (open_clip_config.json); or of transformers
    (config.json) with CLIP's or SigLIP's towers, or any two as VisionTextDualEncoderModel joins
    them. Embeddings are those that the library itself gives for the same pixels. Nothing is
    unpickled but tensors.

    Args:
        source: A local folder or checkpoint, else the name of a model on the Hugging Face hub.
        device: Where to compute.
        precision: Number format of the towers, as for `medfast train`; the encoder tells which one
            "auto" is.
        flag: What the user gave the source by, for messages.

    Raises:
        UsageError: the source cannot be found or read, lacks a part or is of another kind.
    """
    name = f"{flag} {source}"
    weights = read(_best(source), flag)
    if weights.run:
        found = _medfast(weights, source, name)
    elif weights.open_clip and any(own.startswith("visual.") for own in weights.tensors):
        found = _open_clip(weights, source, name)
    elif "model_type" in (weights.config or {}):
        found = _transformers(weights, source, name)
    else:
        raise UsageError(
            f"{name} is neither a run of medfast nor a model of open_clip (with its "
            "open_clip_config.json) or transformers (with its config.json); name a folder that "
            "holds one of these."
        )
    # As in training: convolutions are faster.
    found.model.to(device).to(memory_format=torch.channels_last).eval()
    return Encoder(
        *(found.model, found.tokenizer, device, number_format(precision, device)),
        *(found.late_interaction, found.image_size, _shown(source)),
        library=f"{found.package} {version(found.package)}" if found.package else "",
    )


class _Found(NamedTuple):
    model: ImageTextModel | LibraryModel
    tokenizer: Tokenizer
    image_size: int
    late_interaction: bool = False
    package: str = ""


def _shown(source: str) -> str:
    """Return a source as tables show it: a run by its name, and its checkpoint if one is given."""
    path = Path(source).expanduser()
    if path.is_file() and path.parent.name == "checkpoints":
        return f"{path.absolute().parent.parent.name} {path.stem}"
    return path.absolute().name if path.exists() else source


class LibraryModel(nn.Module):
    """Another library's model behind the names that `ImageTextModel` has.

    Args:
        image_tower: Gives projected global features and those of patches.
        text_tower: Gives projected global features and those of tokens.
        logit_scale: Logarithm of the scale of cosines, one number.
    """

    image_tower: Any
    text_tower: Any

    def __init__(self, image_tower: nn.Module, text_tower: nn.Module, logit_scale: Tensor) -> None:
        super().__init__()
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.logit_scale = nn.Parameter(logit_scale.detach().float().reshape(()))

    def encode_image(self, images: Tensor) -> tuple[Tensor, None]:
        """Return unit features [B, D] of uint8 images [B, 3, H, W]; no patch is projected."""
        return F.normalize(self.image_tower(images)[0].float(), dim=-1), None

    def encode_text(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        """Return unit features [B, D] of ids and mask [B, T]; no token is projected."""
        return F.normalize(self.text_tower(ids, mask)[0].float(), dim=-1), None

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Features:
        """Return the features of B pairs."""
        image, text = self.encode_image(images)[0], self.encode_text(ids, mask)[0]
        return Features(image, text, None, None, self.logit_scale.exp())


class _ImageTower(nn.Module):
    """A library's image tower that takes uint8 images.

    Args:
        trunk: The library's.
        features: Its global and patch features of pixels.
        pixels: Mean and standard deviation of these, in units of [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        features: _ReadImage,
        pixels: tuple[Sequence[float], Sequence[float]],
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self._features = features
        for name, values in zip(("mean", "std"), pixels, strict=True):
            scaled = torch.tensor(values).view(3, 1, 1) * 255
            self.register_buffer(name, scaled, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self._features(self.trunk, (images - self.mean) / self.std)


class _TextTower(nn.Module):
    """A library's text tower.

    Args:
        trunk: The library's.
        features: Its global and token features of ids and mask.
    """

    def __init__(self, trunk: nn.Module, features: _ReadText) -> None:
        super().__init__()
        self.trunk = trunk
        self._features = features

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self._features(self.trunk, ids, mask)


def _best(source: str) -> str:
    """Return the best epoch's checkpoint of a run that keeps one, else the source."""
    from medfast import checkpoint

    best = checkpoint.best(Path(source).expanduser() / "checkpoints")
    return str(best) if best.is_file() else source


def _medfast(weights: Weights, source: str, name: str) -> _Found:
    from medfast.config import TrainConfig
    from medfast.methods import method_class

    folder = pretrained_tokenizer(source)
    if folder is None:
        raise UsageError(
            f"{name}: the run's tokenizer is missing; a checkpoint needs the folder tokenizer/ of "
            "its run beside checkpoints/."
        )
    try:
        config = TrainConfig(**weights.run)
    except (TypeError, UsageError) as error:
        raise UsageError(
            f"{name} has settings that this version of medfast does not know ({error}); evaluate "
            "it with the version that trained it."
        ) from None
    preset, method = config.preset, method_class(config.method)
    tokenizer = _tokenizer(folder, preset.context_length, name)
    model = build_model(preset, tokenizer, method.needs_tokens)
    _load(model, weights.tensors, name)
    return _Found(model, tokenizer, preset.image_size, method.late_interaction)


def _open_clip(weights: Weights, source: str, name: str) -> _Found:
    try:
        from open_clip.model import CustomTextCLIP, convert_to_custom_text_state_dict
    except ModuleNotFoundError:
        raise UsageError(
            f"{name} is a model of open_clip: pip install open_clip_torch, which builds it."
        ) from None
    settings = dict(weights.open_clip or {})
    settings.pop("custom_text", None)
    folder = pretrained_tokenizer(source)
    try:
        vision = settings["vision_cfg"] = dict(settings["vision_cfg"])
        text = settings["text_cfg"] = dict(settings["text_cfg"])
        # The weights are all in the source.
        vision["timm_model_pretrained"] = text["hf_model_pretrained"] = False
        if text.get("hf_model_name") and folder and "model_type" in (weights.config or {}):
            text["hf_model_name"] = str(folder)
        # Where timm is told to look for the shape is the source itself, wherever it lies by now.
        if ":" in str(vision.get("timm_model_name")) and "architecture" in (weights.config or {}):
            vision["timm_model_name"] = f"local-dir:{folder}"
        # CLIP and CustomTextCLIP are one function; this one has a text tower of its own.
        model = CustomTextCLIP(**settings)
        library, length = _library_tokenizer(text, folder)
    # Whatever a damaged or a newer configuration leads to, an unreachable hub among it.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        hub = (settings.get("text_cfg") or {}).get("hf_model_name")
        remedy = (
            f"Its text tower is shaped as {hub}: if that cannot be had from the hub, put its "
            "config.json and tokenizer files beside open_clip_config.json."
            if hub
            else "Install a newer open_clip_torch, or get a whole copy of the model."
        )
        raise UsageError(
            f"{name}: open_clip cannot build it ({type(error).__name__}: {reason}). {remedy}"
        ) from None
    _load(model, convert_to_custom_text_state_dict(weights.tensors), name)
    size = _square(model.visual.image_size, name)
    has_mask = hasattr(model.text, "pooler")
    pair = LibraryModel(
        _ImageTower(
            model.visual, _open_clip_image(model.visual), weights.normalisation or _CLIP_PIXELS
        ),
        _TextTower(model.text, _hugging_face_text if has_mask else _open_clip_text),
        model.logit_scale,
    )
    model.text.output_tokens = True
    tokenizer = OpenClipTokenizer(library, length, trim=has_mask)
    return _Found(pair, tokenizer, size, package="open_clip_torch")


def _open_clip_image(visual: Any) -> _ReadImage:
    """Return what asks a tower for its features, and let it give those of patches too."""
    if hasattr(visual, "attnpool"):
        return _resnet
    if hasattr(visual, "trunk"):
        return _timm
    visual.output_tokens = True
    return _open_clip_vit


def _open_clip_vit(visual: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    return visual(pixels)


def _resnet(visual: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    x = visual.stem(pixels)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = layer(x)
    return visual.attnpool(x), x.flatten(2).mT


def _timm(visual: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    trunk = visual.trunk
    x = trunk.forward_features(pixels)
    pooled = visual.head(trunk.forward_head(x))
    if x.ndim == 4:
        channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        return pooled, x.flatten(1, 2) if channels_last else x.flatten(2).mT
    return pooled, x[:, trunk.num_prefix_tokens :]


def _open_clip_text(text: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return text(ids)


def _hugging_face_text(text: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    # open_clip's own mask; it gives tokens without the first for some ways of pooling.
    attended = (ids != text.config.pad_token_id).long()
    output = text.transformer(input_ids=ids, attention_mask=attended)
    return text.proj(text.pooler(output, attended)), output.last_hidden_state


def _library_tokenizer(text: Mapping[str, Any], folder: Path | None) -> tuple[Any, int]:
    """Return open_clip's tokenizer of a model, and how many tokens it gives."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    length, options = text.get("context_length", 77), dict(text.get("tokenizer_kwargs") or {})
    name = text.get("hf_tokenizer_name")
    if not name:
        return SimpleTokenizer(context_length=length, **options), length
    mode = text.get("tokenizer_mode")
    own = str(folder or name)
    return HFTokenizer(own, context_length=length, tokenizer_mode=mode, **options), length


class OpenClipTokenizer(Tokenizer):
    """A tokenizer of open_clip, which gives the ids that its models were trained on.

    It is for evaluations, which call it: nothing else of a `Tokenizer` works.

    Args:
        library: open_clip's own.
        context_length: How many ids it gives for a text.
        trim: Leave out what is padding for all texts; the tower does not look at it.
    """

    def __init__(self, library: Any, context_length: int, trim: bool) -> None:
        inner = getattr(library, "tokenizer", library)
        self._library = library
        self._special = torch.tensor(sorted(set(inner.all_special_ids)))
        self._pad: int = getattr(inner, "pad_token_id", 0)
        # Then one of the padding ends the text.
        self._pad_ends = self._pad == getattr(inner, "eos_token_id", None)
        self._trim = trim
        self.added = 0
        self.context_length = context_length

    def __call__(self, captions: Sequence[str]) -> Tokens:
        if not captions:
            return super().__call__(captions)
        ids = self._library(list(captions))
        # What stands before the last token that is no padding is the text's, whatever its id.
        mask = (ids != self._pad).flip(1).cumsum(1).flip(1) > 0
        if self._pad_ends:
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1)
        if self._trim:
            longest = int(mask.sum(1).max())
            ids, mask = ids[:, :longest], mask[:, :longest]
        return Tokens(ids, mask, mask & ~torch.isin(ids, self._special))


def _transformers(weights: Weights, source: str, name: str) -> _Found:
    from transformers import MODEL_MAPPING, AutoConfig

    settings = weights.config or {}
    kind = settings["model_type"]
    if kind not in _TRANSFORMERS:
        raise UsageError(
            f"{name} is a {kind} model of transformers; medfast evaluates pairs of towers of the "
            f"types {', '.join(_TRANSFORMERS)}."
        )
    if weights.normalisation is None:
        raise UsageError(
            f"{name}: preprocessor_config.json is missing, which says by what mean and standard "
            "deviation pixels are normalised; put the one published with the model beside its "
            "config.json."
        )
    folder = pretrained_tokenizer(source)
    if folder is None:
        raise UsageError(
            f"{name} has no tokenizer; put the tokenizer.json published with the model beside its "
            "config.json."
        )
    try:
        with _quiet_transformers():
            config = AutoConfig.for_model(**settings)
            kind_of_model: Any = MODEL_MAPPING[type(config)]
            model, report = kind_of_model.from_pretrained(
                None, config=config, state_dict=weights.tensors, output_loading_info=True
            )
    except Exception as error:  # whatever a damaged configuration leads to
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{name}: transformers cannot build it ({type(error).__name__}: {reason}); get a whole "
            "copy of the model."
        ) from None
    _check(report["missing_keys"], report["unexpected_keys"], name)
    model.float()
    pads = kind == "siglip"
    tokenizer = _tokenizer(folder, config.text_config.max_position_embeddings, name)
    if pads:
        tokenizer = FullLength(tokenizer)
    pair = LibraryModel(
        _ImageTower(
            nn.ModuleList([model.vision_model, _projection(model, "visual")]),
            _transformers_image,
            weights.normalisation,
        ),
        _TextTower(
            nn.ModuleList([model.text_model, _projection(model, "text")]),
            _unmasked_text if pads else _masked_text,
        ),
        model.logit_scale,
    )
    size = _square(config.vision_config.image_size, name)
    return _Found(pair, tokenizer, size, package="transformers")


def _projection(model: Any, side: str) -> nn.Module:
    # SigLIP's towers end in the shared space.
    return getattr(model, f"{side}_projection", nn.Identity())


def _transformers_image(parts: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    tower, projection = parts
    output = tower(pixel_values=pixels)
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    # Class and other tokens stand before the patches.
    return projection(output.pooler_output), output.last_hidden_state[:, -patches:]


def _masked_text(parts: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    tower, projection = parts
    output = tower(input_ids=ids, attention_mask=mask.long())
    return projection(output.pooler_output), output.last_hidden_state


def _unmasked_text(parts: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    tower, projection = parts
    output = tower(input_ids=ids)
    return projection(output.pooler_output), output.last_hidden_state


class FullLength(Tokenizer):
    """Pads every text to the context length, for towers that were trained to see the padding.

    Args:
        tokenizer: Of the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer._inner, tokenizer.context_length)

    def __call__(self, captions: Sequence[str]) -> Tokens:
        tokens = super().__call__(captions)
        more = (0, self.context_length - tokens.ids.shape[1])
        return Tokens(
            F.pad(tokens.ids, more, value=self._inner.pad_token_id),
            F.pad(tokens.mask, more),
            F.pad(tokens.word_mask, more),
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing what it loads."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _load(model: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Load weights, all of them.

    Raises:
        UsageError: some are missing, left over or of another shape.
    """
    own = model.state_dict()
    # A scale or bias may be one number, or a list of one.
    found = {
        key: x.reshape(own[key].shape) if key in own and x.numel() == own[key].numel() == 1 else x
        for key, x in tensors.items()
    }
    try:
        missing, unexpected = model.load_state_dict(found, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1].split())
        raise UsageError(
            f"{name}: the weights do not fit what its settings describe ({reason}); get a whole "
            "copy of the model."
        ) from None
    _check(missing, unexpected, name)


def _check(missing: Sequence[str], unexpected: Sequence[str], name: str) -> None:
    for what, names in (("lack", missing), ("have more than the model,", unexpected)):
        own = sorted(n for n in names if not n.endswith(_BUFFERS))
        if own:
            more = f" and {len(own) - 1} more" if len(own) > 1 else ""
            raise UsageError(
                f"{name}: its weights {what} {own[0]}{more}; get a whole copy of the model."
            )


def _tokenizer(folder: Path, context_length: int, name: str) -> Tokenizer:
    try:
        return Tokenizer.load(folder, context_length)
    except UsageError as error:
        raise UsageError(
            str(error).replace("--tokenizer", f"{name}: the tokenizer of", 1)
        ) from None


def _square(size: Any, name: str) -> int:
    """Return the side of the images."""
    sides = set(size) if isinstance(size, tuple | list) else {size}
    if len(sides) != 1:
        raise UsageError(f"{name} takes images of {list(size)} pixels; medfast's are squares.")
    return int(sides.pop())
