"""The parts of a run, from its settings: data, tokenizer, method, model, loader."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from medfast.config import TrainConfig, flag
from medfast.data import distinct, parse_source
from medfast.errors import UsageError

if TYPE_CHECKING:
    import torch

    from medfast.data.loader import Loader
    from medfast.data.mixture import Mixture
    from medfast.data.records import Record
    from medfast.data.tokens import Tokenizer
    from medfast.distributed.processes import Processes
    from medfast.methods.base import Method
    from medfast.models.pair import ImageTextModel
    from medfast.run_folder import RunFolder

log = logging.getLogger(__name__)

# Settings that name weights, and what these are for.
_PRETRAINED: dict[str, Literal["both", "image", "text"]] = {
    "pretrained": "both",
    "pretrained_image": "image",
    "pretrained_text": "text",
}


def data_sources(config: TrainConfig) -> list[tuple[str, Path]]:
    """Return key and folder of each of the run's sources; the phantom is written on first use."""
    sources = [
        ("phantom", phantom_root(config)) if text == "phantom" else parse_source(text)
        for text in config.train_data
    ]
    if len(distinct(sources)) < len(sources):
        raise UsageError(
            f"--train-data must be sources that differ; two of {', '.join(config.train_data)} are "
            "one set. Name each set once; --train-data-weights has one come more often."
        )
    return sources


