import pytest
import torch

from medfast.models.fusion import FusionHead, standardised


@pytest.fixture
def head():
    torch.manual_seed(0)
    return FusionHead(12, 5, 20, 7, width=16, heads=2).eval()


def _features(batch=3, words=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(batch, 5, 12, generator=generator)
    tokens = torch.randn(batch, words, 20, generator=generator)
    return patches, tokens, torch.ones(batch, words, dtype=torch.bool)


def test_it_scores_every_candidate(head):
    assert head(*_features()).shape == (3, 7)
    assert head(*_features(batch=1, words=1)).shape == (1, 7)


def test_it_has_the_size_that_is_stated():
    def weights(layers):
        head = FusionHead(256, 36, 128, 20, layers=layers)
        return sum(parameter.numel() for parameter in head.parameters())

    assert weights(2) - weights(1) == pytest.approx(1.05e6, rel=0.01)


def test_its_layers_begin_with_weights_of_their_own(head):
    first, second = (layer.linear1.weight for layer in head.layers)
    assert not torch.equal(first, second)


def test_padding_changes_nothing(head):
    patches, words, mask = _features()
    more = torch.cat([words, torch.full((3, 2, 20), 9.0)], 1)
    longer = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
    torch.testing.assert_close(head(patches, more, longer), head(patches, words, mask))


def test_an_answer_depends_on_image_question_and_the_places_of_patches(head):
    patches, words, mask = _features()
    logits = head(patches, words, mask)
    others, other_words, _ = _features(seed=1)
    for changed in (
        head(others, words, mask),
        head(patches, other_words, mask),
        head(patches.flip(1), words, mask),
    ):
        assert (changed - logits).abs().amax() > 1e-3


def test_without_the_image_only_the_question_counts(head):
    _, words, mask = _features()
    words = words[:1].expand(3, -1, -1)
    logits = head(None, words, mask)
    assert logits.shape == (3, 7)
    torch.testing.assert_close(logits[0], logits[2])


def test_what_stands_for_no_image_is_learnt(head):
    _, words, mask = _features()
    head(None, words, mask).sum().backward()
    assert head.no_image.grad.abs().amax() > 0
    assert head.place.grad is None


def test_the_scale_of_the_towers_does_not_matter(head):
    patches, words, mask = _features()
    scaled = head(1000 * patches + 5, 0.1 * words, mask)
    torch.testing.assert_close(scaled, head(patches, words, mask), rtol=1e-2, atol=1e-3)


def test_standardised_features_fit_fp16_and_stay_as_they_are():
    features = torch.zeros(1, 768, dtype=torch.float32)
    features[0, 3] = 1e30
    once = standardised(features)
    assert once.half().isfinite().all()
    torch.testing.assert_close(standardised(once), once, rtol=1e-3, atol=1e-3)


def test_channels_that_vary_little_count_as_much_as_others(head):
    patches, words, mask = _features(batch=64)
    # Much the same for all images, but for a little.
    patches = 20 * torch.randn(12, generator=torch.Generator().manual_seed(3)) + patches
    mask[:, 3] = False
    head.measure(patches, words, mask)
    seen = head.patch_scale(patches).flatten(0, 1)
    torch.testing.assert_close(seen.mean(0), torch.zeros(12), rtol=0, atol=1e-4)
    torch.testing.assert_close(seen.std(0, correction=0), torch.ones(12), rtol=1e-3, atol=0)
    said = head.word_scale(words)[mask]
    torch.testing.assert_close(said.mean(0), torch.zeros(20), rtol=0, atol=1e-4)


def test_a_channel_that_does_not_vary_stays_finite(head):
    patches, words, mask = (x[:1].expand(3, *x.shape[1:]) for x in _features())
    head.measure(patches[:, :1], words[:, :1], mask[:, :1])
    assert head(patches, words, mask).isfinite().all()
    assert head.patch_scale(patches[:, :1]).abs().amax() < 1e-3
