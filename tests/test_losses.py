import inspect

import pytest
import torch
import torch.nn.functional as F

from medfast import ClipLoss, LocalAlignmentLoss
from medfast.ops import clip_loss, local_alignment_loss


@pytest.fixture
def features():
    torch.manual_seed(0)
    return [F.normalize(torch.randn(9, 16), dim=-1) for _ in range(2)]


def test_clip_loss_has_open_clips_signatures():
    assert list(inspect.signature(ClipLoss).parameters)[:6] == [
        *("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod"),
    ]
    assert list(inspect.signature(ClipLoss.forward).parameters)[1:6] == [
        *("image_features", "text_features", "logit_scale", "logit_bias", "output_dict"),
    ]


def test_clip_loss_is_the_op(features):
    want = clip_loss(*features, 14.3)
    torch.testing.assert_close(ClipLoss()(*features, torch.tensor(14.3)), want)
    found = ClipLoss(cache_labels=True)(*features, 14.3, output_dict=True)
    assert found.keys() == {"contrastive_loss"}
    torch.testing.assert_close(found["contrastive_loss"], want)


def test_a_bias_does_not_change_a_softmax(features):
    torch.testing.assert_close(
        ClipLoss()(*features, 14.3, torch.tensor(-10.0)), ClipLoss()(*features, 14.3)
    )


def test_clip_loss_takes_positives(features):
    ids = torch.arange(9) // 2
    torch.testing.assert_close(
        ClipLoss()(*features, 14.3, positives=ids), clip_loss(*features, 14.3, positives=ids)
    )


def test_local_loss_alone_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"gather_with_grad=True.*another direction"):
        ClipLoss(local_loss=True)
    ClipLoss(local_loss=True, gather_with_grad=True)


def test_more_processes_are_refused():
    with pytest.raises(ValueError, match="world_size must be 1"):
        ClipLoss(world_size=2)


def test_local_alignment_loss_is_the_op():
    torch.manual_seed(0)
    patches, tokens = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    mask = torch.arange(5).expand(3, 5) < 4
    torch.testing.assert_close(
        LocalAlignmentLoss(temp_pairs=7.0)(patches, tokens, mask),
        local_alignment_loss(patches, tokens, mask, temp_pairs=7.0),
    )
