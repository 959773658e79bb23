"""Retrieval with one positive per query and with all of them, against hand-made tables."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medfast.evals.bootstrap import bootstrap_ci
from medfast.evals.encode import Embeddings
from medfast.evals.features import GlobalFeatures, LocalFeatures
from medfast.evals.retrieval import DEEP_KS, retrieval, retrieval_figures

# Row: image, column: caption. Pairs 0 and 1 are of one study; captions 2 and 3 are one text.
#   image 0: its own caption is fourth, that of its study the best.
#   image 1: its own is third, behind that of pair 0, which is right too, and that of pair 4.
#   image 2: its own text stands there twice, behind caption 0.
#   image 3: its own text, twice, is the best.
#   image 4: its own is last.
SCORES = torch.tensor(
    [
        [0.5, 0.9, 0.6, 0.6, 0.1],
        [0.7, 0.6, 0.1, 0.1, 0.8],
        [0.9, 0.1, 0.8, 0.8, 0.2],
        [0.3, 0.2, 0.9, 0.9, 0.1],
        [0.5, 0.6, 0.7, 0.7, 0.4],
    ]
)
STUDY = [7, 7, 1, 2, 3]
CAPTIONS = ["a", "b", "c", "c", "d"]


def _embeddings(scores, study):
    """Return features with these scores: images are rows of the identity."""
    images = GlobalFeatures(torch.eye(len(scores)))
    rows = torch.arange(len(scores))
    return Embeddings(images, GlobalFeatures(scores.T.contiguous()), rows, torch.tensor(study))


def test_figures_by_hand():
    found = retrieval_figures(_embeddings(SCORES, STUDY), CAPTIONS)
    metrics = found["metrics"]
    # Ranks from 1 of each image's own caption, equal ones counting against it: 4, 3, 3, 2, 5; of
    # the best right one, with the other right ones taken out: 1, 2, 2, 1, 5.
    assert metrics["image_to_text_R@1"] == 0
    assert metrics["image_to_text_R@5"] == 1
    assert metrics["image_to_text_median_rank"] == 3
    assert metrics["image_to_text_all_positives_R@1"] == pytest.approx(2 / 5)
    assert metrics["image_to_text_all_positives_R@5"] == 1
    assert metrics["image_to_text_all_positives_median_rank"] == 2
    # Of each caption's own image: 4, 3, 2, 1, 2. Of the best right one: caption 0 has images 0 and
    # 1 behind image 2, caption 1 the same two before all others; captions 2 and 3 have images 2 and
    # 3, of which 3 is before all others; caption 4 has its own behind image 1.
    assert metrics["text_to_image_R@1"] == pytest.approx(1 / 5)
    assert metrics["text_to_image_median_rank"] == 2
    assert metrics["text_to_image_all_positives_R@1"] == pytest.approx(3 / 5)
    assert metrics["text_to_image_all_positives_median_rank"] == 1
    assert found["n"] == found["gallery"] == 5
    # Images: 2, 2, 2, 2, 1. Captions: likewise.
    assert found["positives"] == {"image_to_text": 9 / 5, "text_to_image": 9 / 5}
    for k in (10, 50, 200):
        assert metrics[f"image_to_text_R@{k}"] == found["chance"][f"text_to_image_R@{k}"] == 1


def test_chance_by_hand():
    chance = retrieval_figures(_embeddings(SCORES, STUDY), CAPTIONS)["chance"]
    assert chance["image_to_text_R@1"] == pytest.approx(1 / 5)
    assert chance["image_to_text_median_rank"] == 3
    # Two of five are right for four queries, one for the other.
    assert chance["image_to_text_all_positives_R@1"] == pytest.approx((4 * 2 / 5 + 1 / 5) / 5)
    # By rank 1 it is found with 0.36, as above, and by rank 2 with (4 * 7/10 + 2/5) / 5 = 0.64.
    assert chance["image_to_text_all_positives_median_rank"] == 2
    four = retrieval_figures(_embeddings(torch.eye(4), range(4)), "abcd")["chance"]
    assert four["image_to_text_median_rank"] == 2.5
    assert four["image_to_text_all_positives_median_rank"] == 2.5
    assert four["image_to_text_R@1"] == 1 / 4


def test_equal_pictures_are_right_for_one_another():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.3, 0.2, 0.6]])
    embeddings = Embeddings(
        GlobalFeatures(torch.eye(2)[[0, 0, 1]]),
        GlobalFeatures(torch.tensor([[0.1, 0.3], [0.9, 0.2], [0.5, 0.6]])),
        torch.arange(3),
        torch.arange(3),
    )
    torch.testing.assert_close(embeddings.image.unit @ embeddings.text.unit.T, scores)
    apart = retrieval_figures(embeddings, "abc")["metrics"]
    assert apart["image_to_text_all_positives_R@1"] == pytest.approx(2 / 3)
    equal = retrieval_figures(embeddings, "abc", ["x", "x", "y"])["metrics"]
    assert equal["image_to_text_all_positives_R@1"] == 1
    # Caption 0 finds image 2 first, caption 1 its own picture, which stands there twice.
    assert equal["text_to_image_all_positives_R@1"] == pytest.approx(2 / 3)
    assert equal["text_to_image_R@1"] == pytest.approx(1 / 3)


def _literal(scores, right):
    """Return ranks from 0 of the best right item, from the definition."""
    ranks = []
    for row, own in zip(scores, right, strict=True):
        best = row[own].max()
        ranks.append(int((~(row < best) & ~own).sum()))
    return torch.tensor(ranks)


def _right(study, of_query, of_gallery):
    """Return which items are right for which query, bool [N, N], from the definition."""
    n = len(study)
    right = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        own = [k for k in range(n) if study[k] == study[i] or of_query[k] == of_query[i]]
        for j in range(n):
            right[i, j] = any(of_gallery[j] == of_gallery[k] for k in own)
    return right


@pytest.mark.parametrize("seed", range(4))
def test_all_positives_are_those_of_the_definition(seed):
    """Scores are coarse, so that many are equal; studies, captions and pictures overlap."""
    generator = torch.Generator().manual_seed(seed)
    n = 70
    study, caption, picture = (
        torch.randint(0, most, (n,), generator=generator).tolist() for most in (30, 20, 50)
    )
    image, text = (torch.randint(0, 3, (n, 8), generator=generator).float() for _ in range(2))
    image, text = (
        x[[own.index(value) for value in own]] for x, own in ((image, picture), (text, caption))
    )
    rows = torch.arange(n)
    found = retrieval_figures(
        Embeddings(GlobalFeatures(image), GlobalFeatures(text), rows, torch.tensor(study)),
        caption,
        picture,
    )
    scores = image @ text.T
    for name, own, right in (
        ("image_to_text", scores, _right(study, picture, caption)),
        ("text_to_image", scores.T, _right(study, caption, picture)),
    ):
        ranks = _literal(own, right)
        assert 0 < (ranks == 0).float().mean() < 1
        for k in DEEP_KS:
            want = (ranks < k).double().mean().item()
            assert found["metrics"][f"{name}_all_positives_R@{k}"] == pytest.approx(want)
        want = float(np.median(ranks + 1))
        assert found["metrics"][f"{name}_all_positives_median_rank"] == want
        assert found["positives"][name] == pytest.approx(right.sum(1).double().mean().item())


def test_intervals_draw_patients_where_they_are_told():
    # Of the first patient every image finds its caption, of the second none does.
    hits, patients = np.repeat([1.0, 0.0], 10), np.repeat(["a", "b"], 10)
    embeddings = _embeddings(torch.diag(torch.tensor(hits, dtype=torch.float32)), range(20))
    options = {"seed": 2, "resamples": 60}
    found, by_study = (
        retrieval_figures(embeddings, range(20), None, groups, **options)
        for groups in (patients, None)
    )
    name = "image_to_text_R@1"
    assert found["metrics"] == by_study["metrics"]
    assert found["ci95"][name] == bootstrap_ci(hits, patients, **options) == [0, 1]
    assert by_study["ci95"][name] == bootstrap_ci(hits, **options) != [0, 1]


def test_equal_texts_that_were_rounded_in_another_way_are_equal():
    """In a batch with longer texts a caption is summed in another order."""
    torch.manual_seed(0)
    text = F.normalize(torch.randn(1, 16), dim=-1)
    texts = text + 1e-7 * torch.randn(6, 16)
    images = F.normalize(text + 0.3 * torch.randn(6, 16), dim=-1)
    rows = torch.arange(6)
    embeddings = Embeddings(GlobalFeatures(images), GlobalFeatures(texts), rows, rows)
    found = retrieval_figures(embeddings, ["normal"] * 6)
    for name in ("image_to_text", "text_to_image"):
        assert found["metrics"][f"{name}_all_positives_R@1"] == 1
        assert found["metrics"][f"{name}_all_positives_median_rank"] == 1
    assert found["positives"] == {"image_to_text": 6, "text_to_image": 6}
    assert found["chance"]["image_to_text_all_positives_R@1"] == 1


def test_what_the_shorter_figures_say_stays_the_same():
    embeddings = _embeddings(
        torch.rand(40, 40, generator=torch.Generator().manual_seed(3)), range(40)
    )
    short, long = retrieval(embeddings), retrieval_figures(embeddings, range(40))
    assert set(short["metrics"]) == {
        f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    }
    for part in ("metrics", "chance"):
        assert {name: long[part][name] for name in short[part]} == pytest.approx(short[part])
    # Nothing is right but a query's own.
    for name, value in long["metrics"].items():
        if "all_positives" in name:
            assert value == long["metrics"][name.replace("_all_positives", "")]


def test_intervals_are_of_whole_studies_and_hold_their_value():
    found = retrieval_figures(_embeddings(SCORES, STUDY), CAPTIONS, seed=1)
    assert set(found["ci95"]) == set(found["metrics"]) == set(found["chance"])
    for name, (low, high) in found["ci95"].items():
        assert low <= found["metrics"][name] <= high
    again = retrieval_figures(_embeddings(SCORES, STUDY), CAPTIONS, seed=1)
    assert again == found
    # One study alone leaves nothing to draw.
    one = retrieval_figures(_embeddings(SCORES, [0] * 5), CAPTIONS)["ci95"]["image_to_text_R@1"]
    assert one == [0, 0]


def test_late_interaction_ranks_by_its_own_scores():
    generator = torch.Generator().manual_seed(0)
    n = 12
    image, text = (F.normalize(torch.randn(n, 3, 8, generator=generator), dim=-1) for _ in range(2))
    caption = [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    text = text[[caption.index(value) for value in caption]]
    mask = torch.ones(n, 3, dtype=torch.bool)
    study = torch.arange(n) // 2
    embeddings = Embeddings(
        LocalFeatures(image, mask), LocalFeatures(text, mask), torch.arange(n), study
    )
    products = torch.einsum("npd,mwd->nmpw", image, text)
    to_text, to_image = products.amax(3).mean(2), products.amax(2).mean(2).T
    found = retrieval_figures(embeddings, caption)["metrics"]
    picture, study = list(range(n)), study.tolist()
    for name, scores, right in (
        ("image_to_text", to_text, _right(study, picture, caption)),
        ("text_to_image", to_image, _right(study, caption, picture)),
    ):
        ranks = _literal(scores, right)
        for k in (1, 5):
            want = (ranks < k).double().mean().item()
            assert found[f"{name}_all_positives_R@{k}"] == pytest.approx(want)


def test_a_score_of_nan_finds_nothing():
    images = torch.eye(5)
    images[4] = torch.nan
    rows = torch.arange(5)
    embeddings = Embeddings(
        GlobalFeatures(images), GlobalFeatures(SCORES.T.contiguous()), rows, torch.tensor(STUDY)
    )
    found = retrieval_figures(embeddings, ["a", "b", "c", "e", "c"])["metrics"]
    assert not any(math.isnan(value) for value in found.values())
    # Of images 0 to 3 the first and the last find a right one; image 4, NaN, does not.
    assert found["image_to_text_all_positives_R@1"] <= 2 / 5


def test_one_pair_is_found():
    found = retrieval_figures(_embeddings(torch.ones(1, 1), [0]), ["a"])
    assert set(found["metrics"].values()) == set(found["chance"].values()) == {1.0}


def test_captions_of_other_pairs_are_refused():
    with pytest.raises(ValueError, match="of the 5 pairs; got 4 and 5"):
        retrieval_figures(_embeddings(SCORES, STUDY), CAPTIONS[:4])
