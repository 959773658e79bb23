"""What the methods do to a model: who is trained, and that every implementation trains alike."""

import dataclasses
import itertools
import json

import pytest
import torch

from medfast.config import TrainConfig
from medfast.data import read_split
from medfast.data.loader import Loader
from medfast.data.skipped import SkippedSamples
from medfast.methods import METHODS, method_class
from medfast.models import PRESETS
from medfast.models.pair import build_model
from medfast.run_folder import RunFolder
from medfast.trainer import Trainer

# The default towers, smaller: a step takes milliseconds.
SMALL = dataclasses.replace(
    PRESETS["tiny"],
    image_size=64,
    image_args={**PRESETS["tiny"].image_args, "channels": (8, 16, 24, 32), "stem_width": 8},
    text={**PRESETS["tiny"].text, "hidden_size": 32, "intermediate_size": 64},
    embed_dim=32,
)
# Without ReLU and batch statistics: through those a difference of 1e-7 in the weights grows to one
# of 1e-2 in the loss within 50 steps, whatever the implementation.
SMOOTH = dataclasses.replace(
    SMALL,
    image="vit_tiny_patch16_224",
    image_args={"depth": 1, "embed_dim": 32, "num_heads": 2},
)
HEADS = {"image_projection.weight", "text_projection.weight"}


@pytest.fixture
def trainer(phantom, tokenizer, tmp_path):
    """Return a trainer by its preset and the names of its method and of the implementation."""
    records = read_split("roco", phantom, "train").records

    def make(preset, key, impl):
        config = TrainConfig(
            method=key,
            fused_loss=impl,
            precision="fp32",
            epochs=9,  # of 6 steps
            batch_size=16,
            lr=3e-4,
            warmup=10,
            log_every=1,
            save_frequency=9,
            logs=str(tmp_path),
            name=f"{key}-{impl}",
        )
        torch.manual_seed(0)
        method = method_class(key)(impl)
        model = build_model(preset, tokenizer, method.needs_tokens)
        method.add_heads(model, preset.head_width)
        size, extra = preset.image_size, method.extra
        loader = Loader(records, tokenizer, size, config.batch_size, preset.crop, extra=extra)
        run = RunFolder.create(config)
        return Trainer(
            config=config,
            model=model,
            method=method,
            loader=loader,
            run=run,
            skipped=SkippedSamples(run.skipped, len(records), 0),
            device=torch.device("cpu"),
            validate=lambda: {"metrics": {}, "loss": 0.0},
        )

    return make


@pytest.mark.parametrize("key", METHODS)
def test_everything_that_a_method_uses_is_trained(trainer, key):
    made = trainer(SMALL, key, "auto")
    # The first step leaves out what lies behind a scale that starts at zero.
    for batch in itertools.islice(made.loader.epoch(0), 2):
        made.train_step([batch])
    assert all(p.grad.any() for p in made.method.parameters())
    grads = {name: p.grad for name, p in made.model.named_parameters()}
    assert {name for name, grad in grads.items() if grad is None} == (
        HEADS if key == "filip" else set()
    )
    assert not {name for name, grad in grads.items() if grad is not None and not grad.any()}


@pytest.mark.parametrize("key", ["local", "filip", "sparc"])
def test_fused_and_reference_losses_train_alike_for_50_steps(trainer, key):
    curves = []
    for impl in ("auto", "reference"):
        made = trainer(SMOOTH, key, impl)
        made.fit()
        rows = [json.loads(line) for line in made.run.metrics.read_text().splitlines()]
        curves.append([row["loss"] for row in rows if row["kind"] == "train"])
    fused, reference = curves
    assert len(fused) == 54
    assert fused == pytest.approx(reference, rel=1e-4)
    assert sum(fused[-6:]) < 0.9 * sum(fused[:6])
