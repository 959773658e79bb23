import dataclasses
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerFast

from medfast.config import TrainConfig
from medfast.data import read_split
from medfast.data.loader import Batch, Loader
from medfast.data.tokens import NOT_PREDICTED, Masked
from medfast.data.views import NO_EXTRA
from medfast.errors import UsageError
from medfast.methods import METHODS, method_class
from medfast.models import PRESETS
from medfast.models.pair import Features
from medfast.ops import clip_loss, filip_loss, local_alignment_loss, sparc_loss
from medfast.parts import load_tokenizer, new_model
from medfast.run_folder import RunFolder

B, P, T, D = 6, 4, 5, 8
# Of the towers, whose features the heads take.
IMAGE_WIDTH, TEXT_WIDTH, VOCAB = 10, 7, 17
# Terms without the learnable scale: their temperatures are fixed, or they have none.
OWN_SCALE = {"local", "simclr", "simsiam", "mlm", "cross_modal", "in_modal"}


def make_method(key, *args, **settings):
    """Return a method with small heads for the features of `make_features`."""
    torch.manual_seed(1)
    method = method_class(key)(*args, **settings)
    towers = SimpleNamespace(
        image_tower=SimpleNamespace(width=IMAGE_WIDTH),
        text_tower=SimpleNamespace(width=TEXT_WIDTH, vocab_size=VOCAB),
        text_projection=nn.Linear(TEXT_WIDTH, D, bias=False),
    )
    method.add_heads(towers, 12)
    return method


def make_batch():
    word_mask = torch.arange(T) < torch.tensor([5, 4, 3, 2, 1, 5]).unsqueeze(1)
    none = torch.empty(0)
    group = torch.tensor([0, 0, 1, 2, 3, 4])
    labels = torch.full((B, T), NOT_PREDICTED)
    labels[[0, 0, 1, 3, 5], [0, 4, 2, 1, 3]] = torch.tensor([3, 16, 3, 0, 9])
    masked = Masked(torch.zeros_like(labels), labels)
    return Batch(none, none, none, word_mask, group, torch.arange(B), masked=masked)


def make_features(key, dtype=torch.float32):
    """Return what the towers would say of `make_batch`, as leaves."""
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    def unit():
        return F.normalize(random(B, D), dim=-1).requires_grad_()

    image, text = unit(), unit()
    patches, tokens = (random(B, count, D).requires_grad_() for count in (P, T))
    extra = {}
    if key == "slip":
        names = ("first view", "second view")
        extra = {name: random(B, IMAGE_WIDTH).requires_grad_() for name in names}
    if key == "declip":
        extra = {
            "image view": unit(),
            "text view": unit(),
            "pooled": random(B, IMAGE_WIDTH).requires_grad_(),
            "pooled view": random(B, IMAGE_WIDTH).requires_grad_(),
            "masked": random(5, TEXT_WIDTH).requires_grad_(),
        }
    scale = torch.tensor(10.0, dtype=dtype, requires_grad=True)
    return Features(image, text, patches, tokens, scale, extra)


def losses_of(method, features, batch):
    return method(method.heads(features), batch)


@pytest.fixture
def batch():
    return make_batch()


@pytest.fixture
def features():
    return make_features("clip")


def test_every_method_of_the_table_names_its_terms_and_ops(batch):
    for key in METHODS:
        method = make_method(key)
        losses = losses_of(method, make_features(key), batch)
        assert losses.keys() == method.weights.keys()
        assert all(loss.shape == () and loss.dtype == torch.float32 for loss in losses.values())
        assert method.ops


def test_clip_is_info_nce(features, batch):
    losses = method_class("clip")("reference")(features, batch)
    want = clip_loss(features.image, features.text, 10.0, impl="reference")
    torch.testing.assert_close(losses["clip"], want)


def test_local_adds_the_alignment_of_words_and_patches(features, batch):
    method = method_class("local")("reference")
    losses = method(features, batch)
    want = local_alignment_loss(
        features.patches, features.tokens, batch.word_mask, impl="reference"
    )
    torch.testing.assert_close(losses["local"], want)
    assert method.weights == {"clip": 1.0, "local": 1.0}
    assert method.needs_tokens


def test_filip_is_late_interaction_of_unit_features(features, batch):
    method = method_class("filip")("reference")
    losses = method(features, batch)
    patches, tokens = (F.normalize(x, dim=-1) for x in (features.patches, features.tokens))
    want = filip_loss(patches, tokens, batch.word_mask, 10.0, impl="reference")
    torch.testing.assert_close(losses["filip"], want)
    assert method.weights == {"filip": 1.0}
    assert method.needs_tokens
    assert method.late_interaction


def test_filip_normalises_in_fp32(features, batch):
    half = dataclasses.replace(
        features, patches=features.patches.bfloat16(), tokens=features.tokens.bfloat16()
    )
    full = dataclasses.replace(half, patches=half.patches.float(), tokens=half.tokens.float())
    method = method_class("filip")("reference")
    assert torch.equal(method(half, batch)["filip"], method(full, batch)["filip"])


def test_sparc_adds_words_against_what_they_see(features, batch):
    method = method_class("sparc")("reference")
    losses = method(features, batch)
    clip = clip_loss(features.image, features.text, 10.0, impl="reference")
    fine = sparc_loss(features.patches, features.tokens, batch.word_mask, 10.0, impl="reference")
    torch.testing.assert_close(losses["clip"], clip)
    torch.testing.assert_close(losses["fine"], fine)
    assert method.weights == {"clip": 0.5, "fine": 1.0}
    assert method.needs_tokens


