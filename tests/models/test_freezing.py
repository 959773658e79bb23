"""What is locked never changes, costs no activations, and is left out of the optimiser."""

import dataclasses
import itertools
import re

import pytest
import torch
from torch import nn

from medfast.config import TrainConfig
from medfast.data.loader import Batch
from medfast.errors import UsageError
from medfast.methods import method_class
from medfast.models import PRESETS
from medfast.models.freezing import lock_image, lock_text
from medfast.models.pair import ImageTextModel
from medfast.optimizers import build_optimizer
from medfast.parts import prepare
from medfast.step import Step

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
BERT = {
    **PRESETS["tiny"].text,
    "hidden_size": 32,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.2,
}
CLIP = {
    **PRESETS["vit_b16_clip"].text,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "attention_dropout": 0.2,
}
RESNET = dataclasses.replace(
    PRESETS["tiny"],
    image_size=32,
    image_args={**PRESETS["tiny"].image_args, "channels": (8, 16, 24, 32), "stem_width": 8},
    text=BERT,
    embed_dim=16,
    head_width=16,
)
VIT = dataclasses.replace(
    RESNET,
    image="vit_base_patch16_clip_224",
    image_args={
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "drop_path_rate": 0.3,
        "proj_drop_rate": 0.3,
    },
    text=CLIP,
)
# Names within the towers, group by group and layer by layer.
VIT_GROUPS = (r"cls_token|pos_embed|patch_embed|norm_pre", r"blocks\.0\.", r"blocks\.1\.|norm\.")
RESNET_GROUPS = (r"conv1|bn1", r"layer1", r"layer2", r"layer3", r"layer4")
CLIP_LAYERS = (r"embeddings", r"encoder\.layers\.0", r"encoder\.layers\.1|final_layer_norm")
BERT_LAYERS = (r"embeddings", r"encoder\.layer\.0", r"encoder\.layer\.1")
IMAGES = {"vit": (VIT, VIT_GROUPS), "resnet": (RESNET, RESNET_GROUPS)}
TEXTS = {"clip": (VIT, CLIP_LAYERS), "bert": (RESNET, BERT_LAYERS)}
IMAGE_CASES = [
    (name, count) for name, (_, groups) in IMAGES.items() for count in (0, 1, len(groups))
]
TEXT_CASES = [(name, count) for name in TEXTS for count in (0, 1, 2)]
PAIRS = 6


def _model(preset):
    torch.manual_seed(0)
    return ImageTextModel(preset, 50, SPECIAL)


