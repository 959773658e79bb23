import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from medfast.evals.answers import (
    candidate_answers,
    exact,
    majority_answers,
    normalise_answer,
    score,
)

# Answers as people write them, and what they are compared as.
CASES = [
    # Case and white space.
    ("Pneumonia", "pneumonia"),
    ("  right \t upper\nlobe ", "right upper lobe"),
    # Punctuation, but for what belongs to a number or compares.
    ("Edema.", "edema"),
    ("liver, spleen; kidney", "liver spleen kidney"),
    ("T2-weighted", "t2 weighted"),
    ("lung_left", "lung left"),
    ("fig.3", "fig 3"),
    ("3.5 cm", "3.5 cm"),
    (".5", ".5"),
    ("1.", "1"),
    ("-5 HU", "-5 hu"),
    ("5-6", "5 6"),
    ("1,000,000", "1000000"),
    ("5,6", "5 6"),
    ("1,2345", "1 2345"),
    ("50 %", "50%"),
    (">5 cm", "> 5 cm"),
    ("5cm", "5 cm"),
    ("12mm.", "12 mm"),
    ("?!", ""),
    ("", ""),
    # Articles, but for the last word.
    ("The left lung", "left lung"),
    ("in an artery", "in artery"),
    ("Hepatitis A", "hepatitis a"),
    ("a", "a"),
    # Number words, as words of their own.
    ("Two", "2"),
    ("ten ribs", "10 ribs"),
    ("zero", "0"),
    ("someone", "someone"),
    ("none", "none"),
    # Yes and no, as whole answers.
    ("Yes.", "yes"),
    ("Y", "yes"),
    ("true", "yes"),
    ("NO!", "no"),
    ("n", "no"),
    ("False", "no"),
    ("yes, on the left", "yes on left"),
    ("vitamin y", "vitamin y"),
    # X-rays.
    ("X-ray", "x ray"),
    ("xray", "x ray"),
    ("Chest X Rays", "chest x rays"),
    # Plurals stay.
    ("lungs", "lungs"),
    # Unicode: widths, ligatures, accents, apostrophes, other alphabets.
    ("\uff23\uff34", "ct"),
    ("ﬁbrosis", "fibrosis"),
    ("Sjögren's", "sjogrens"),
    ("Crohn\u2019s disease", "crohns disease"),
    ("5 µm", "5 μm"),
    ("胸部", "胸部"),
    ("10 cm²", "10 cm2"),
]


@pytest.mark.parametrize(("text", "form"), CASES)
def test_an_answer_has_the_form_of_the_table(text, form):
    assert normalise_answer(text) == form


@given(st.text() | st.from_regex(r"[aAnyx15.,\-'% ²ß½-]{,12}", fullmatch=True))
@example("a y")
@example("1½")
def test_a_form_is_its_own_form(text):
    form = normalise_answer(text)
    assert normalise_answer(form) == form
    assert form == " ".join(form.split())


def test_candidates_are_the_distinct_answers_by_frequency_then_alphabet():
    answers = ["Two", "yes", "2", "Yes.", "lung", "?", "heart", "yes"]
    assert candidate_answers(answers) == ["yes", "2", "heart", "lung"]


def test_the_majority_answer_is_that_of_the_kind():
    kinds = ["is", "is", "is", "what", "what", "how"]
    answers = ["Yes", "no", "no", "lung", "heart", "?"]
    # Of "lung" and "heart", equally frequent everywhere, the first by the alphabet; "how" has no
    # answer, and "why" was never asked.
    asked = ["is", "what", "how", "why"]
    assert majority_answers(kinds, answers, asked) == ["no", "heart", "no", "no"]


def test_of_equally_frequent_answers_the_majority_is_the_one_more_frequent_among_all():
    kinds = ["is", "is", "what"]
    assert majority_answers(kinds, ["a b", "z", "z"], ["is"]) == ["z"]


def test_exact_compares_forms_and_nothing_is_never_right():
    predicted = ["yes", "2", "lungs", "left lung", ""]
    answers = ["Yes.", "two", "lung", "the left lung", "?"]
    assert exact(predicted, answers).tolist() == [1, 1, 0, 1, 0]


def test_scores_by_hand():
    correct = np.array([1.0, 0, 1, 1, 0])
    types = ["closed", "closed", "closed", "open", "open"]
    found = score(correct, types, ["a", "a", "b", "b", "c"])
    assert found["n_by"] == {"accuracy": 5, "accuracy_closed": 3, "accuracy_open": 2}
    assert found["metrics"] == pytest.approx(
        {"accuracy": 0.6, "accuracy_closed": 2 / 3, "accuracy_open": 0.5}
    )
    # Image c alone has 0 of 1, image b alone 2 of 2, and both are drawn now and then.
    assert found["ci95"]["accuracy"] == [0, 1]


def test_an_interval_draws_images_and_not_questions():
    # Ten questions about each of four images: half of the images, always wholly, are right.
    correct = np.repeat([1.0, 0, 1, 0], 10)
    images = np.repeat(list("abcd"), 10).tolist()
    low, high = score(correct, ["open"] * 40, images)["ci95"]["accuracy"]
    assert (low, high) == (0, 1)
    low, high = score(correct, ["open"] * 40, [str(i) for i in range(40)])["ci95"]["accuracy"]
    assert 0.3 < low < 0.5 < high < 0.7


def test_a_type_that_is_not_asked_has_no_accuracy():
    found = score(np.array([1.0, 0.0]), ["open", "open"], ["a", "b"])
    assert found["n_by"]["accuracy_closed"] == 0
    assert set(found["metrics"]) == set(found["ci95"]) == {"accuracy", "accuracy_open"}
