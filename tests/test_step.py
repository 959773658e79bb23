"""The gradient of a step: that of the whole batch, in however many parts it is encoded."""

import dataclasses

import pytest
import torch
from torch import nn

from medfast.config import TrainConfig
from medfast.data import read_split
from medfast.data.loader import Loader
from medfast.methods import METHODS, method_class
from medfast.models import PRESETS
from medfast.models.freezing import lock_image
from medfast.models.pair import build_model
from medfast.optimizers import build_optimizer
from medfast.step import Step

TINY = dataclasses.replace(
    PRESETS["tiny"],
    image_size=32,
    image_args={**PRESETS["tiny"].image_args, "channels": (8, 16, 24, 32), "stem_width": 8},
    text={**PRESETS["tiny"].text, "hidden_size": 32, "intermediate_size": 64},
    embed_dim=16,
    head_width=16,
)
# A tower with batch norm has the statistics of a part, so exactness is a matter of the others.
VIT = dataclasses.replace(
    TINY,
    image="vit_tiny_patch16_224",
    image_args={"depth": 1, "embed_dim": 32, "num_heads": 2},
)
DROPPING = dataclasses.replace(
    VIT,
    image_args={**VIT.image_args, "depth": 2, "drop_path_rate": 0.4, "proj_drop_rate": 0.2},
    text={**VIT.text, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
)
PAIRS = 24


@pytest.fixture(scope="module")
def records(phantom):
    return read_split("roco", phantom, "train").records[:PAIRS]


@pytest.fixture
def make(tokenizer):
    """Return a step by the preset of its model, its method and its precision."""

    def step(preset, key, precision="fp32", compiled=False, **settings):
        torch.manual_seed(0)
        method = method_class(key)(**settings)
        model = build_model(preset, tokenizer, method.needs_tokens)
        method.add_heads(model, preset.head_width)
        place = torch.device("cpu")
        made = Step(model.train(), method.train(), place, precision, compiled)
        for bank in (m for m in method.children() if hasattr(m, "push")):
            bank.push(nn.functional.normalize(torch.randn(7, preset.embed_dim), dim=-1))
        return made

    return step


@pytest.fixture
def parts(records, tokenizer):
    """Return the batch of all records in parts of some size, as a method's loader gives it."""

    def batches(size, method, image_size=32):
        loader = Loader(records, tokenizer, image_size, size, crop=0.8, extra=method.extra)
        return list(loader.epoch(0))

    return batches


def _gradients(step):
    modules = {"model": step.model, "method": step.method}
    named = ((f"{k}.{n}", p) for k, m in modules.items() for n, p in m.named_parameters())
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def _buffers(step):
    return dict(step.method.named_buffers())


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("size", [12, 5])
def test_parts_have_the_gradient_of_the_whole_batch(make, parts, key, size):
    whole, cached = make(VIT, key), make(VIT, key)
    batches = parts(size, cached.method)
    assert len(batches) == PAIRS // size > 1
    # The captions of a part may all be shorter than the longest of the batch.
    assert size > 5 or len({batch.ids.shape[1] for batch in batches}) > 1
    (batch,) = parts(PAIRS, whole.method)
    expected = whole.backward([_first(batch, size * len(batches))])
    found = cached.backward(batches)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    want, got = _gradients(whole), _gradients(cached)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        error = (got[name] - gradient).norm()
        assert error <= 2e-5 * gradient.norm() + 1e-7, f"{name}: {error / gradient.norm():.1e}"
    for name, value in _buffers(whole).items():
        torch.testing.assert_close(_buffers(cached)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("key", "count"), [("clip", 1), ("declip", 2)])
def test_compiled_towers_have_the_same_gradient_and_leave_the_model_as_it_was(
    make, parts, key, count, monkeypatch
):
    compiled = []
    # After some graphs of one function it would be traced no more.
    torch.compiler.reset()

    def compile(function):
        """Trace as torch.compile does, without minutes of code generation."""
        compiled.append(function.__self__)
        return _compile(function, backend="eager")

    _compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    plain, traced = make(VIT, key), make(VIT, key, compiled=True)
    model = traced.model
    assert compiled == [model.image_tower, model.text_tower]
    batches = parts(PAIRS // count, plain.method)
    want, got = plain.backward(batches), traced.backward(batches)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    gradients = _gradients(traced)
    for name, gradient in _gradients(plain).items():
        error = (gradients[name] - gradient).norm()
        assert error <= 2e-5 * gradient.norm() + 1e-7, name
    assert "forward" not in {**vars(model.image_tower), **vars(model.text_tower)}


def _first(part, pairs):
    """Return a batch, or a part of one, of its first pairs."""
    if isinstance(part, torch.Tensor):
        return part[:pairs]
    if isinstance(part, tuple):
        return tuple(_first(item, pairs) for item in part)
    if dataclasses.is_dataclass(part):
        items = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        return dataclasses.replace(part, **{k: _first(v, pairs) for k, v in items.items()})
    return part


@pytest.mark.parametrize("key", ["local", "declip"])
def test_dropout_is_the_same_in_both_passes(make, parts, key, monkeypatch):
    """The gradient is that of one graph over the same parts, drawn in the same order."""
    cached, plain = make(DROPPING, key), make(DROPPING, key)
    batches = parts(6, cached.method)
    torch.manual_seed(3)
    found = cached.backward(batches)
    after = torch.get_rng_state()

    torch.manual_seed(3)
    features = [plain._encode(batch) for batch in batches]
    from medfast import step as module

    joined = {
        name: module._joined([part.parts()[name] for part in features])
        for name in features[0].parts()
    }
    whole = features[0].with_parts(joined)
    losses = plain._losses(whole, module._joined_batch(batches))
    plain._total(losses).backward()
    assert torch.equal(torch.get_rng_state(), after)
    for name, loss in losses.items():
        torch.testing.assert_close(found[name], loss.detach())
    got = _gradients(cached)
    for name, gradient in _gradients(plain).items():
        error = (got[name] - gradient).norm()
        assert error <= 2e-5 * gradient.norm() + 1e-7, name


def test_dropout_that_differed_would_show(make, parts):
    """Else the test above could not fail."""
    first, second = make(DROPPING, "clip"), make(DROPPING, "clip")
    for seed, step in enumerate((first, second)):
        torch.manual_seed(seed)
        step.backward(parts(6, step.method))
    a, b = _gradients(first), _gradients(second)
    name = "model.image_projection.weight"
    assert (a[name] - b[name]).norm() > 1e-3 * a[name].norm()


def test_batch_norm_in_a_tower_counts_every_part_once(make, parts):
    cached, plain = make(TINY, "clip"), make(TINY, "clip")
    batches = parts(6, cached.method)
    cached.backward(batches)
    with torch.no_grad():
        for batch in batches:
            plain._encode(batch)
    want = dict(plain.model.named_buffers())
    assert any("running_mean" in name for name in want)
    for name, value in cached.model.named_buffers():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("size", [PAIRS, 6])
def test_checkpointing_changes_no_gradient_and_counts_batches_once(make, parts, size):
    plain, spare = make(TINY, "clip"), make(TINY, "clip")
    spare.model.checkpoint_activations()
    for step in (plain, spare):
        step.backward(parts(size, step.method))
    want = _gradients(plain)
    for name, gradient in _gradients(spare).items():
        torch.testing.assert_close(gradient, want[name])
    buffers = dict(plain.model.named_buffers())
    for name, buffer in spare.model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_locked_towers_take_part_without_a_gradient(make, parts):
    step = make(VIT, "clip")
    lock_image(step.model.image_tower)
    step.model.train()
    step.backward(parts(6, step.method))
    found = _gradients(step)
    assert not any("image_tower" in name for name in found)
    assert found["model.image_projection.weight"].any()
    assert any("text_tower" in name for name in found)


@pytest.mark.parametrize("precision", ["amp", "amp_bf16"])
def test_lower_precision_has_about_the_same_gradient(make, parts, precision):
    exact, low = make(VIT, "local"), make(VIT, "local", precision)
    # Where training begins, gradients of so random a model overflow, and a step is left out.
    low.scaler = torch.amp.GradScaler("cpu", init_scale=1024, enabled=low.scaler.is_enabled())
    exact.backward(parts(6, exact.method))
    low.backward(parts(6, low.method))
    scale = low.scaler.get_scale()
    assert scale > 1 if precision == "amp" else scale == 1
    got = _gradients(low)
    for name, gradient in _gradients(exact).items():
        error = (got[name] / scale - gradient).norm()
        assert error <= 0.1 * gradient.norm() + 1e-4, f"{name}: {error / gradient.norm():.1e}"


def test_terms_are_weighed_as_asked(make, parts):
    plain = make(VIT, "cyclip", weights={"cross_modal": 0.0, "in_modal": 0.0})
    clip = make(VIT, "clip")
    for step in (plain, clip):
        step.backward(parts(PAIRS, step.method))
    want = _gradients(clip)
    for name, gradient in _gradients(plain).items():
        torch.testing.assert_close(gradient, want[name])


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_an_optimiser_lowers_the_loss(make, parts, optimizer):
    step = make(VIT, "clip")
    config = TrainConfig(optimizer=optimizer, lr=0.01)
    modules = nn.ModuleList([step.model, step.method])
    made = build_optimizer(config, modules.parameters())
    batches = parts(PAIRS, step.method)
    losses = []
    for _ in range(8):
        made.zero_grad()
        losses.append(step.backward(batches)["clip"].item())
        made.step()
    assert losses[-1] < 0.95 * losses[0]
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]
    assert all(p.ndim < 2 for p in made.param_groups[1]["params"])
