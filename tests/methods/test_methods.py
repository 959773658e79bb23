import dataclasses

import pytest
import torch
import torch.nn.functional as F

from medfast.data.loader import Batch
from medfast.errors import UsageError
from medfast.methods import METHODS, method_class
from medfast.models.pair import Features
from medfast.ops import clip_loss, filip_loss, local_alignment_loss, sparc_loss

B, P, T, D = 6, 4, 5, 8


@pytest.fixture
def batch():
    word_mask = torch.arange(T) < torch.tensor([5, 4, 3, 2, 1, 5]).unsqueeze(1)
    none = torch.empty(0)
    group = torch.tensor([0, 0, 1, 2, 3, 4])
    return Batch(none, none, none, word_mask, group, torch.arange(B))


@pytest.fixture
def features():
    torch.manual_seed(0)
    unit = (F.normalize(torch.randn(B, D), dim=-1).requires_grad_() for _ in range(2))
    patches = torch.randn(B, P, D, requires_grad=True)
    tokens = torch.randn(B, T, D, requires_grad=True)
    return Features(*unit, patches, tokens, torch.tensor(10.0, requires_grad=True))


def test_every_method_of_the_table_names_its_terms_and_ops(features, batch):
    for key in METHODS:
        method = method_class(key)()
        losses = method(features, batch)
        assert losses.keys() == method.weights.keys()
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
def test_every_term_trains_the_scale_that_it_has(features, batch, key):
    losses = method_class(key)()(features, batch)
    for name, loss in losses.items():
        (d_scale,) = torch.autograd.grad(
            loss, features.logit_scale, retain_graph=True, allow_unused=name == "local"
        )
        assert (d_scale is None) == (name == "local")  # its temperatures are fixed
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


def test_group_positives_count_pairs_of_one_study(features, batch):
    losses = method_class("clip")("reference", group_positives=True)(features, batch)
    want = clip_loss(features.image, features.text, 10.0, positives=batch.group, impl="reference")
    torch.testing.assert_close(losses["clip"], want)
    alone = method_class("clip")("reference")(features, batch)["clip"]
    assert not torch.allclose(losses["clip"], alone)


def test_fused_and_reference_agree(features, batch):
    for key in METHODS:
        fused = method_class(key)("auto")(features, batch)
        reference = method_class(key)("reference")(features, batch)
        for name in fused:
            torch.testing.assert_close(fused[name], reference[name], rtol=1e-5, atol=1e-5)


def test_group_positives_without_a_global_loss_are_refused():
    with pytest.raises(UsageError, match=r"--group-positives .* filip"):
        method_class("filip")(group_positives=True)


@pytest.mark.parametrize("key", METHODS)
def test_an_implementation_that_cannot_run_is_refused_before_any_work(key):
    with pytest.raises(UsageError, match="--fused-loss cuda"):
        method_class(key)("cuda").check_impl(torch.device("cpu"))
