import pytest
import torch
import torch.nn.functional as F

from medfast.evals.encode import Embeddings
from medfast.evals.features import GlobalFeatures
from medfast.evals.retrieval import retrieval
from medfast.evals.two_choice import two_choice
from medfast.evals.zero_shot import zero_shot


class TableEncoder:
    """Embeds a text as the row of a table."""

    def __init__(self, table):
        self.table = table

    def texts(self, texts):
        return _unit([self.table[t] for t in texts])


def _unit(rows):
    return GlobalFeatures(F.normalize(torch.tensor(rows), dim=-1))


def test_retrieval_by_hand():
    # Caption 1 lies nearest to image 0 and caption 2 to image 1; pair 0 is right.
    image = GlobalFeatures(torch.eye(3))
    text = _unit([[1, 0, 0.1], [0.9, 0.3, 0.1], [0, 0.8, 0.6]])
    found = retrieval(Embeddings(image, text, torch.arange(3), torch.tensor([0, 0, 1])))
    assert found["n"] == 3
    assert found["metrics"]["text_to_image_R@1"] == pytest.approx(1 / 3)
    assert found["metrics"]["image_to_text_R@1"] == pytest.approx(2 / 3)
    assert found["metrics"]["text_to_image_R@5"] == 1
    assert found["chance"]["text_to_image_R@1"] == pytest.approx(1 / 3)
    assert found["chance"]["text_to_image_R@5"] == 1
    low, high = found["ci95"]["text_to_image_R@1"]
    assert 0 <= low <= 1 / 3 <= high <= 1


def test_zero_shot_by_hand():
    encoder = TableEncoder({"a": [1.0, 0.0], "also a": [1.0, 0.2], "b": [0.0, 1.0]})
    images = _unit([[1.0, 0.1], [0.2, 1.0], [0.9, 0.3], [1.0, 0.0]])
    found = zero_shot(encoder, images, [0, 1, 1, 0], [0, 1, 2, 3], [["a", "also a"], ["b"]])
    assert found["metrics"]["accuracy"] == 0.75
    assert found["n"] == 4
    assert found["classes"] == 2
    assert found["chance"]["accuracy"] == 0.5
    assert len(found["prompts_sha256"]) == 64


def test_zero_shot_chance_is_the_most_frequent_class():
    encoder = TableEncoder({"a": [1.0, 0.0], "b": [0.0, 1.0]})
    images = GlobalFeatures(torch.eye(2).repeat(2, 1))
    found = zero_shot(encoder, images, [0, 0, 0, 1], [0, 1, 2, 3], [["a"], ["b"]])
    assert found["chance"]["accuracy"] == 0.75


def test_two_choice_by_hand_and_ties_are_wrong():
    encoder = TableEncoder({"left": [1.0, 0.0], "right": [0.0, 1.0]})
    images = _unit([[1.0, 0.1], [0.1, 1.0], [1.0, 1.0]])
    found = two_choice(encoder, images, [0, 1, 2], ["left"] * 3, ["right"] * 3)
    assert found["metrics"]["accuracy"] == pytest.approx(1 / 3)
    assert found["chance"]["accuracy"] == 0.5
    assert found["n"] == 3
