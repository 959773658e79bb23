import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medfast.models import PRESETS
from medfast.models.pair import ImageTextModel

IDS = torch.tensor([[1, 7, 8, 9, 3, 0], [1, 7, 3, 0, 0, 0]])
MASK = IDS != 0
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}


def _model(preset, token_features=True):
    torch.manual_seed(0)
    return ImageTextModel(preset, 50, SPECIAL, token_features).eval()


def _images(preset, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = (2, 3, preset.image_size, preset.image_size)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


# The full shape of vit_b16_clip with fewer layers: the wiring is the same.
VIT = dataclasses.replace(
    PRESETS["vit_b16_clip"],
    image_args={"depth": 1},
    text={**PRESETS["vit_b16_clip"].text, "num_hidden_layers": 2},
)


@pytest.mark.parametrize(("preset", "grid"), [(PRESETS["tiny"], 6), (VIT, 14)])
def test_features_have_the_shapes_they_promise(preset, grid):
    model = _model(preset)
    features = model(_images(preset), IDS, MASK)
    D = preset.embed_dim
    assert features.image.shape == features.text.shape == (2, D)
    assert features.patches.shape == (2, grid * grid, D)
    assert features.tokens.shape == (2, 6, D)
    assert model.image_tower.grid == (grid, grid)
    for unit in (features.image, features.text):
        torch.testing.assert_close(unit.norm(dim=-1), torch.ones(2))
    assert features.logit_scale.item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("preset", [PRESETS["tiny"], VIT])
def test_padding_does_not_change_the_text(preset):
    model = _model(preset)
    alone, alone_tokens = model.encode_text(IDS[1:, :3], MASK[1:, :3])
    padded, padded_tokens = model.encode_text(IDS, MASK)
    torch.testing.assert_close(alone[0], padded[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone_tokens[0], padded_tokens[1, :3], rtol=1e-4, atol=1e-4)


def test_patches_keep_their_place():
    model = _model(PRESETS["tiny"])
    dark = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    lit = dark.clone()
    lit[..., 72:88, 8:24] = 255  # lower left: row 4 or 5, column 0 or 1 of the 6 x 6 grid
    change = (model.encode_image(lit)[1] - model.encode_image(dark)[1]).norm(dim=-1)
    row, column = divmod(change.argmax().item(), 6)
    assert row >= 4
    assert column <= 1


def test_the_scale_stays_within_its_bounds():
    model = _model(PRESETS["tiny"])
    for value, kept in ((9.0, 100.0), (-3.0, 1.0)):
        model.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        assert model.logit_scale.exp().item() == pytest.approx(kept)


def test_a_method_without_token_features_has_no_projections_for_them():
    model = _model(PRESETS["tiny"], token_features=False)
    features = model(_images(PRESETS["tiny"]), IDS, MASK)
    assert features.patches is None
    assert features.tokens is None
    assert not any("patch" in name or "token_pro" in name for name, _ in model.named_parameters())


# Without dropout, batch statistics and the full shape's size.
SMALL_VIT = dataclasses.replace(
    PRESETS["vit_b16_clip"],
    image_size=64,
    image_args={"depth": 2, "embed_dim": 64, "num_heads": 2},
    text={
        **PRESETS["vit_b16_clip"].text,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    embed_dim=32,
)


@pytest.mark.parametrize("preset", [PRESETS["tiny"], SMALL_VIT])
def test_weights_in_bf16_leave_the_scale_and_the_pixels_in_fp32(preset):
    model = _model(preset)
    images = _images(preset)
    want = model(images, IDS, MASK)
    model.cast(torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes.pop("logit_scale") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    tower = model.image_tower
    assert tower.mean.dtype == tower.std.dtype == torch.float32
    assert tower.dtype == torch.bfloat16
    found = model(images, IDS, MASK)
    for name in ("image", "text"):
        got, exact = getattr(found, name), getattr(want, name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.norm(dim=-1), torch.ones(2))
        assert (got * exact).sum(-1).min() > 0.999
    for name in ("patches", "tokens"):
        got, exact = getattr(found, name), getattr(want, name)
        assert got.dtype == torch.bfloat16
        assert (got.float() - exact).norm() < 0.05 * exact.norm()


def test_pixels_are_normalised_before_they_are_rounded_to_bf16():
    """bf16 holds 8 bits: a difference of two rounded numbers would have fewer."""
    model = _model(PRESETS["tiny"])
    model.cast(torch.bfloat16)
    seen = []
    trunk = model.image_tower.trunk
    forward = trunk.forward_features
    trunk.forward_features = lambda pixels: seen.append(pixels) or forward(pixels)
    images = _images(PRESETS["tiny"])
    model.encode_image(images)
    want = ((images - 0.5 * 255) / (0.25 * 255)).bfloat16()
    assert torch.equal(seen[0], want)


def _loss_and_saved_bytes(preset, checkpoints):
    model = _model(preset)
    if checkpoints:
        model.checkpoint_activations()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = model(_images(preset), IDS, MASK)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    loss = features.logit_scale * (features.image @ features.text.T)[0, 1]
    loss = loss + (features.patches.sum() + features.tokens.sum()) / 100
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return loss, grads, sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize("preset", [PRESETS["tiny"], SMALL_VIT])
def test_checkpointed_activations_change_nothing_but_memory(preset):
    loss, grads, kept = _loss_and_saved_bytes(preset, checkpoints=False)
    again, grads_again, less = _loss_and_saved_bytes(preset, checkpoints=True)
    torch.testing.assert_close(again, loss)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad, msg=lambda text, n=name: f"{n}: {text}")
    assert less < 0.75 * kept


class _Calls(TorchDispatchMode):
    """Notes the names of what is computed."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", [PRESETS["tiny"], VIT])
def test_attention_of_captions_trains_in_bf16_without_the_slow_backward(preset):
    model = _model(preset).train()
    with torch.autocast("cpu", torch.bfloat16):
        with _Calls() as training:
            model.encode_text(IDS, MASK)
        with _Calls() as evaluation, torch.no_grad():
            model.encode_text(IDS, MASK)
    with _Calls() as exact:
        model.encode_text(IDS, MASK)
    fused = "_scaled_dot_product_flash_attention_for_cpu"
    assert [fused in calls.names for calls in (training, evaluation, exact)] == [False, True, True]