def phantom_root(config: TrainConfig) -> Path:
    """Return the folder of the phantom data, which is written there on first use."""
    from tqdm import tqdm

    from medfast.data.phantom import cached_phantom

    with tqdm(desc="phantom", unit="image", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            if bar.total is None:
                log.info("writing %d phantom images, once", total)
            bar.total = total
            bar.update(done - bar.n)

        cache = Path(config.cache_dir).expanduser()
        return cached_phantom(cache, pairs=config.phantom_pairs, progress=progress)


def read_pairs(config: TrainConfig, sources: Sequence[tuple[str, Path]], split: str) -> Mixture:
    """Return one split of the run's sources; of the training split what no list excludes."""
    from medfast.data.exclude import excluded_keys, exclusion_file
    from medfast.data.mixture import read_mixture
    from medfast.data.table import Columns

    columns = Columns(config.csv_img_key, config.csv_caption_key, config.csv_separator)
    options = {"csv": {"columns": columns}}
    if split != "train" or config.exclude == "none":
        return read_mixture(sources, split, options=options)
    named = None if config.exclude is None else Path(config.exclude).expanduser()
    found = read_mixture(sources, split, excluded_keys(sources, named), options)
    lists = [named or exclusion_file(root) for _, root in sources]
    left_out = {path for path, count in zip(lists, found.excluded, strict=True) if count}
    for path in dict.fromkeys(lists):
        if path not in left_out and os.path.isfile(path):
            log.warning("the exclusion list %s leaves out no training pair of this run", path)
    return found


def training_loader(
    config: TrainConfig,
    mixture: Mixture,
    tokenizer: Tokenizer,
    method: Method,
    device: torch.device,
    processes: Processes,
) -> Loader:
    """Return this process's loader of a training split; `config.loader` names its kind."""
    from medfast.data.order import Order
    from medfast.data.pipelines import make_loader, pick_loader
    from medfast.data.views import SquareCrop

    preset = config.preset
    short = config.resize_short
    crop = preset.crop if short is None else SquareCrop(preset.image_size / short)
    order = Order(
        *(mixture.sizes, config.batch_size, config.seed),
        weights=config.train_data_weights or None,
        rank=processes.rank,
        world=processes.world,
    )
    return make_loader(
        pick_loader(config.loader, mixture.records),
        *(device, mixture.records, tokenizer, preset.image_size, config.batch_size),
        *(crop, config.seed, config.workers),
        extra=method.extra,
        order=order,
    )


def load_tokenizer(
    config: TrainConfig, method: Method, records: Sequence[Record], run: RunFolder
) -> Tokenizer:
    """Return the run's tokenizer, and keep it: the one it has, a published one, or a new one."""
    from medfast.data.tokens import Tokenizer

    preset = config.preset
    if run.tokenizer.is_dir():
        return Tokenizer.load(run.tokenizer, preset.context_length)
    tokenizer = published_tokenizer(config, method)
    if tokenizer is None:
        captions = (record.caption for record in records if record.caption)
        tokenizer = Tokenizer.train(captions, preset.vocab_size, preset.context_length)
    tokenizer.save(run.tokenizer)
    return tokenizer


def published_tokenizer(config: TrainConfig, method: Method) -> Tokenizer | None:
    """Return the tokenizer that is asked for or belongs to pretrained weights, if any.

    It has a mask token if the method needs one, as one that is trained for a run always has.

    Raises:
        UsageError: it takes fewer tokens than --force-context-length.
    """
    from medfast.data.tokens import Tokenizer

    length = config.preset.context_length
    folder = _tokenizer_folder(config)
    if folder is None:
        return None
    tokenizer = Tokenizer.load(folder, length)
    if config.force_context_length is not None and tokenizer.context_length < length:
        raise UsageError(
            f"--force-context-length must be at most {tokenizer.context_length}, the "
            f"model_max_length of the tokenizer in {folder}; got {length}. Raise it there, in "
            "tokenizer_config.json, if the tower is to learn more positions."
        )
    if method.extra.masked:
        tokenizer.ensure_mask_token()
    return tokenizer


def _tokenizer_folder(config: TrainConfig) -> Path | None:
    if config.tokenizer is not None:
        return Path(config.tokenizer).expanduser()
    weights = config.pretrained_text or config.pretrained
    if weights is None:
        return None
    from medfast.models.pretrained import pretrained_tokenizer

    return pretrained_tokenizer(weights)


def new_method(config: TrainConfig, device: torch.device) -> Method:
    """Return the method, without its heads.

    Raises:
        UsageError: it cannot run with these settings, or not here.
    """
    from medfast.methods import method_class

    cls = method_class(config.method)
    method = cls(config.fused_loss, config.group_positives, config.term_weights)
    method.check_impl(device)
    for tower, is_locked, kept, unlocked in (
        ("image", locks_image(config, method), "groups", config.lock_image_unlocked_groups),
        ("text", config.lock_text, "layers", config.lock_text_unlocked_layers),
    ):
        if unlocked and not is_locked:
            raise UsageError(
                f"--lock-{tower}-unlocked-{kept} is for a locked tower; add --lock-{tower}."
            )
        weights = config.pretrained or getattr(config, f"pretrained_{tower}")
        if is_locked and weights is None and config.resume is None:
            by = (
                f"--lock-{tower}"
                if getattr(config, f"lock_{tower}")
                else f"--method {config.method}"
            )
            raise UsageError(
                f"{by} locks the {tower} tower, whose weights would be random: give --pretrained "
                f"or --pretrained-{tower}."
            )
    return method


def new_model(
    config: TrainConfig,
    method: Method,
    tokenizer: Tokenizer,
    device: torch.device,
    load_weights: bool = True,
) -> ImageTextModel:
    """Return the model of a run on `device`, and give its method its heads there.

    Towers are the same for every method, weights drawn by the seed included.

    Args:
        config: The settings.
        method: What trains the model.
        tokenizer: Captions to ids.
        device: Where to train.
        load_weights: Take the pretrained weights; a run that goes on has its own.

    Raises:
        UsageError: weights do not fit.
    """
    import torch

    from medfast.models.pair import build_model

    torch.manual_seed(config.seed)
    model = build_model(config.preset, tokenizer, method.needs_tokens)
    if load_weights:
        load_pretrained_weights(config, model)
    prepare(config, method, model)
    model.to(device)
    model.to(memory_format=torch.channels_last)
    method.to(device)
    return model


def spread(
    config: TrainConfig, method: Method, model: ImageTextModel, processes: Processes
) -> None:
    """Let the model and the method of `new_model` be trained by several processes.

    Raises:
        UsageError: a tower cannot.
    """
    import torch

    from medfast.distributed import sharding
    from medfast.distributed.batch_norm import synchronize_batch_norm

    if processes.ring is None:
        if config.sharding != "none":
            raise UsageError("--sharding full is for several processes; start them with torchrun.")
        return
    method.ring = processes.ring
    try:
        for module in (model, method):
            synchronize_batch_norm(module, processes.ring)
    except ValueError as error:
        raise UsageError(f"--model {config.model}: {error}") from None
    if config.sharding == "full":
        # Parts are cut from weights that lie row by row.
        model.to(memory_format=torch.contiguous_format)
        sharding.shard(model.units())
    # Dropout of its own; the weights, drawn by the seed alone, are the same everywhere.
    if processes.rank:
        torch.manual_seed(config.seed + processes.rank)


def prepare(config: TrainConfig, method: Method, model: ImageTextModel) -> None:
    """Lock and cast what the settings say, and give the method its heads.

    Raises:
        UsageError: the model has fewer layers than are to be unlocked.
    """
    import torch

    from medfast.models.freezing import lock_image, lock_text

    if locks_image(config, method):
        lock_image(model.image_tower, config.lock_image_unlocked_groups)
    if config.lock_text:
        lock_text(model.text_tower, config.lock_text_unlocked_layers)
    if config.grad_checkpointing:
        model.checkpoint_activations()
    method.add_heads(model, config.preset.head_width)
    if config.precision == "pure_bf16":
        model.cast(torch.bfloat16)
        method.to(torch.bfloat16)


def load_pretrained_weights(config: TrainConfig, model: ImageTextModel) -> None:
    """Load the weights that the settings name, and log what they gave."""
    for name, part in _PRETRAINED.items():
        source = getattr(config, name)
        if source is None:
            continue
        from medfast.models.pretrained import load_pretrained

        loaded = load_pretrained(model, source, part)
        has_words = any(own.startswith("text_tower.") for own in loaded.loaded)
        if has_words and _tokenizer_folder(config) is None:
            raise UsageError(
                f"{flag(name)}: {source} has weights of a text tower, but not the tokenizer by "
                "which they were trained; name its folder with --tokenizer, or load the image "
                "tower alone with --pretrained-image."
            )
        log.info("%s", loaded)


def locks_image(config: TrainConfig, method: Method) -> bool:
    """Return whether the image tower is locked, by the settings or by the method."""
    return config.lock_image or method.locks_image
