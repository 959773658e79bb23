"""Every loss term can be driven to its floor on one batch: its gradient leads there."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from medfast.config import TrainConfig
from medfast.data import read_split
from medfast.data.loader import Loader
from medfast.methods import METHODS, method_class
from medfast.models import PRESETS
from medfast.models.pair import build_model
from medfast.optimizers import build_optimizer
from medfast.step import Step

# No batch norm in the towers, and steps of milliseconds.
SMOOTH = dataclasses.replace(
    PRESETS["tiny"],
    image="vit_tiny_patch16_224",
    image_size=64,
    image_args={"depth": 1, "embed_dim": 32, "num_heads": 2},
    text={**PRESETS["tiny"].text, "hidden_size": 32, "intermediate_size": 64},
    embed_dim=32,
    head_width=64,
)
PAIRS = 8
# The least NT-Xent has the partner's cosine at 1 and the other images at the corners of a simplex,
# at -1 / (PAIRS - 1), over two views each; it is 1.5e-4 for 8 images at the temperature 0.1.
SIMPLEX = math.log1p(2 * (PAIRS - 1) * math.exp(-(1 + 1 / (PAIRS - 1)) / 0.1))


@pytest.fixture(scope="module")
def records(phantom):
    return read_split("roco", phantom, "train").records[:PAIRS]


def overfit(records, tokenizer, key, steps, lr=3e-3, weights=None):
    """Return the loss terms before and after some steps on one batch."""
    torch.manual_seed(0)
    method = method_class(key)(weights=weights)
    model = build_model(SMOOTH, tokenizer, method.needs_tokens)
    method.add_heads(model, SMOOTH.head_width)
    config = TrainConfig(method=key, lr=lr, wd=0.0)
    optimizer = build_optimizer(config, nn.ModuleList([model, method]).parameters())
    step = Step(model.train(), method.train(), torch.device("cpu"), "fp32")
    loader = Loader(records, tokenizer, SMOOTH.image_size, PAIRS, crop=0.8, extra=method.extra)
    batch = next(loader.epoch(0))
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses = step.backward([batch])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.clamp_logit_scale()
        found.append({name: loss.item() for name, loss in losses.items()})
    return found


# Most that a term may cost after the last step of training all terms of its method at once.
FLOORS = {
    # Pairs win at a cosine of 1 against others below it, at a scale of up to 100: 0 but for
    # rounding.
    "clip": 0.01,
    "multi_view": 0.05,
    "nearest": 0.05,
    "filip": 0.01,
    # Scores of a pair and of others may differ by 2 * 5 * 10 = 100.
    "local": 0.01,
    # Words that occur twice in a caption are told apart by their places.
    "fine": 0.1,
    "mlm": 0.1,
    "simclr": SIMPLEX + 0.01,
    # Features of images and captions agree.
    "cross_modal": 0.05,
    "in_modal": 0.05,
}
# Alone, in few steps: others hold it back while they share the towers.
ALONE = [("declip", "simsiam", 150), ("cyclip", "cross_modal", 40), ("cyclip", "in_modal", 40)]
# A prediction is the projection of the other view: the cosine of every pair is 1.
ALONE_FLOORS = {"simsiam": (-1.0, 0.08), "cross_modal": (0.0, 1e-4), "in_modal": (0.0, 1e-4)}


@pytest.mark.parametrize("key", METHODS)
def test_all_terms_reach_their_floor_together(records, tokenizer, key):
    # Agreement of image and text features slows down their contrast.
    steps = 200 if key == "cyclip" else 110
    first, *_, last = overfit(records, tokenizer, key, steps)
    for name, value in last.items():
        if name == "simsiam":
            assert value < -0.7
            continue
        assert value < FLOORS[name] < first[name], f"{name}: {first[name]} to {value}"
    if key == "slip":
        assert last["simclr"] >= SIMPLEX


@pytest.mark.parametrize(("key", "term", "steps"), ALONE)
def test_a_term_alone_reaches_its_floor(records, tokenizer, key, term, steps):
    weights = {name: float(name == term) for name in method_class(key).terms}
    first, *_, last = overfit(records, tokenizer, key, steps, 4e-3, weights)
    floor, within = ALONE_FLOORS[term]
    assert floor - 1e-6 <= last[term] < floor + within
    assert first[term] > floor + 10 * within
