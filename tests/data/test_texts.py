import random

import pytest

from medfast.data.texts import reworded

TEN = "one large nodule in the left upper lobe near pleura"


def _views(caption, count):
    return [reworded(caption, random.Random(seed)).split() for seed in range(count)]


def _moved(words, view):
    return sum(a != b for a, b in zip(words, view, strict=True))


def test_half_the_views_swap_words_and_half_drop_a_tenth():
    words = TEN.split()
    views = _views(TEN, 4000)
    swapped = [view for view in views if sorted(view) == sorted(words) and view != words]
    dropped = [view for view in views if view == [word for word in words if word in view]]
    assert len(swapped) + len(dropped) == len(views)
    # Four standard deviations.
    assert abs(len(swapped) / len(views) - 0.5) < 0.032
    assert all(_moved(words, view) == 2 for view in swapped)
    kept = sum(map(len, dropped)) / (len(words) * len(dropped))
    assert abs(kept - 0.9) < 0.009


def test_long_captions_have_more_pairs_swapped():
    words = [str(number) for number in range(30)]
    swapped = [v for v in _views(" ".join(words), 400) if len(v) == 30 and v != words]
    assert max(_moved(words, view) for view in swapped) == 6


def test_something_is_always_left():
    assert {" ".join(view) for view in _views("left lung", 2000)} == {
        "left lung",
        "lung left",
        "left",
        "lung",
    }


@pytest.mark.parametrize("caption", ["nodule", "", "\u80f8\u90e8"])
def test_one_word_stays(caption):
    assert all(reworded(caption, random.Random(seed)) == caption for seed in range(50))


def test_unusual_white_space_parts_words():
    for seed in range(50):
        view = reworded("\u3000left\u00a0lung \t nodule\r\n", random.Random(seed))
        assert view == " ".join(view.split())
        assert set(view.split(" ")) <= {"left", "lung", "nodule"}


def test_a_view_depends_on_its_generator_alone():
    assert _views(TEN, 20) == _views(TEN, 20)
    assert _views(TEN, 20)[0] != _views(TEN, 20)[1]
