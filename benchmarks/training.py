"""Trainers of one shape on the same random pairs: medfast's, and open_clip's with its own step."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from medfast.config import TrainConfig
from medfast.data.loader import Batch, Loader
from medfast.data.skipped import SkippedSamples
from medfast.data.tokens import Tokenizer
from medfast.device import forget_peak_memory, has_bf16, peak_memory
from medfast.models import PRESETS, Preset
from medfast.models.pair import ImageTextModel
from medfast.models.pretrained import load_pretrained
from medfast.parts import new_method, prepare
from medfast.run_folder import RunFolder
from medfast.trainer import Trainer

# Words of the shortest caption and the mean over all; radiology captions are about this long.
_SHORTEST, _MEAN_WORDS = 4, 22
# open_clip's own tokenizers end with these; the presets' pooling looks for the last of them.
_SPECIAL = {"bos_token_id": -2, "eos_token_id": -1}

# Takes the pairs of some steps and trains on them; returns the loss of each.
Steps = Callable[[Sequence["Pairs"]], list[float]]


@dataclass(frozen=True)
class Pairs:
    """One batch, as each trainer's own loader would give it.

    Attributes:
        batch: medfast's, whose images are uint8; its captions are open_clip's.
        images: open_clip's: normalised, fp32 [B, 3, H, W].
        texts: open_clip's: captions padded with 0 to the context length, int64 [B, T].
    """

    batch: Batch
    images: Tensor
    texts: Tensor

    def to(self, device: torch.device) -> Pairs:
        """Return the pairs on `device`."""
        texts = self.texts.to(device)
        return Pairs(self.batch.to(device), self.images.to(device), texts)


def random_pairs(preset: Preset, size: int, count: int) -> list[Pairs]:
    """Return `count` batches of `size` random images, with random words in captions of any length.

    Args:
        preset: Sizes of images, captions and vocabulary.
        size: Pairs of a batch.
        count: Batches.
    """
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(x).view(3, 1, 1) * 255 for x in (preset.mean, preset.std))
    longest = preset.context_length - 2
    found = []
    for _ in range(count):
        shape = (size, preset.image_size, preset.image_size, 3)
        pixels = torch.randint(256, shape, generator=generator).byte().permute(0, 3, 1, 2)
        # As skewed as lengths of captions are.
        spread = torch.empty(size).exponential_(1 / (_MEAN_WORDS - _SHORTEST), generator=generator)
        lengths = (_SHORTEST + spread).long().clamp(max=longest)
        place = torch.arange(preset.context_length)
        words = torch.randint(1, preset.vocab_size - 2, (size, len(place)), generator=generator)
        words[:, 0] = preset.vocab_size + _SPECIAL["bos_token_id"]
        end = place == lengths[:, None] + 1
        words[end] = preset.vocab_size + _SPECIAL["eos_token_id"]
        texts = words.where(place <= lengths[:, None] + 1, 0)
        mask = texts != 0
        inner = (place > 0) & (place <= lengths[:, None])
        numbers = torch.arange(size)
        batch = Batch(pixels, texts, mask, inner, group=numbers, index=numbers)
        found.append(Pairs(batch, ((pixels - mean) / std).contiguous(), texts))
    return found


class _Vocabulary:
    """What a model asks of its tokenizer."""

    added = 0

    def __init__(self, size: int) -> None:
        self.size = size
        ids = {name: size + offset for name, offset in _SPECIAL.items()}
        self.special_ids = {"pad_token_id": 0, **ids}

    def __len__(self) -> int:
        return self.size


class _NoLoader:
    """The length of an epoch, which a trainer plans with; the batches come from elsewhere."""

    def __len__(self) -> int:
        return 1


def settings(model: str, method: str, impl: str, device: torch.device) -> TrainConfig:
    """Return what both trainers train with."""
    precision: Any = "amp_bf16" if has_bf16(device) else "fp32"
    return TrainConfig(method=method, model=model, fused_loss=cast(Any, impl), precision=precision)


def build(config: TrainConfig, device: torch.device) -> tuple[ImageTextModel, Any]:
    """Return medfast's model of a preset, and open_clip's with the same weights.

    Where open_clip has the shape, as for ViT-B/16, its model is its own. Else it is its model class
    around the preset's image tower and a text tower of transformers, which it supports as well.
    """
    torch.manual_seed(0)
    preset = config.preset
    vocabulary = cast(Tokenizer, _Vocabulary(preset.vocab_size))
    method = new_method(config, device)
    own = ImageTextModel(
        preset, len(vocabulary), vocabulary.special_ids, token_features=method.needs_tokens
    )
    theirs = _open_clip_named(own) if config.model == "vit_b16_clip" else _open_clip_around(own)
    return own, theirs.to(device)


def _open_clip_named(own: ImageTextModel) -> Any:
    """Return open_clip's own ViT-B/16, whose weights medfast's model takes over."""
    import open_clip
    from safetensors.torch import save_file

    theirs = open_clip.create_model("ViT-B-16", output_dict=True)
    with tempfile.TemporaryDirectory() as folder:
        model_config = {"model_cfg": open_clip.get_model_config("ViT-B-16"), "preprocess_cfg": {}}
        Path(folder, "open_clip_config.json").write_text(json.dumps(model_config))
        save_file(theirs.state_dict(), Path(folder, "open_clip_model.safetensors"))
        load_pretrained(own, folder)
    return theirs


def _open_clip_around(own: ImageTextModel) -> Any:
    """Return open_clip's model class around copies of the preset's towers."""
    from open_clip.model import CustomTextCLIP

    size = own.image_projection.out_features
    image = {"timm_model_name": "resnet10t", "timm_pool": "", "timm_proj": "linear"}
    with tempfile.TemporaryDirectory() as folder:
        own.text_tower.trunk.config.save_pretrained(folder)
        text = {"hf_model_name": folder, "hf_model_pretrained": False, "hf_proj_type": "linear"}
        theirs = CustomTextCLIP(
            size,
            vision_cfg=image,
            text_cfg={**text, "hf_pooler_type": "mean_pooler"},
            output_dict=True,
        )
    theirs.visual.trunk = copy.deepcopy(own.image_tower.trunk)
    theirs.visual.head.proj = copy.deepcopy(own.image_projection)
    theirs.text.transformer = copy.deepcopy(own.text_tower.trunk)
    theirs.text.proj = copy.deepcopy(own.text_projection)
    return theirs


def medfast_steps(config: TrainConfig, model: ImageTextModel, device: torch.device) -> Steps:
    """Return medfast's steps on a model, which they train."""
    method = new_method(config, device)
    prepare(config, method, model)
    model.to(device).to(memory_format=torch.channels_last)
    model.train()
    run = RunFolder(Path("nowhere"))
    trainer = Trainer(
        config=config,
        model=model,
        method=method.to(device),
        loader=cast(Loader, _NoLoader()),
        run=run,
        skipped=SkippedSamples(run.skipped, 1, 0.0),
        device=device,
        validate=dict,
    )
    for group in trainer.optimizer.param_groups:
        group["lr"] = config.lr

    def steps(pairs: Sequence[Pairs]) -> list[float]:
        found = []
        for one in pairs:
            losses, _ = trainer.train_step([one.batch])
            found.append(torch.stack(list(losses.values())).sum())
        return [loss.item() for loss in found]

    return steps


