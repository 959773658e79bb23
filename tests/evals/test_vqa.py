import dataclasses
import random

import numpy as np
import pytest
import torch
from PIL import Image

from medfast.data.phantom.vqa import write_vqa
from medfast.data.records import Record
from medfast.data.tokens import Tokenizer
from medfast.data.vqa import read_questions
from medfast.data.vqa.questions import Question, image_origin
from medfast.errors import UsageError
from medfast.evals import vqa as module
from medfast.evals.encode import Encoder
from medfast.evals.vqa import Training, vqa
from medfast.models import PRESETS
from medfast.models.pair import build_model

SIZE = 32
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
NARROW = Training(width=64, lr=2e-3)
ONCE = dataclasses.replace(NARROW, epochs=1)
SHORT = dataclasses.replace(NARROW, epochs=3, patience=2, batch_size=32)
# Four patches an image: steps of milliseconds.
SMALL = dataclasses.replace(
    PRESETS["tiny"],
    image_size=SIZE,
    text={**PRESETS["tiny"].text, "hidden_size": 32, "intermediate_size": 64},
    embed_dim=32,
)


@pytest.fixture(scope="module")
def encoder():
    tokenizer = Tokenizer.train(["what colour is shown", "is this red green or blue"], 300, 16)
    torch.manual_seed(0)
    model = build_model(SMALL, tokenizer, token_features=False)
    return Encoder(model, tokenizer, torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Return training, validation and test questions about the colours of pictures."""
    folder = tmp_path_factory.mktemp("colours")
    return [
        _questions(folder, split, images)
        for split, images in (("train", 36), ("validation", 12), ("test", 18))
    ]


def _questions(folder, split, images):
    rng = random.Random(split)
    found = []
    for number in range(images):
        colour = list(COLOURS)[number % 3]
        noise = np.random.default_rng(number + 1000 * len(split)).integers(-20, 20, (40, 36, 3))
        path = folder / f"{split}{number}.png"
        Image.fromarray((np.array(COLOURS[colour]) + noise).astype(np.uint8)).save(path)
        named = rng.choice(list(COLOURS))
        asked = [
            ("what colour is shown", colour.title(), "open", "what"),
            (f"is this {named}", "Yes." if named == colour else "no", "closed", "is"),
        ]
        for question, answer, answer_type, kind in asked:
            found.append(
                Question(
                    key=f"{split} {len(found)}",
                    image=Record(path.name, path, ""),
                    question=question,
                    answer=answer,
                    answer_type=answer_type,
                    kind=kind,
                    origin=image_origin(path.read_bytes()),
                )
            )
    return found


@pytest.fixture(scope="module")
def row(encoder, splits):
    return vqa(
        encoder, *splits, SIZE, training=dataclasses.replace(NARROW, epochs=25, batch_size=16)
    )


def test_the_head_learns_what_only_the_image_tells(row):
    assert row["metrics"]["accuracy_open"] == 1
    assert row["metrics"]["accuracy"] >= 0.8
    assert row["baselines"]["question_only"]["metrics"]["accuracy"] <= 0.65
    gain = row["gain_over_question_only"]
    question_only = row["baselines"]["question_only"]["metrics"]["accuracy"]
    assert gain["accuracy"] == pytest.approx(row["metrics"]["accuracy"] - question_only)
    assert 0 < gain["ci95"][0] <= gain["accuracy"] <= gain["ci95"][1]


def test_a_row_says_how_many_questions_it_is_about(row):
    assert row["n"] == 36
    assert row["n_by"] == {"accuracy": 36, "accuracy_closed": 18, "accuracy_open": 18}
    assert (row["n_train"], row["n_validation"]) == (72, 24)
    assert row["candidates"] == 5
    assert row["not_a_candidate"] == 0
    assert row["skipped"] == {"train": 0, "validation": 0, "test": 0}
    low, high = row["ci95"]["accuracy"]
    assert 0 <= low <= row["metrics"]["accuracy"] <= high <= 1


def test_chance_is_the_majority_answer_of_each_kind(row, splits):
    train, _, test = splits
    closed = [q.answer for q in train if q.kind == "is"]
    assert closed.count("no") > closed.count("Yes.")
    right = [q.answer == "no" for q in test if q.kind == "is"]
    # Of the colours, equally frequent, "blue" is the first by the alphabet.
    blue = [q.answer == "Blue" for q in test if q.kind == "what"]
    assert row["chance"] == pytest.approx(
        {
            "accuracy": np.mean(right + blue),
            "accuracy_closed": np.mean(right),
            "accuracy_open": np.mean(blue),
        }
    )
    assert row["baselines"]["majority"]["metrics"] == row["chance"]


@pytest.fixture
def predictions(monkeypatch):
    """Return what heads answer, call by call."""
    found = []
    answers = module.Answerer.answers

    def spied(self, questions):
        own = answers(self, questions)
        found.append(own)
        return own

    monkeypatch.setattr(module.Answerer, "answers", spied)
    return found


def test_nothing_depends_on_the_answers_to_test_questions(encoder, splits, predictions):
    train, validation, test = splits
    rows = [vqa(encoder, train, validation, test, SIZE, training=SHORT)]
    seen = [list(own) for own in predictions]
    predictions.clear()
    others = [dataclasses.replace(q, answer="purple", answer_type="open", kind="") for q in test]
    rows.append(vqa(encoder, train, validation, others, SIZE, training=SHORT))
    assert predictions == seen
    assert rows[0]["fits"] == rows[1]["fits"]
    assert rows[0]["candidates"] == rows[1]["candidates"]
    assert rows[1]["metrics"] == {"accuracy": 0, "accuracy_open": 0}


def test_an_answer_that_training_never_gives_is_wrong_and_counted(encoder, splits, predictions):
    train, validation, test = splits
    odd = [
        dataclasses.replace(q, answer="purple" if i % 4 == 0 else q.answer)
        for i, q in enumerate(test)
    ]
    found = vqa(encoder, train, validation, odd, SIZE, training=SHORT)
    assert found["not_a_candidate"] == 0.25
    assert not any("purple" in own for own in predictions)
    assert found["metrics"]["accuracy"] <= 0.75


def test_training_questions_whose_answer_is_nothing_are_left_out(encoder, splits):
    train, validation, test = splits
    odd = [*train, dataclasses.replace(train[0], answer="?")]
    found = vqa(encoder, odd, validation, test, SIZE, training=ONCE)
    assert found["n_train"] == len(train)
    assert found["candidates"] == 5


def test_validation_answers_are_no_candidates(encoder, splits):
    train, validation, test = splits
    odd = [dataclasses.replace(q, answer="purple") for q in validation]
    found = vqa(encoder, train, odd, test, SIZE, training=SHORT)
    assert found["candidates"] == 5
    assert found["fits"]["image"]["validation_accuracy"] == 0


def test_training_stops_when_validation_does_not_rise(encoder, splits):
    train, validation, test = splits
    odd = [dataclasses.replace(q, answer="purple") for q in validation]
    fit = vqa(encoder, train, odd, test, SIZE, training=SHORT)["fits"]["image"]
    # It never rises above 0: the first of equal epochs is kept, and two more are tried.
    assert (fit["epoch"], fit["epochs"]) == (1, 3)


def test_the_epoch_that_is_kept_is_the_one_that_answers(encoder, splits, predictions):
    _, validation, _ = splits
    five = dataclasses.replace(NARROW, epochs=5)
    fits = vqa(encoder, *splits, SIZE, training=five)["fits"]
    truth = [question.answer for question in validation]
    # Of each head, the validation of five epochs and then the test.
    for fit, own in zip(fits.values(), (predictions[:6], predictions[6:]), strict=True):
        accuracies = [module.exact(answers, truth).mean() for answers in own[:5]]
        assert fit["validation_accuracy"] == max(accuracies)
        assert fit["epoch"] == 1 + int(np.argmax(accuracies))


def test_the_weights_of_the_best_epoch_are_taken_back(encoder, splits):
    train, validation, _ = splits
    gallery, _ = module._Gallery.load([*train, *validation], SIZE)
    features = module._Towers(encoder, gallery)
    answerer = module.Answerer.train(
        *(features, train, validation, encoder.device),
        looks=True,
        seed=0,
        # So fast that it unlearns.
        training=dataclasses.replace(NARROW, epochs=5, lr=0.2),
    )
    assert answerer.fit["epoch"] < answerer.fit["epochs"]
    right = module.exact(answerer.answers(validation), [q.answer for q in validation])
    assert right.mean() == answerer.fit["validation_accuracy"]


def test_the_same_seed_gives_the_same_row_and_another_does_not(encoder, splits, predictions):
    rows = [vqa(encoder, *splits, SIZE, seed=seed, training=ONCE) for seed in (3, 3, 4)]
    assert rows[0] == rows[1]
    calls = len(predictions) // 3
    assert predictions[:calls] != predictions[-calls:]


def test_model_and_random_numbers_are_left_as_they_were(encoder, splits):
    weights = {name: x.clone() for name, x in encoder.model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in encoder.model.parameters()]
    state = torch.get_rng_state()
    for finetune in (False, True):
        vqa(encoder, *splits, SIZE, finetune=finetune, training=ONCE)
    assert torch.equal(torch.get_rng_state(), state)
    after = encoder.model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in weights.items())
    assert [parameter.requires_grad for parameter in encoder.model.parameters()] == trained


def test_fine_tuning_trains_both_towers_even_locked_ones(encoder, splits, monkeypatch):
    towers = []
    made = module._Towers.__init__

    def spied(self, *args, **kwargs):
        made(self, *args, **kwargs)
        towers.append(self)

    monkeypatch.setattr(module._Towers, "__init__", spied)
    encoder.model.image_tower.requires_grad_(False)
    try:
        found = vqa(encoder, *splits, SIZE, finetune=True, training=SHORT)
    finally:
        encoder.model.image_tower.requires_grad_(True)
    assert found["finetune"] is True
    looking, reading = (tower.modules() for tower in towers)

    def changed(module, tower):
        pairs = zip(module.parameters(), tower.parameters(), strict=True)
        return any(not torch.equal(a, b) for a, b in pairs)

    model = encoder.model
    assert changed(looking[0], model.image_tower)
    assert changed(looking[1], model.text_tower)
    # The question alone trains no image tower.
    assert not changed(reading[0], model.image_tower)
    assert changed(reading[1], model.text_tower)


def test_features_are_the_towers_own_whether_kept_or_not(encoder, splits):
    train, validation, _ = splits
    asked = [*train, *validation]
    gallery, _ = module._Gallery.load(asked, SIZE)
    towers = module._Towers(encoder, gallery)
    texts = [question.question for question in asked]
    some = [asked[0], asked[3], asked[0]]
    tokens = encoder.tokenizer([question.question for question in some])
    with torch.no_grad():
        _, patches = encoder.model.image_tower(gallery.pixels[gallery.rows(some)])
        _, words = encoder.model.text_tower(tokens.ids, tokens.mask)
    for most in (2**30, 0):
        kept = module._KeptFeatures(towers, gallery, texts, most)
        own, mask = kept.words([question.question for question in some])
        assert torch.equal(mask, tokens.mask)
        torch.testing.assert_close(
            own.float()[mask], module.standardised(words)[mask], rtol=2e-3, atol=2e-3
        )
        torch.testing.assert_close(
            module.standardised(kept.patches(some)),
            module.standardised(patches),
            rtol=2e-3,
            atol=2e-3,
        )


def test_an_image_is_its_central_square(encoder, tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = Record("wide.png", tmp_path / "wide.png", "")
    question = Question("1", image, "what", "yes", "closed", "what", "image 1")
    gallery, bad = module._Gallery.load([question], SIZE)
    assert bad == []
    # Its edges are blended with what lies next to them.
    assert gallery.pixels.min() > 127


def test_a_broken_image_is_skipped_and_counted(encoder, splits, tmp_path):
    train, validation, test = splits
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    broken = Record("broken.png", tmp_path / "broken.png", "")
    absent = Record("absent.png", tmp_path / "absent.png", "")
    bad = [
        dataclasses.replace(test[0], image=broken, origin="image broken"),
        dataclasses.replace(test[1], image=broken, origin="image broken"),
    ]
    lost = dataclasses.replace(train[0], image=absent, origin="image absent")
    told = []
    found = vqa(
        *(encoder, [*train, lost], validation, [*test, *bad], SIZE),
        training=ONCE,
        skip=told.extend,
    )
    assert found["n"] == len(test)
    assert found["skipped"] == {"train": 1, "validation": 0, "test": 2}
    assert sorted(item.key for item in told) == ["absent.png", "broken.png"]
    with pytest.raises(UsageError, match="test must have questions about images that can be read"):
        vqa(encoder, train, validation, bad, SIZE)


@pytest.mark.parametrize("empty", range(3))
def test_a_split_without_questions_is_refused(encoder, splits, empty):
    given = [[] if i == empty else own for i, own in enumerate(splits)]
    with pytest.raises(UsageError, match="got 0 questions"):
        vqa(encoder, *given, SIZE)


def test_modalities_of_the_phantom_are_learnt_from_the_image(tmp_path):
    """From features of untrained towers: for modalities they are enough."""
    splits = read_questions("vqa_rad", write_vqa(tmp_path / "phantom", images=150, seed=1))
    asked = [
        question
        for question in (*splits.train, *splits.validation, *splits.test)
        if question.kind == "open modality"
    ]
    asked.sort(key=lambda question: question.origin)
    tokenizer = Tokenizer.train([question.question for question in asked], 400, 24)
    torch.manual_seed(0)
    preset = PRESETS["tiny"]
    model = build_model(preset, tokenizer, token_features=False)
    encoder = Encoder(model, tokenizer, torch.device("cpu"), "fp32")
    found = vqa(
        *(encoder, asked[:80], asked[80:105], asked[105:], preset.image_size),
        training=Training(epochs=14, patience=14, batch_size=16),
    )
    assert found["n"] == 45
    assert found["metrics"]["accuracy"] > found["chance"]["accuracy"] + 0.2
    assert found["gain_over_question_only"]["ci95"][0] > 0.1
