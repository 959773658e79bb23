import pytest
import torch
import torch.nn.functional as F

from medfast import ClipLoss, CyclipLoss, LocalAlignmentLoss, SigLipLoss
from medfast.ops import clip_loss, cyclip_loss, local_alignment_loss, siglip_loss


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
def test_more_processes_are_refused(loss):
    with pytest.raises(ValueError, match=f"{loss.__name__}: world_size must be 1 so far; got 2"):
        loss(rank=1, world_size=2)


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


def test_local_alignment_loss_is_the_op():
    torch.manual_seed(0)
    patches, tokens = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    mask = torch.arange(5).expand(3, 5) < 4
    torch.testing.assert_close(
        LocalAlignmentLoss(temp_pairs=7.0)(patches, tokens, mask),
        local_alignment_loss(patches, tokens, mask, temp_pairs=7.0),
    )
