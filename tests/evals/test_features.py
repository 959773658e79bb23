"""Matching images with texts, against literal loops over pairs and parts."""

import pytest
import torch
import torch.nn.functional as F

from medfast.data import read_split
from medfast.data.loader import Loader
from medfast.data.skipped import SkippedSamples
from medfast.evals.encode import Embeddings, Encoder
from medfast.evals.features import GlobalFeatures, LocalFeatures
from medfast.evals.retrieval import retrieval
from medfast.evals.two_choice import two_choice
from medfast.evals.zero_shot import zero_shot
from medfast.models import PRESETS
from medfast.models.pair import build_model

# More pairs than one block of own scores.
N, P, T, D = 37, 5, 6, 16


def _local(seed, parts, lengths=None, count=N):
    generator = torch.Generator().manual_seed(seed)
    unit = F.normalize(torch.randn(count, parts, D, generator=generator), dim=-1)
    most = torch.full((count,), parts) if lengths is None else lengths
    return LocalFeatures(unit, torch.arange(parts) < most[:, None])


@pytest.fixture
def images():
    return _local(0, P)


@pytest.fixture
def texts(images):
    """Captions of 1 to T words, that have some of their image in them."""
    texts = _local(1, T, torch.arange(N) % T + 1)
    mixed = F.normalize(texts.unit + 0.5 * images.unit[:, :1], dim=-1)
    return LocalFeatures(mixed, texts.mask)


def _loop(images, texts):
    """Return the scores of every image and text, [N, M] and [M, N], one pair at a time."""
    to_text = torch.empty(len(images.unit), len(texts.unit))
    to_image = torch.empty_like(to_text.T)
    for j, (patches, patch_mask) in enumerate(zip(images.unit, images.mask, strict=True)):
        for i, (tokens, word_mask) in enumerate(zip(texts.unit, texts.mask, strict=True)):
            cosines = [[p @ w for w in tokens[word_mask]] for p in patches[patch_mask]]
            to_text[j, i] = sum(max(row) for row in cosines) / len(cosines)
            columns = list(zip(*cosines, strict=True))
            to_image[i, j] = sum(max(column) for column in columns) / len(columns)
    return to_text, to_image


def test_late_interaction_ranks_as_a_literal_loop_does(images, texts):
    to_text, to_image = _loop(images, texts)
    for found, scores in zip(images.ranks(texts), (to_text, to_image), strict=True):
        want = [sum(row[j] >= row[k] for j in range(N) if j != k) for k, row in enumerate(scores)]
        assert found.tolist() == want
    image_to_text, text_to_image = images.ranks(texts)
    assert image_to_text.tolist() != text_to_image.tolist()
    rows = torch.arange(N)
    found = retrieval(Embeddings(images, texts, rows, rows))["metrics"]
    assert found["image_to_text_R@5"] == pytest.approx((image_to_text < 5).float().mean().item())
    assert found["text_to_image_R@5"] == pytest.approx((text_to_image < 5).float().mean().item())


def test_late_interaction_scores_of_pairs_and_classes_are_those_of_the_loop(images, texts):
    to_text, _ = _loop(images, texts)
    torch.testing.assert_close(images.own_scores(texts), to_text.diagonal())
    classes = [range(3), range(3, 4), range(4, 9)]
    found = images.class_scores([texts[rows] for rows in classes])
    want = torch.stack([to_text[:, rows].mean(1) for rows in classes], dim=1)
    torch.testing.assert_close(found, want)


def test_ties_count_against_the_query():
    one = torch.ones(3, 1, dtype=torch.bool)
    same = LocalFeatures(F.normalize(torch.ones(3, 1, 4), dim=-1), one)
    assert [ranks.tolist() for ranks in same.ranks(same)] == [[2, 2, 2], [2, 2, 2]]


def test_a_score_of_nan_comes_last(images, texts):
    damaged = images.unit.clone()
    damaged[4] = torch.nan
    image_to_text, text_to_image = LocalFeatures(damaged, images.mask).ranks(texts)
    assert image_to_text[4] == text_to_image[4] == N - 1
    assert (text_to_image >= 1).all()  # the NaN of the others' queries is above their own score


