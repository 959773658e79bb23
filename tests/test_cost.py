"""What --dry-run says of a step, beside what the step does."""

import dataclasses

import pytest
import torch
from torch import nn

from medfast import parts
from medfast.config import TrainConfig
from medfast.cost import estimate, model_flops
from medfast.device import autocast
from medfast.methods import method_class
from medfast.models import PRESETS
from medfast.models.pair import ImageTextModel

VIT = dataclasses.replace(
    PRESETS["tiny"],
    image="vit_tiny_patch16_224",
    image_size=64,
    image_args={"depth": 3, "embed_dim": 64, "num_heads": 2},
    text={**PRESETS["tiny"].text, "hidden_size": 64, "intermediate_size": 128},
    context_length=16,
    vocab_size=100,
    embed_dim=32,
    head_width=32,
)


@pytest.fixture
def cost(monkeypatch):
    """Return the cost of a step of a small ViT by the settings of the run."""
    monkeypatch.setitem(PRESETS, "small", VIT)

    def of(method="clip", **settings):
        config = TrainConfig(
            **{"model": "small", "method": method, "batch_size": 8, "precision": "fp32"} | settings
        )
        made = method_class(method)()
        torch.manual_seed(0)
        model = ImageTextModel(VIT, VIT.vocab_size, {}, made.needs_tokens)
        parts.prepare(config, made, model)
        return estimate(config, model, made), model, made, config

    return of


def _linear_flops(module, tokens):
    """Return the FLOPs of the linear layers of a tower for one sample, forward."""
    return sum(2 * m.weight.numel() * tokens for m in module.modules() if isinstance(m, nn.Linear))


def test_flops_are_those_of_the_layers(cost):
    found, model, _, _ = cost()
    image = _linear_flops(model.image_tower, 17) + 2 * 3 * 16 * 16 * 64 * 16
    text = _linear_flops(model.text_tower, 16)
    # Scores and their products with the values, in each layer.
    attention = 4 * 64 * (3 * 17**2 + 2 * 16**2)
    forward = image + text + attention + 2 * 2 * 64 * 32
    # The backward has two products for each, none for the pixels, and scores attention again.
    pixels, again = 2 * 3 * 16 * 16 * 64 * 16, attention / 2
    assert found.flops_per_pair == pytest.approx(3 * forward - pixels + again, rel=0.01)


def test_a_second_pass_costs_another_forward(cost):
    once, twice = cost()[0], cost(accum_freq=4)[0]
    assert twice.flops_per_pair / once.flops_per_pair == pytest.approx(4 / 3, rel=0.02)
    assert twice.memory["activations"] == pytest.approx(once.memory["activations"])
    assert twice.memory["features"] == pytest.approx(3 * 4 * once.memory["features"])
    assert twice.memory["input"] == 4 * once.memory["input"]


def test_activations_are_those_that_a_step_keeps(cost):
    found, model, _, config = cost("local")
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    ids = torch.randint(4, 100, (8, 16))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        autocast(config.precision, torch.device("cpu")),
    ):
        features = model(images, ids, torch.ones_like(ids, dtype=torch.bool))
    assert features.image.requires_grad
    assert found.memory["activations"] == pytest.approx(sum(kept.values()), rel=0.02)


def test_what_is_locked_costs_neither_gradients_nor_activations(cost):
    free, locked = cost()[0], cost(lock_image=True, lock_text=True)[0]
    assert locked.memory["weights"] == free.memory["weights"]
    assert locked.memory["gradients"] == 2 * 64 * 32 * 4 + 4
    assert locked.memory["optimiser"] == 2 * locked.memory["gradients"]
    assert locked.memory["activations"] < 0.05 * free.memory["activations"]
    assert locked.flops_per_pair < 0.4 * free.flops_per_pair


def test_checkpointing_trades_activations_for_a_forward(cost):
    free, spare = cost()[0], cost(grad_checkpointing=True)[0]
    assert spare.memory["activations"] < 0.6 * free.memory["activations"]
    assert 1.2 < spare.flops_per_pair / free.flops_per_pair < 1.4


@pytest.mark.parametrize(("method", "least"), [("slip", 1.8), ("declip", 1.5), ("cyclip", 1.0)])
def test_more_views_cost_more(cost, method, least):
    ratio = cost(method)[0].flops_per_pair / cost()[0].flops_per_pair
    assert least <= ratio < least + 1.5


def test_estimating_leaves_no_gradient_and_no_randomness_behind(cost):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found, model, method, config = cost("declip")
    state = torch.get_rng_state()
    estimate(config, model, method)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(before, state)  # the model was drawn
    assert all(p.grad is None for p in (*model.parameters(), *method.parameters()))
    assert found.total_memory == sum(found.memory.values())


@pytest.fixture
def needed(monkeypatch):
    """Return what a step of a small ViT has to compute, by the settings of the run."""
    monkeypatch.setitem(PRESETS, "small", VIT)

    def of(method="clip", tokens=16, words=16, **settings):
        config = TrainConfig(
            **{"model": "small", "method": method, "fused_loss": "reference"} | settings
        )
        made = method_class(method)(config.fused_loss)
        model = ImageTextModel(VIT, VIT.vocab_size, {}, made.needs_tokens)
        parts.prepare(config, made, model)
        return model_flops(config, model, made, tokens, words), model

    return of


def test_what_a_step_has_to_compute_is_counted_once(needed):
    found, model = needed()
    pixels = 2 * 3 * 16 * 16 * 64 * 16
    image, text = _linear_flops(model.image_tower, 17) + pixels, _linear_flops(model.text_tower, 16)
    attention = 4 * 64 * (3 * 17**2 + 2 * 16**2)
    towers = 3 * (image + text + attention + 2 * 2 * 64 * 32) - pixels
    # Logits and their two gradients, 32 wide: of all pairs by all.
    assert found.per_two_pairs == pytest.approx(3 * 2 * 32, rel=0.01)
    assert found.per_pair == pytest.approx(towers, rel=0.01)
    assert found.constant == pytest.approx(0, abs=1)
    assert found.of_step(8, 32) == pytest.approx(8 * found.per_pair + 256 * found.per_two_pairs)


@pytest.mark.parametrize(
    ("method", "products"),
    [
        # Words by patches, and what the words see; four more tables of cosines.
        ("local", 2 * 16 * 16),
        ("cyclip", 4),
    ],
)
def test_a_loss_needs_the_products_of_its_definition_for_each_two_pairs(needed, method, products):
    more = needed(method)[0].per_two_pairs - needed()[0].per_two_pairs
    # Each is 32 wide and has two gradients.
    assert more == pytest.approx(products * 3 * 2 * 32, rel=0.1)


def test_shorter_captions_need_less(needed):
    long, short = needed("local")[0], needed("local", tokens=8, words=6)[0]
    assert short.per_pair < long.per_pair
    assert short.per_two_pairs < 0.6 * long.per_two_pairs


def test_what_is_locked_needs_no_gradients(needed):
    free, locked = needed()[0], needed(lock_image=True, lock_text=True)[0]
    assert locked.per_pair < 0.4 * free.per_pair