def _batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (PAIRS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    ids = torch.randint(5, 50, (PAIRS, 7), generator=generator)
    ids[:, 0], ids[:, -1] = 1, 3
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Batch(images, ids, mask, mask, torch.arange(PAIRS), torch.arange(PAIRS))


def _train(model, method="clip", steps=3, **settings):
    """Lock what the settings say, train for some steps; return the tensors before and after."""
    config = TrainConfig(method=method, lr=0.01, wd=0.5, **settings)
    made = method_class(method)()
    prepare(config, made, model)
    optimizer = build_optimizer(config, nn.ModuleList([model, made]).parameters())
    step = Step(model.train(), made.train(), torch.device("cpu"), "fp32")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(steps):
        optimizer.zero_grad()
        step.backward([_batch()])
        optimizer.step()
    inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert inside == {id(p) for p in model.parameters() if p.requires_grad}
    return before, model.state_dict()


def _assert_only_these_stayed(before, after, is_locked):
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == is_locked(name), name


def _in_tower(name, tower, patterns):
    prefix = f"{tower}_tower.trunk."
    own = name.removeprefix(prefix)
    return name.startswith(prefix) and any(re.match(pattern, own) for pattern in patterns)


@pytest.mark.parametrize(("name", "count"), IMAGE_CASES)
def test_only_unlocked_groups_of_the_image_tower_change(name, count):
    """Weight decay and batch statistics included; whatever is no part of the tower is trained."""
    preset, groups = IMAGES[name]
    locked = groups[: len(groups) - count]
    states = _train(_model(preset), lock_image=True, lock_image_unlocked_groups=count)
    _assert_only_these_stayed(*states, lambda own: _in_tower(own, "image", locked))


@pytest.mark.parametrize(("name", "count"), TEXT_CASES)
def test_only_unlocked_layers_of_the_text_tower_change(name, count):
    preset, layers = TEXTS[name]
    locked = layers[: len(layers) - count]
    states = _train(_model(preset), lock_text=True, lock_text_unlocked_layers=count)
    _assert_only_these_stayed(*states, lambda own: _in_tower(own, "text", locked))


@pytest.mark.parametrize("preset", [VIT, RESNET])
def test_everything_changes_without_a_lock(preset):
    """Else the tests above would pass for what never gets a gradient."""
    _assert_only_these_stayed(*_train(_model(preset)), lambda own: False)


@pytest.mark.parametrize("preset", [VIT, RESNET])
def test_lit_locks_the_image_tower_by_itself(preset):
    states = _train(_model(preset), "lit")
    _assert_only_these_stayed(*states, lambda own: own.startswith("image_tower."))


def test_both_towers_may_be_locked():
    states = _train(_model(RESNET), lock_image=True, lock_text=True)
    _assert_only_these_stayed(*states, lambda own: "_tower." in own)
    assert not torch.equal(*(state["image_projection.weight"] for state in states))


def _kept_bytes(run, module):
    """Return the bytes of activations, not weights, that autograd keeps of a forward pass."""
    own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    return sum(kept.values()), output


@pytest.mark.parametrize("name", IMAGES)
def test_a_locked_part_of_the_image_tower_keeps_no_activations(name):
    preset, groups = IMAGES[name]
    batch, kept = _batch(), []
    for count in range(len(groups) + 1):
        tower = _model(preset).image_tower
        lock_image(tower, count)
        found, output = _kept_bytes(lambda tower=tower: tower(batch.images), tower)
        kept.append(found)
        assert output[0].requires_grad == (count > 0)
    assert kept[0] == 0
    assert all(less < more for less, more in itertools.pairwise(kept)), kept


@pytest.mark.parametrize("name", TEXTS)
def test_a_locked_part_of_the_text_tower_keeps_no_activations(name):
    preset, _ = TEXTS[name]
    batch, kept = _batch(), []
    for count in (0, 1, 2, None):
        tower = _model(preset).text_tower
        if count is not None:
            lock_text(tower, count)
        found, output = _kept_bytes(lambda tower=tower: tower(batch.ids, batch.mask), tower)
        kept.append(found)
        assert output[0].requires_grad == (count != 0)
    assert kept[0] == 0
    assert all(less < more for less, more in itertools.pairwise(kept)), kept


@pytest.mark.parametrize("preset", [VIT, RESNET])
def test_a_locked_tower_is_the_one_of_evaluation_while_the_rest_is_trained(preset):
    model, batch = _model(preset), _batch()
    lock_image(model.image_tower)
    lock_text(model.text_tower)
    want = model.eval()(batch.images, batch.ids, batch.mask)
    found = model.train()(batch.images, batch.ids, batch.mask)
    assert model.training
    assert torch.equal(found.image, want.image)
    assert torch.equal(found.text, want.text)


@pytest.mark.parametrize("preset", [VIT, RESNET])
def test_dropout_is_on_where_nothing_is_locked(preset):
    """Else the test above could not fail."""
    model, batch = _model(preset).train(), _batch()
    first, second = (model(batch.images, batch.ids, batch.mask) for _ in range(2))
    assert not torch.equal(first.text, second.text)
    if preset is VIT:
        assert not torch.equal(first.image, second.image)


def _seen_by(module, run):
    """Return what a module is given in two runs."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    run()
    run()
    handle.remove()
    return seen


def test_dropout_of_a_locked_part_is_off():
    model, batch = _model(VIT), _batch()
    lock_image(model.image_tower, 1)
    lock_text(model.text_tower, 1)
    model.train()
    image, text = model.image_tower.trunk.blocks[1], model.text_tower.trunk.encoder.layers[1]
    for module in (image, text):
        first, second = _seen_by(module, lambda: model(batch.images, batch.ids, batch.mask))
        assert torch.equal(first, second)
        assert module.training


def test_dropout_of_a_locked_stem_is_off():
    """It has no parameters, and belongs to no block."""
    model = _model(dataclasses.replace(VIT, image_args={**VIT.image_args, "pos_drop_rate": 0.5}))
    lock_image(model.image_tower, 1)
    model.train()
    block = model.image_tower.trunk.blocks[1]
    first, second = _seen_by(block, lambda: model.image_tower(_batch().images))
    assert torch.equal(first, second)


def test_the_mode_of_what_is_trained_can_be_changed():
    model = _model(VIT)
    lock_image(model.image_tower, 1)
    assert model.train().image_tower.trunk.blocks[1].training
    assert not model.eval().image_tower.trunk.blocks[1].training


@pytest.mark.parametrize("preset", [VIT, RESNET])
def test_the_gradient_of_the_unlocked_part_is_that_of_the_whole_tower(preset):
    grads = []
    for locks in (False, True):
        model, batch = _model(preset), _batch()
        if locks:
            lock_image(model.image_tower, 1)
            lock_text(model.text_tower, 1)
        features = model.eval()(batch.images, batch.ids, batch.mask)
        (features.image @ features.text.T)[0, 1].backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    whole, locked = grads
    assert 0 < len(locked) < len(whole)
    for name, grad in locked.items():
        torch.testing.assert_close(grad, whole[name])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"lock_image": True, "lock_image_unlocked_groups": 4},
            "--lock-image-unlocked-groups must be at most 3, all groups of the image tower; got 4.",
        ),
        (
            {"lock_text": True, "lock_text_unlocked_layers": 3},
            "--lock-text-unlocked-layers must be at most 2, all layers of the text tower; got 3.",
        ),
    ],
)
def test_more_than_there_is_cannot_be_unlocked(settings, says):
    with pytest.raises(UsageError, match=f"^{re.escape(says)}$"):
        prepare(TrainConfig(method="clip", **settings), method_class("clip")(), _model(VIT))