@pytest.mark.parametrize("key", METHODS)
def test_every_term_trains_the_scale_that_it_has(batch, key):
    features = make_features(key)
    for name, loss in losses_of(make_method(key), features, batch).items():
        (d_scale,) = torch.autograd.grad(
            loss, features.logit_scale, retain_graph=True, allow_unused=name in OWN_SCALE
        )
        assert (d_scale is None) == (name in OWN_SCALE)
        assert d_scale is None or d_scale != 0


@pytest.mark.parametrize("key", METHODS)
def test_word_maps_share_out_one_for_each_word(features, batch, key):
    method = method_class(key)()
    maps = method.word_maps(features, batch)
    if not method.needs_tokens:
        assert maps is None
        return
    assert maps.shape == (B, T, P)
    assert (maps >= 0).all()
    sums = maps.sum(-1)[batch.word_mask & (maps > 0).any(-1)]
    assert len(sums) > B
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_a_word_like_no_patch_has_an_empty_map(features, batch):
    away = dataclasses.replace(features, patches=torch.ones(B, P, D), tokens=-torch.ones(B, T, D))
    assert (method_class("filip")().word_maps(away, batch) == 0).all()


@pytest.mark.parametrize("key", METHODS)
def test_fused_and_reference_agree(batch, key):
    fused, reference = (
        losses_of(make_method(key, impl), make_features(key), batch)
        for impl in ("auto", "reference")
    )
    for name in fused:
        torch.testing.assert_close(fused[name], reference[name], rtol=1e-5, atol=1e-5)


def test_group_positives_without_a_global_loss_are_refused():
    with pytest.raises(UsageError, match=r"--group-positives .* filip"):
        method_class("filip")(group_positives=True)


@pytest.mark.parametrize("key", METHODS)
def test_an_implementation_that_cannot_run_is_refused_before_any_work(key):
    with pytest.raises(UsageError, match="--fused-loss cuda"):
        method_class(key)("cuda").check_impl(torch.device("cpu"))


SMALL = dataclasses.replace(
    PRESETS["tiny"],
    image_size=32,
    image_args={**PRESETS["tiny"].image_args, "channels": (8, 16, 24, 32), "stem_width": 8},
    text={**PRESETS["tiny"].text, "hidden_size": 32, "intermediate_size": 64},
    embed_dim=16,
    head_width=16,
)
# Made after all that methods share, for those that need them.
TOKEN_PROJECTIONS = {"patch_projection.weight", "token_projection.weight"}


def test_every_method_begins_with_the_same_weights_bit_for_bit(tokenizer, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALL)
    states = {}
    for key in METHODS:
        # The generator may be anywhere before.
        torch.manual_seed(len(key))
        config = TrainConfig(method=key, precision="fp32", seed=3)
        model = new_model(config, method_class(key)(), tokenizer, torch.device("cpu"))
        states[key] = model.state_dict()
    for key, state in states.items():
        more = state.keys() - states["clip"].keys()
        assert more == (TOKEN_PROJECTIONS if method_class(key).needs_tokens else set())
        for name, tensor in states["clip"].items():
            assert torch.equal(state[name], tensor), f"{key}: {name}"
    assert all(torch.equal(states["filip"][n], states["sparc"][n]) for n in TOKEN_PROJECTIONS)


@pytest.mark.parametrize("model", ["vit_b16_clip", "vit_b16_bert"])
def test_a_published_tokenizer_without_mask_token_changes_no_weight(tmp_path, monkeypatch, model):
    """A masked language model adds an entry; towers and projections are drawn as without it."""
    preset = PRESETS[model]
    own = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    small = dataclasses.replace(
        SMALL, text={**preset.text, **own, "num_attention_heads": 2}, context_length=16
    )
    monkeypatch.setitem(PRESETS, "tiny", small)
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<pad>", "<start>", "<odd>", "<end>"])
    words.train_from_iterator(["a nodule in the left lung", "two nodules"], trainer)
    published = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<start>", eos_token="<end>"
    )
    published.save_pretrained(str(tmp_path / "published"))
    states = []
    for key in ("clip", "declip"):
        method = method_class(key)()
        config = TrainConfig(
            method=key,
            precision="fp32",
            tokenizer=str(tmp_path / "published"),
            name=key,
            logs=str(tmp_path),
        )
        tokenizer = load_tokenizer(config, method, [], RunFolder.create(config))
        states.append(new_model(config, method, tokenizer, torch.device("cpu")).state_dict())
    clip, declip = states
    longer = {name for name, tensor in clip.items() if declip[name].shape != tensor.shape}
    assert len(longer) <= 1, longer  # the token embeddings
    for name, tensor in clip.items():
        found = declip[name][: len(tensor)] if name in longer else declip[name]
        assert torch.equal(found, tensor), name


@pytest.mark.parametrize("key", METHODS)
def test_every_method_sees_the_same_main_views_and_captions(phantom, tokenizer, key):
    records = read_split("roco", phantom, "train").records
    extra = method_class(key).extra
    plain, own = (
        Loader(records, tokenizer, 32, 8, crop=0.8, seed=3, extra=asked)
        for asked in (NO_EXTRA, extra)
    )
    for a, b, _ in zip(plain.epoch(1), own.epoch(1), range(2), strict=False):
        for name in ("images", "ids", "mask", "word_mask", "group", "index"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert (len(b.views), len(b.texts)) == (extra.images, extra.texts)
        assert (b.masked is not None) == extra.masked
