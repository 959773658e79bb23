import pytest
import torch
import torch.nn.functional as F

from medfast import (
    ClipLoss,
    CyclipLoss,
    FilipLoss,
    LocalAlignmentLoss,
    SigLipLoss,
    SparcLoss,
)
from medfast.ops import (
    clip_loss,
    cyclip_loss,
    filip_loss,
    local_alignment_loss,
    siglip_loss,
    sparc_loss,
)


@pytest.fixture
def features():
    torch.manual_seed(0)
    return [F.normalize(torch.randn(9, 16), dim=-1) for _ in range(2)]


def test_clip_loss_is_the_op(features):
    want = clip_loss(*features, 14.3)
    torch.testing.assert_close(ClipLoss()(*features, torch.tensor(14.3)), want)
    found = ClipLoss(cache_labels=True)(*features, 14.3, output_dict=True)
    assert found.keys() == {"contrastive_loss"}
    torch.testing.assert_close(found["contrastive_loss"], want)


def test_a_bias_does_not_change_a_softmax(features):
    bias = torch.tensor(-10.0, requires_grad=True)
    found = ClipLoss()(*features, 14.3, bias)
    torch.testing.assert_close(found, ClipLoss()(*features, 14.3))
    found.backward()
    assert bias.grad == 0


def test_clip_loss_takes_positives(features):
    ids = torch.arange(9) // 2
    torch.testing.assert_close(
        ClipLoss()(*features, 14.3, positives=ids), clip_loss(*features, 14.3, positives=ids)
    )


def test_local_loss_alone_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"gather_with_grad=True.*another direction"):
        ClipLoss(local_loss=True)
    ClipLoss(local_loss=True, gather_with_grad=True)


@pytest.mark.parametrize("loss", [ClipLoss, SigLipLoss])
def test_another_number_of_processes_than_run_is_refused(loss, features):
    with pytest.raises(RuntimeError, match=rf"{loss.__name__}: world_size must be .*, 1; got 2"):
        loss(rank=1, world_size=2)(*features, torch.tensor(14.3), torch.tensor(-10.0))


def test_siglip_loss_is_the_op(features):
    scale, bias = torch.tensor(14.3), torch.tensor(-5.0)
    want = siglip_loss(*features, scale, bias)
    torch.testing.assert_close(SigLipLoss()(*features, scale, bias), want)
    found = SigLipLoss(True, 0, 1, "gather")(*features, 14.3, -5.0, output_dict=True)
    assert found.keys() == {"contrastive_loss"}
    torch.testing.assert_close(found["contrastive_loss"], want)


def test_siglip_loss_does_without_a_bias(features):
    torch.testing.assert_close(
        SigLipLoss()(*features, 14.3, None), siglip_loss(*features, 14.3, 0.0)
    )


def test_an_unknown_exchange_names_the_nearest():
    with pytest.raises(ValueError, match=r"SigLipLoss: dist_impl 'bidi' is not known.*'bidir'"):
        SigLipLoss(dist_impl="bidi")


def test_cyclip_loss_is_the_op(features):
    torch.testing.assert_close(CyclipLoss()(*features), cyclip_loss(*features))


@pytest.mark.parametrize(
    ("loss", "more"),
    [(ClipLoss, (1.0,)), (SigLipLoss, (1.0, 0.0)), (CyclipLoss, ())],
)
def test_the_implementation_reaches_the_op(features, loss, more):
    with pytest.raises(ValueError, match="impl 'tritn' is not known"):
        loss(impl="tritn")(*features, *more)


@pytest.fixture
def tokens():
    """Patches, words and both masks."""
    torch.manual_seed(0)
    patches, words = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    return patches, words, torch.arange(5).expand(3, 5) < 4, torch.arange(4).expand(3, 4) < 3


def test_local_alignment_loss_is_the_op(tokens):
    *inputs, patch_mask = tokens
    torch.testing.assert_close(
        LocalAlignmentLoss(temp_pairs=7.0)(*inputs, patch_mask),
        local_alignment_loss(*inputs, patch_mask=patch_mask, temp_pairs=7.0),
    )


def test_temperatures_can_be_learned(tokens):
    temperatures = {
        f"temp_{name}": torch.nn.Parameter(torch.tensor(start))
        for name, start in (("attention", 4.0), ("words", 5.0), ("pairs", 10.0))
    }
    loss = LocalAlignmentLoss(**temperatures)
    assert dict(loss.named_parameters()) == temperatures
    loss(*tokens).backward()
    assert all(t.grad.abs() > 0 for t in temperatures.values())


def test_filip_loss_is_the_op(tokens):
    *inputs, patch_mask = tokens
    torch.testing.assert_close(
        FilipLoss()(*inputs, 14.3, patch_mask), filip_loss(*inputs, 14.3, patch_mask=patch_mask)
    )


def test_sparc_loss_is_the_op(tokens):
    *inputs, patch_mask = tokens
    torch.testing.assert_close(
        SparcLoss(threshold=0.5)(*inputs, 14.3, patch_mask),
        sparc_loss(*inputs, 14.3, patch_mask=patch_mask, threshold=0.5),
    )


@pytest.mark.parametrize(
    ("loss", "more"), [(LocalAlignmentLoss, ()), (FilipLoss, (1.0,)), (SparcLoss, (1.0,))]
)
def test_the_implementation_reaches_the_local_op(tokens, loss, more):
    with pytest.raises(ValueError, match="impl 'tritn' is not known"):
        loss(impl="tritn")(*tokens[:3], *more)


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_local_losses_train_any_model_with_tokens(impl):
    """Two linear heads on plain tensors of patches and words, no other part of medfast."""
    torch.manual_seed(0)
    seen = torch.randn(8, 6, 12)
    said = seen[:, :4] @ torch.randn(12, 10)  # word t is about patch t
    mask = torch.ones(8, 4, dtype=torch.bool)
    heads = torch.nn.ModuleList([torch.nn.Linear(12, 16), torch.nn.Linear(10, 16)])
    losses = (LocalAlignmentLoss(impl=impl), FilipLoss(impl), SparcLoss(impl=impl))
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    history = []
    for _ in range(60):
        patches, words = heads[0](seen), heads[1](said)
        units = F.normalize(patches, dim=-1), F.normalize(words, dim=-1)
        terms = (
            losses[0](patches, words, mask),
            losses[1](*units, mask, 14.3),
            losses[2](patches, words, mask, 14.3),
        )
        history.append([term.item() for term in terms])
        optimizer.zero_grad()
        sum(terms).backward()
        optimizer.step()
    for first, last in zip(history[0], history[-1], strict=True):
        assert last < first / 3
