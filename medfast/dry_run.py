"""What --dry-run prints: what would run, and what it would cost."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from medfast import parts
from medfast.config import TrainConfig, pairs_of_step
from medfast.data.views import Extra

if TYPE_CHECKING:
    from medfast.methods.base import Method


def describe(config: TrainConfig, method: Method, world: int = 1) -> str:
    """Return data, model, loss terms, cost and settings of a run.

    Args:
        config: The settings.
        method: The method, without heads.
        world: Processes that train together.

    Raises:
        UsageError: something of it cannot be had.
    """
    from torch import nn

    from medfast.cost import estimate
    from medfast.models.pair import ImageTextModel, build_model

    preset = config.preset
    tokenizer = parts.published_tokenizer(config, method)
    if tokenizer is not None:
        model = build_model(preset, tokenizer, method.needs_tokens)
    else:
        model = ImageTextModel(preset, preset.vocab_size, {}, method.needs_tokens)
    parts.load_pretrained_weights(config, model)
    parts.prepare(config, method, model)

    def millions(module: nn.Module, trained: bool = False) -> str:
        count = sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)
        return f"{count / 1e6:.1f} M"

    both = nn.ModuleList([model, method])
    terms = " + ".join(f"{weight:g} {name}" for name, weight in method.weights.items())
    if config.train_data == ("phantom",):
        pairs = config.phantom_pairs - 2 * round(config.phantom_pairs / 10)
    else:
        sources = parts.data_sources(config)
        pairs = len(parts.read_pairs(config, sources, "train").records)
    at_a_time, times = pairs_of_step(config, pairs, world)
    size = at_a_time * times
    steps = pairs // size
    in_parts = f", in {times} parts" if times > 1 else ""
    shared = f", by {world} processes" if world > 1 else ""
    cost = estimate(config, model, method)
    memory = ", ".join(f"{name} {_megabytes(part)}" for name, part in cost.memory.items())
    lines = [
        f"method    {config.method}: loss = {terms}, implementation {config.fused_loss}",
        f"beyond the main view and the caption: {_beyond(method)}",
        f"model     {config.model}: {preset.image} at {preset.image_size} px, "
        f"{preset.text['model_type']} of {preset.context_length} tokens, D {preset.embed_dim}",
        f"parameters {millions(both)}, trained {millions(both, trained=True)} (image tower "
        f"{millions(model.image_tower)}, text tower {millions(model.text_tower)} "
        f"at {model.text_tower.vocab_size} tokens, heads {millions(method)})",
        f"compute   {cost.flops_per_pair / 1e9:.2f} GFLOP per pair in towers and heads, forward "
        f"and backward, at {preset.context_length} tokens",
        f"memory    about {_megabytes(cost.total_memory)} ({memory})",
        f"data      {' '.join(config.train_data)}: {pairs} training pairs",
        f"training  {config.epochs} epochs of {steps} steps of {size} pairs{in_parts}{shared}",
    ]
    lines += [f"  {k}: {v}" for k, v in dataclasses.asdict(config).items()]
    return "\n".join(lines)


def _beyond(method: Method) -> str:
    """Return what a method needs of data and memory that `clip` does not."""
    extra: Extra = method.extra
    found = []
    if extra.images:
        flips = "flipped half the time" if extra.flip else "never flipped"
        found.append(f"{extra.images} augmented view(s) of the image, {flips}")
    if extra.texts:
        found.append(f"{extra.texts} view(s) of the caption, words dropped or swapped")
    if extra.masked:
        found.append("the caption with tokens masked")
    if method.needs_tokens:
        found.append("projections of patches and words")
    heads = [
        name for name, module in method.named_children() if any(True for _ in module.parameters())
    ]
    if heads:
        found.append(f"heads ({', '.join(heads)})")
    buffers = sum(x.nbytes for module in method.children() for x in module.buffers())
    if buffers:
        found.append(f"state of {_megabytes(buffers)}")
    if method.locks_image:
        found.append("a locked, pretrained image tower")
    return "; ".join(found) or "nothing"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"
