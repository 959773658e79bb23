import re

import pytest

from medfast.data.classification import CLASSIFICATION, EXTRA, facts
from medfast.errors import UsageError
from medfast.evals.prompts import CHOICES, prompt_hash, prompts
from medfast.evals.prompts.phrases import PHRASES
from medfast.evals.prompts.templates import TEMPLATES

KEYS = [*CLASSIFICATION, *EXTRA]


@pytest.mark.parametrize("templates", CHOICES)
@pytest.mark.parametrize("key", KEYS)
def test_every_class_of_every_set_has_prompts_of_its_own(key, templates):
    found = prompts(key, templates)
    assert len(found) == len(facts(key).classes)
    every = [prompt for own in found for prompt in own]
    assert all(len(own) >= 4 for own in found)
    assert len(set(every)) == len(every)
    assert not any(re.search(r"[{}]|  |^ | $", prompt) for prompt in every)


@pytest.mark.parametrize("key", KEYS)
def test_every_phrase_comes_in_every_template_of_the_modality(key):
    assert len(PHRASES[key]) == len(facts(key).classes)
    for own, phrases in zip(prompts(key), PHRASES[key], strict=True):
        assert len(own) == len(TEMPLATES[facts(key).modality]) * len(phrases)
        assert all(any(phrase in prompt for prompt in own) for phrase in phrases)


def test_every_template_names_the_class_once():
    for templates in TEMPLATES.values():
        assert all(template.count("{}") == 1 for template in templates)


def test_only_histology_is_called_histology():
    for key in KEYS:
        spoken = " ".join(prompt for own in prompts(key) for prompt in own)
        assert ("histo" in spoken) == (facts(key).modality == "histology"), key


def test_histology4_is_that_of_earlier_work():
    assert prompts("octmnist", "histology4")[2] == [
        "a histopathology slide showing drusen",
        "histopathology image of drusen",
        "pathology tissue showing drusen",
        "presence of drusen tissue on image",
    ]
    assert prompts("sicap", "histology4")[3][0] == (
        "a histopathology slide showing isolated nest cells without lumen roseting patterns"
    )


def test_a_class_can_be_left_out():
    every = prompts("nct_crc")
    assert prompts("nct_crc", without=["background"]) == [every[0], *every[2:]]


def test_the_hash_tells_other_words_and_another_order():
    found = prompts("bach")
    assert prompt_hash(found) == prompt_hash(prompts("bach"))
    # Of the JSON text [["a", "b"], ["c"]].
    assert prompt_hash([["a", "b"], ["c"]]) == (
        "3aafec9ce63065d49bda3bb397224d730d9c3e9d8c7ac2d8148be4e779c96917"
    )
    others = [found[::-1], [own[:1] for own in found], prompts("bach", "histology4")]
    assert len({prompt_hash(other) for other in (found, *others)}) == 4


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("bach", "histology"), "--prompts 'histology' is not known. Did you mean 'histology4'"),
        (("bahc",), "classification set 'bahc' is not known"),
        (("bach", "default", ["x"]), "class of bach 'x' is not known"),
    ],
)
def test_unknown_names_are_refused(arguments, match):
    with pytest.raises(UsageError, match=match):
        prompts(*arguments)