def test_texts_of_several_lengths_join():
    long, short = _local(2, T), _local(3, 2)
    joined = LocalFeatures.cat([short, long])
    assert joined.unit.shape == (2 * N, T, D)
    assert joined.mask.sum() == N * (2 + T)
    images = _local(0, P, count=2 * N)
    want = torch.cat([images[range(N)].own_scores(short), images[range(N, 2 * N)].own_scores(long)])
    torch.testing.assert_close(images.own_scores(joined), want)


def test_global_features_match_as_their_cosine_says():
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(8, D), dim=-1) for _ in range(2))
    images, texts = GlobalFeatures(image), GlobalFeatures(text)
    cosines = image @ text.T
    torch.testing.assert_close(images.own_scores(texts), cosines.diagonal())
    image_to_text, text_to_image = images.ranks(texts)
    assert image_to_text.tolist() == [int((row > row[i]).sum()) for i, row in enumerate(cosines)]
    assert text_to_image.tolist() == [int((row > row[i]).sum()) for i, row in enumerate(cosines.T)]
    found = images.class_scores([texts[[0, 1]], texts[[2]]])
    means = torch.stack([F.normalize(text[:2].mean(0), dim=0), text[2]])
    torch.testing.assert_close(found, image @ means.T)


class WordEncoder:
    """Embeds a text as its words, each a row of the identity."""

    def texts(self, texts):
        words = [[int(word) for word in text.split()] for text in texts]
        parts = [
            LocalFeatures(torch.eye(4)[row][None], torch.ones(1, len(row), dtype=torch.bool))
            for row in words
        ]
        return LocalFeatures.cat(parts)


def test_zero_shot_and_two_choice_ask_for_image_to_text_scores():
    """Image 0 shows 0 and 1, image 1 shows 2 alone: a text's other words take nothing away."""
    images = LocalFeatures(
        torch.eye(4)[torch.tensor([[0, 1], [2, 2]])], torch.ones(2, 2, dtype=torch.bool)
    )
    encoder = WordEncoder()
    prompts = [["0 1 3", "3"], ["2 3", "2"]]  # of class 0 half the prompts fit image 0
    assert zero_shot(encoder, images, [0, 1], [0, 1], prompts)["metrics"]["accuracy"] == 1
    found = two_choice(encoder, images, [0, 1], ["0 1 3", "3"], ["0", "2"])
    assert found["metrics"]["accuracy"] == 0.5


@pytest.mark.parametrize("late_interaction", [False, True])
def test_the_encoder_gives_what_pairs_are_scored_by(phantom, tokenizer, late_interaction):
    torch.manual_seed(0)
    model = build_model(PRESETS["tiny"], tokenizer, token_features=True)
    encoder = Encoder(model, tokenizer, torch.device("cpu"), "fp32", late_interaction)
    records = read_split("roco", phantom, "test").records
    # Batches of five: of several lengths of caption.
    loader = Loader(records, tokenizer, 96, batch_size=5)
    embeddings = encoder.pairs(loader, SkippedSamples(phantom / "skipped.jsonl", 120, 0.1))
    n = len(records)
    for features in (embeddings.image, embeddings.text):
        assert isinstance(features, LocalFeatures if late_interaction else GlobalFeatures)
        unit = features.unit[features.mask] if late_interaction else features.unit
        torch.testing.assert_close(unit.norm(dim=-1), torch.ones(len(unit)))
    captions = [record.caption for record in records]
    again = encoder.texts(captions, batch_size=7)
    if late_interaction:
        assert embeddings.image.unit.shape == (n, 36, 128)
        assert embeddings.image.mask.all()
        assert torch.equal(again.mask, tokenizer(captions).word_mask)
        torch.testing.assert_close(
            again.unit[again.mask], embeddings.text.unit[embeddings.text.mask]
        )
    else:
        torch.testing.assert_close(again.unit, embeddings.text.unit)
    assert [ranks.shape for ranks in embeddings.ranks] == [(n,), (n,)]
