"""Which weights of a source become which of the model, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor

from medfast.errors import UsageError
from medfast.models.pair import ImageTextModel
from medfast.models.presets import PRESETS
from medfast.models.pretrained import from_medfast, from_open_clip, from_timm, from_transformers
from medfast.models.pretrained.files import Weights, pretrained_tokenizer, read
from medfast.models.pretrained.tower import Tower

Part = Literal["both", "image", "text"]

FLAGS = {"both": "--pretrained", "image": "--pretrained-image", "text": "--pretrained-text"}
_FORMATS = (
    "transformers' CLIP and BERT, open_clip's models, timm's image models and medfast's own runs"
)
_LOCAL = {"image": "patch_projection", "text": "token_projection"}
_POOLS = {"clip_text_model": "argmax", "bert": "mean_pooler"}
_VOCABULARY = ("embeddings.token_embedding.weight", "embeddings.word_embeddings.weight")
_POSITIONS = ("embeddings.position_embedding.weight", "embeddings.position_embeddings.weight")
# Tables of which a model may have fewer or more rows than a source.
_TABLES = (*_VOCABULARY, *_POSITIONS, "embeddings.token_type_embeddings.weight")


@dataclass(frozen=True)
class Loaded:
    """What a set of weights gave a model, by parameter name.

    Attributes:
        source: As the user gave it.
        format: What it is, in words.
        loaded: Names in the model of what is as in the source.
        fitted: Names in the model of what was changed to fit: position embeddings of images for
            another resolution, those of text cut or followed by new ones, a vocabulary with new
            rows after those of the source.
        new: Names in the model, of the part asked for, of what the source did not give.
        skipped: Names in the source of what was not used.
        notes: What else the user should know, in sentences.
    """

    source: str
    format: str
    loaded: tuple[str, ...]
    fitted: tuple[str, ...]
    new: tuple[str, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [f"{self.format} weights of {self.source}"]
        for kind in ("loaded", "fitted", "new", "skipped"):
            names = getattr(self, kind)
            rows.append(f"  {kind:<8}{len(names):>4}  {', '.join(_folded(names))}".rstrip())
        return "\n".join([*rows, *(f"  note: {note}" for note in self.notes)])


@dataclass
class _Fit:
    """How one tower of a source fits that of a model.

    Attributes:
        values: By full name in the model; fewer rows than there are the first ones.
        fitted: Of these, the names of what was changed.
        used: Names in the source.
        shapes: What does not fit: shapes, settings, and names that only one side has.
        vocabulary: Rows in the source and fewer in the model, of a table of tokens.
        notes: What else the user should know.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    fitted: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    vocabulary: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)

    def take(self, name: str, value: Tensor, names: Iterable[str], changed: bool = False) -> None:
        """Note a value for `name`, made of what has `names` in the source."""
        self.values[name] = value
        self.used.update(names)
        if changed:
            self.fitted.add(name)


def load_pretrained(model: ImageTextModel, source: str, part: Part = "both") -> Loaded:
    """Load published weights, or those of an earlier run, into a model.

    Position embeddings of images are resampled to the model's grid. Position embeddings of text are
    cut, or stay in place with new ones after them; so do the tokens of a vocabulary that grew.
    Everything else of a tower must fit, or the model is left as it was.

    Args:
        model: Its weights are changed in place.
        source: A local file or folder, else the name of a model on the Hugging Face hub.
        part: "both" for towers, projections and logit scale; else one tower and its projection.

    Returns:
        What was loaded, and what was not.

    Raises:
        UsageError: the source cannot be read, holds nothing of the part, or does not fit.
    """
    weights = read(source, FLAGS[part])
    found = _find(weights, model, part)
    towers = {side: tower for side, tower in found.items() if part in ("both", side)}
    if not towers:
        raise UsageError(_nothing_found(weights, found, part))
    fits = {side: _fit(tower, model, side) for side, tower in towers.items()}
    if any(fit.problems for fit in fits.values()):
        raise UsageError(_misfit(weights, towers, fits))
    for fit in fits.values():
        if fit.vocabulary:
            raise UsageError(_other_tokenizer(weights, source, *fit.vocabulary))
    merged = _merged(fits)
    scale = weights.tensors.get("logit_scale")
    # It belongs to the space that both projections share.
    if scale is not None and scale.numel() == 1 and _projections(merged) == 2 and part == "both":
        merged.take("logit_scale", scale.reshape(()), ["logit_scale"])
    state = model.state_dict()
    with torch.no_grad():
        for name, value in merged.values.items():
            target = state[name] if value.shape == state[name].shape else state[name][: len(value)]
            target.copy_(value)
    if "image" in towers:
        merged.notes.extend(_pixels(weights, model))
    asked = [name for name in state if part == "both" or _side(name) == part]
    return Loaded(
        source,
        " and ".join(dict.fromkeys(tower.format for tower in towers.values())),
        tuple(name for name in merged.values if name not in merged.fitted),
        tuple(name for name in merged.values if name in merged.fitted),
        tuple(name for name in asked if name not in merged.values),
        tuple(name for name in weights.tensors if name not in merged.used),
        tuple(merged.notes),
    )