class _Data:
    """An epoch for open_clip's trainer."""

    def __init__(self, pairs: Sequence[Pairs]) -> None:
        self.pairs = pairs
        self.num_batches = len(pairs)
        self.num_samples = sum(len(one.texts) for one in pairs)
        self.dataloader = self

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((one.images, one.texts) for one in self.pairs)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: every epoch has the pairs of its own call."""


def open_clip_steps(config: TrainConfig, model: Any, device: torch.device) -> Steps:
    """Return open_clip's steps, those of its training command, on a model."""
    from open_clip import create_loss
    from open_clip_train.train import train_one_epoch

    arguments = Namespace(
        **{"model": config.model, "precision": config.precision, "accum_freq": 1},
        **{"device": str(device), "batch_size": 0, "grad_clip_norm": config.grad_clip_norm},
        **{"rank": 0, "world_size": 1, "local_loss": False, "gather_with_grad": False},
        **{"siglip": False, "horovod": False, "distill": False, "skip_scheduler": True},
        **{"wandb": False, "loss_dist_impl": None, "log_every_n_steps": 1},
    )
    # Without a scale the log would have nothing to tell; what it is not told costs it nothing.
    logging.getLogger().setLevel(logging.WARNING)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.wd},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    loss = create_loss(arguments)

    def steps(pairs: Sequence[Pairs]) -> list[float]:
        found: list[float] = []

        def add_scalar(name: str, value: float, step: int) -> None:
            if name == "train/loss":
                found.append(value)

        arguments.batch_size = len(pairs[0].texts)
        train_one_epoch(
            *(model, {"train": _Data(pairs)}, loss),
            epoch=0,
            optimizer=optimizer,
            scaler=None,
            scheduler=None,
            dist_model=None,
            args=arguments,
            tb_writer=Namespace(add_scalar=add_scalar),
        )
        return found

    return steps


def peak(variant: str, model: str, method: str, size: int, device: str) -> int:
    """Return the most bytes that three steps take above the model and the pairs.

    Args:
        variant: "open_clip", or the implementation of medfast's losses.
        model: The preset.
        method: Key of `METHODS`.
        size: Pairs of a batch.
        device: "cpu" or "cuda".
    """
    place = torch.device(device)
    steps = make(variant, model, method, place)
    pairs = [one.to(place) for one in random_pairs(PRESETS[model], size, 3)]
    before = forget_peak_memory(place)
    steps(pairs)
    return peak_memory(place) - before


def make(variant: str, model: str, method: str, device: torch.device) -> Steps:
    """Return the steps of a variant, as `peak` names them, from the weights that all begin with."""
    impl = "auto" if variant == "open_clip" else variant
    config = settings(model, method, impl, device)
    own, theirs = build(config, device)
    if variant == "open_clip":
        return open_clip_steps(config, theirs, device)
    return medfast_steps(config, own, device)
