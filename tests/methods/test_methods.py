import pytest
import torch
import torch.nn.functional as F

from medfast.data.loader import Batch
from medfast.errors import UsageError
from medfast.methods import METHODS, method_class
from medfast.models.pair import Features
from medfast.ops import clip_loss, local_alignment_loss

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


def test_an_implementation_that_cannot_run_is_refused_before_any_work():
    with pytest.raises(UsageError, match="--fused-loss cuda"):
        method_class("clip")("cuda").check_impl(torch.device("cpu"))