def _find(weights: Weights, model: ImageTextModel, part: Part) -> dict[str, Tower]:
    """Return the towers of a source, "image" and "text", whatever its format."""
    if any(name.startswith(("image_tower.", "text_tower.")) for name in weights.tensors):
        pairs = [from_medfast.find(weights)]
    else:
        pairs = [from_open_clip.find(weights), from_transformers.find(weights)]
        if not any(tower for pair in pairs for tower in pair):
            pairs.append((from_timm.find(weights, model.image_tower.trunk), None))
    found = {}
    for number, side in enumerate(("image", "text")):
        tower = next((pair[number] for pair in pairs if pair[number] is not None), None)
        if tower is not None:
            found[side] = tower
    return found


def _fit(tower: Tower, model: ImageTextModel, side: str) -> _Fit:
    """Return how a tower fits the model's; nothing is changed."""
    fit = _Fit()
    trunk = model.get_submodule(f"{side}_tower.trunk")
    # The name of transformers' CLIP before version 5 stands before some of ours.
    own = {name.removeprefix("text_model."): name for name in trunk.state_dict()}
    state = trunk.state_dict()
    found = from_timm.fitted(tower.weights, trunk) if side == "image" else tower.weights
    alone = []
    for name, inner in own.items():
        full, shape, weight = f"{side}_tower.trunk.{inner}", state[inner].shape, found.get(name)
        if weight is None:
            # Counters of batch norms are younger than some weights.
            if not name.endswith("num_batches_tracked"):
                alone.append(f"{full} {list(shape)} only the model has")
            continue
        value, before = weight.tensor, tower.weights.get(name, weight).tensor
        if name in _TABLES and value.shape[1:] == shape[1:]:
            if name in _VOCABULARY and len(value) > len(state[inner]):
                fit.vocabulary = len(value), len(state[inner])
            value = value[: len(state[inner])]
        elif value.shape != shape:
            fit.problems.append(f"{full} is {list(value.shape)}, the model's {list(shape)}")
        fit.take(full, value, weight.names, changed=before.shape != shape)
    for name, weight in found.items():
        if name not in own and not (side == "image" and name.startswith(from_timm.HEADS)):
            shape = weight.tensor.shape
            alone.append(f"{side}_tower.trunk.{name} {list(shape)} only the weights have")
    fit.problems += alone
    _fit_settings(fit, tower, trunk, side)
    _fit_projections(fit, tower, model, side)
    return fit


def _fit_settings(fit: _Fit, tower: Tower, trunk: Any, side: str) -> None:
    """Note settings of a tower that no shape shows."""
    if side == "image":
        activation, heads = from_timm.layer_settings(trunk)
    else:
        activation, heads = trunk.config.hidden_act, trunk.config.num_attention_heads
    pairs = (("activation", tower.activation, activation), ("heads", tower.heads, heads))
    # First, so that they are seen.
    fit.problems[:0] = [
        f"{what} of the {side} tower: {theirs}, the model's {own}"
        for what, theirs, own in pairs
        if theirs is not None and own is not None and theirs != own
    ]


def _fit_projections(fit: _Fit, tower: Tower, model: ImageTextModel, side: str) -> None:
    """Take the projections that fit; those that do not are no error."""
    trunk: Any = model.get_submodule(f"{side}_tower.trunk")
    own = from_timm.pooling(trunk) if side == "image" else _POOLS.get(trunk.config.model_type)
    projections = ((f"{side}_projection", tower.projection), (_LOCAL[side], tower.local_projection))
    for name, weight in projections:
        layer = getattr(model, name)
        if weight is None or layer is None:
            continue
        if tower.pool is not None and own is not None and tower.pool != own:
            fit.notes.append(
                f"{weight.names[0]} is left out: it is for features pooled as {tower.pool!r}, the "
                f"model's {side} tower has {own!r}."
            )
        elif weight.tensor.shape != layer.weight.shape:
            fit.notes.append(
                f"{weight.names[0]} {list(weight.tensor.shape)} is left out: the model's is "
                f"{list(layer.weight.shape)}."
            )
        else:
            fit.take(f"{name}.weight", weight.tensor, weight.names)


def _merged(fits: dict[str, _Fit]) -> _Fit:
    merged = _Fit()
    for fit in fits.values():
        merged.values |= fit.values
        merged.fitted |= fit.fitted
        merged.used |= fit.used
        merged.notes += fit.notes
    return merged


def _projections(fit: _Fit) -> int:
    return sum(f"{side}_projection.weight" in fit.values for side in ("image", "text"))


def _side(name: str) -> str:
    """Return whether a parameter of the model is of the "image", the "text" or neither."""
    image = name.startswith(("image_", "patch_"))
    return "image" if image else "text" if name.startswith(("text_", "token_")) else ""


def _pixels(weights: Weights, model: ImageTextModel) -> list[str]:
    """Return the sentence on images that these weights saw normalised in another way."""
    if weights.normalisation is None:
        return []
    own = [(getattr(model.image_tower, kind).flatten() / 255).tolist() for kind in ("mean", "std")]
    pairs = zip(weights.normalisation, own, strict=True)
    if all(abs(a - b) < 1e-3 for theirs, ours in pairs for a, b in zip(theirs, ours, strict=True)):
        return []
    mean, std = ([round(x, 3) for x in values] for values in weights.normalisation)
    return [
        f"the weights are for pixels of mean {mean} and standard deviation {std}, the model takes "
        f"away {[round(x, 3) for x in own[0]]} and divides by {[round(x, 3) for x in own[1]]}."
    ]


def _nothing_found(weights: Weights, found: dict[str, Tower], part: Part) -> str:
    if found:
        (side, tower), *_ = found.items()
        return (
            f"{weights.source} is {tower.format} with the {side} tower alone; there is no {part} "
            "tower in it, give other weights for that."
        )
    names = ", ".join(list(weights.tensors)[:3])
    return (
        f"{weights.source}: its {len(weights.tensors)} tensors ({names}, ...) are of no known "
        f"format; known are {_FORMATS}."
    )


def _misfit(weights: Weights, towers: dict[str, Tower], fits: dict[str, _Fit]) -> str:
    problems = [problem for fit in fits.values() for problem in fit.problems]
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    fitting = [name for name in PRESETS if _fits_preset(towers, name)]
    remedy = (
        f"Use --model {' or '.join(fitting)}"
        if fitting
        else f"None of medfast's models fits ({', '.join(PRESETS)}); give other weights"
    )
    good = [side for side, fit in fits.items() if not fit.problems]
    if good:
        remedy += f", or load the {good[0]} tower alone with {FLAGS[good[0]]}"
    return (
        f"{weights.source}: the weights ({next(iter(towers.values())).format}) do not fit the "
        f"model: {'; '.join(problems[:3])}{more}. {remedy}."
    )


def _fits_preset(towers: dict[str, Tower], name: str) -> bool:
    tables = [towers["text"].weights.get(n) for n in _VOCABULARY] if "text" in towers else []
    rows = [len(table.tensor) for table in tables if table is not None]
    with torch.device("meta"):
        model = ImageTextModel(PRESETS[name], max([PRESETS[name].vocab_size, *rows]), {})
    return not any(_fit(tower, model, side).problems for side, tower in towers.items())


def _other_tokenizer(weights: Weights, source: str, theirs: int, own: int) -> str:
    folder = pretrained_tokenizer(source)
    which = f"--tokenizer {folder}" if folder else "--tokenizer with the folder published with them"
    return (
        f"{weights.source}: its text tower knows {theirs} tokens, the tokenizer {own}; the weights "
        f"belong to another tokenizer, use {which}."
    )


def _folded(names: tuple[str, ...], most: int = 12) -> list[str]:
    """Return at most so many groups of names, as "image_tower.trunk.blocks.* (144)"."""
    groups: dict[str, list[str]] = {}
    for depth in range(max((name.count(".") for name in names), default=0) + 1, 0, -1):
        groups = {}
        for name in names:
            # Layers are never told apart.
            head = list(takewhile(lambda part: not part.isdigit(), name.split(".")))[:depth]
            groups.setdefault(".".join(head), []).append(name)
        if len(groups) <= most:
            break
    shown = [
        inner[0] if len(inner) == 1 else f"{head}.* ({len(inner)})"
        for head, inner in groups.items()
    ]
    return shown if len(shown) <= most else [*shown[:most], f"and {len(shown) - most} more"]
