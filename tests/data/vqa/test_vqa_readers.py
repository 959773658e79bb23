"""Every layout of the VQA sets, as the phantom writes it: read back, split and checked."""

import importlib
import json
import pickle
import shutil
import sys

import pytest

from medfast.data.decode import decode
from medfast.data.phantom import DOMAINS
from medfast.data.phantom.vqa import VQA_LAYOUTS, questions, write_vqa
from medfast.data.sources import AbsentError
from medfast.data.vqa import VQA, read_questions
from medfast.data.vqa.questions import clean_question
from medfast.errors import UsageError

IMAGES = 60
RAD = "VQA_RAD Dataset Public.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folder of every layout. Read only."""
    root = tmp_path_factory.mktemp("vqa")
    return {
        layout: write_vqa(root / layout, layout=layout, images=IMAGES, seed=1)
        for layout in VQA_LAYOUTS
    }


@pytest.fixture(params=VQA_LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture
def own(folders, tmp_path):
    """Return a copy of a layout's folder, to be damaged."""
    return lambda layout: shutil.copytree(folders[layout], tmp_path / layout)


def _read(layout, folder):
    return read_questions(VQA_LAYOUTS[layout].source, folder)


def _all(splits):
    return [*splits.train, *splits.validation, *splits.test]


def _asked():
    """Return all questions and answers of the phantom, as readers and people would say them."""
    samples = DOMAINS["medical"].samples(IMAGES, 1)
    return [(clean_question(q.question), q.answer.lower()) for s in samples for q in questions(s)]


def test_every_question_is_read_back(layout, folders):
    splits = _read(layout, folders[layout])
    assert splits.skipped == []
    found = [(question.question, question.answer.lower()) for question in _all(splits)]
    assert sorted(found) == sorted(_asked())


def test_images_can_be_read_and_tell_their_origin(layout, folders):
    splits = _read(layout, folders[layout])
    origins = {}
    for question in _all(splits):
        data = question.image.read()
        assert origins.setdefault(question.origin, data) == data
    assert len(origins) == IMAGES
    assert len(set(origins.values())) == IMAGES
    assert min(decode(next(iter(origins.values()))).size) >= 128


def test_forms_of_one_set_hold_the_same_questions_in_the_same_splits(folders):
    found = {}
    for layout, place in VQA_LAYOUTS.items():
        splits = _read(layout, folders[layout])
        rows = [
            sorted((q.question, q.answer, q.answer_type, q.kind, q.origin) for q in part)
            for part in (splits.train, splits.validation, splits.test)
        ]
        assert found.setdefault(place.source, rows) == rows
    assert set(found) == set(VQA)


def test_no_image_is_in_train_and_validation(layout, folders):
    splits = _read(layout, folders[layout])
    train, validation, test = (
        {question.origin for question in part}
        for part in (splits.train, splits.validation, splits.test)
    )
    assert train
    assert validation
    assert not train & validation
    if VQA_LAYOUTS[layout].source == "path_vqa":
        assert not test & (train | validation)


def test_the_test_split_is_upstreams_and_shared_images_are_noted(folders):
    rows = json.loads((folders["vqa_rad"] / RAD).read_text())
    tested = [row for row in rows if row["phrase_type"].startswith("test_")]
    splits = _read("vqa_rad", folders["vqa_rad"])
    assert [question.key for question in splits.test] == [str(row["qid"]) for row in tested]
    seen = {question.origin for question in (*splits.train, *splits.validation)}
    shared = sum(question.origin in seen for question in splits.test)
    assert 0 < shared < len(splits.test)
    assert any(
        f"{shared} of {len(splits.test)} test questions are about images" in note
        for note in splits.notes
    )


def test_nothing_is_noted_of_splits_that_share_no_image(folders):
    splits = _read("path_vqa", folders["path_vqa"])
    assert splits.notes == ["closed if the answer is yes or no."]


def test_closed_is_what_the_set_says_or_yes_and_no(folders):
    rad = _all(_read("vqa_rad", folders["vqa_rad"]))
    assert {q.answer.lower() for q in rad if q.answer_type == "closed"} >= {"yes", "no", "small"}
    assert {q.kind for q in rad} >= {"closed pres", "open modality", "open abn"}
    path = _all(_read("path_vqa", folders["path_vqa"]))
    assert {q.answer for q in path if q.answer_type == "closed"} == {"yes", "no"}
    assert {q.kind for q in path} >= {"is", "what", "how"}


def test_equal_images_under_two_names_are_in_one_split(own):
    folder = own("vqa_rad")
    images = folder / "VQA_RAD Image Folder"
    before = _read("vqa_rad", folder)
    name, other = before.validation[0].image.key, before.train[0].image.key
    shutil.copy(images / name, images / other)
    after = _read("vqa_rad", folder)
    assert {name, other} <= {question.image.key for question in after.validation}


def test_a_validation_question_about_a_training_image_is_left_out(own):
    folder = own("path_vqa")
    before = _read("path_vqa", folder)
    shutil.copy(before.train[0].image.image, before.validation[0].image.image)
    after = _read("path_vqa", folder)
    lost = sum(q.image.key == before.validation[0].image.key for q in before.validation)
    assert len(after.validation) == len(before.validation) - lost
    total = len(before.validation)
    assert any(f"{lost} of {total} validation questions" in note for note in after.notes)


def test_bad_rows_are_skipped_and_named(own):
    folder = own("vqa_rad")
    rows = json.loads((folder / RAD).read_text())
    good = len(rows)
    first = {**rows[0], "phrase_type": "freeform"}
    rows += [
        {**first, "qid": "no image", "image_name": "absent.jpg"},
        {**first, "qid": "no name", "image_name": None},
        {**first, "qid": "no answer", "answer": " "},
        {**first, "qid": "a list", "answer": ["yes"]},
        {**first, "qid": "no question", "question": "?"},
        {**first, "qid": "no type", "answer_type": "HALF OPEN"},
        "text",
    ]
    (folder / RAD).write_text(json.dumps(rows))
    splits = _read("vqa_rad", folder)
    assert len(_all(splits)) == good
    found = {item.key: item.reason for item in splits.skipped}
    assert len(splits.skipped) == 7
    assert "7 rows of the data set could not be used." in splits.notes
    assert "absent.jpg cannot be read" in found["no image"]
    assert found["no name"] == "it names no image"
    assert found["no answer"] == found["a list"] == "its answer is empty or no text"
    assert found["no question"] == "its question is empty or no text"
    assert "must be OPEN or CLOSED; got half open" in found["no type"]
    assert found[f"row {good + 7}"] == "it must be a JSON object"


def test_bad_rows_of_a_pickle_are_skipped(own):
    folder = own("path_vqa_labels")
    path = folder / "pvqa/qas/train_vqa.pkl"
    rows = pickle.loads(path.read_bytes())
    bad = ["text", {**rows[0], "label": {}}, {**rows[0], "label": {"x": "y"}}, {"label": [1]}]
    path.write_bytes(pickle.dumps(rows + bad))
    splits = _read("path_vqa_labels", folder)
    assert len(splits.train) == len(rows)
    assert [item.reason for item in splits.skipped] == [
        "it must be a dict, not str",
        "its answer is empty or no text",
        "its answer is empty or no text",
        "its question is empty or no text",
    ]


def test_of_several_answers_the_one_with_the_most_weight_counts(own):
    folder = own("path_vqa_labels")
    path = folder / "pvqa/qas/train_vqa.pkl"
    rows = pickle.loads(path.read_bytes())
    rows[0]["label"] = {"lung": 0.3, "heart": 0.6}
    path.write_bytes(pickle.dumps(rows))
    assert _read("path_vqa_labels", folder).train[0].answer == "heart"


def test_the_plain_pickle_is_preferred_to_the_one_with_labels(own):
    folder = own("path_vqa_labels")
    rows = [{"image": "train_00001", "question": "What?", "answer": "only this"}]
    plain = folder / "pvqa/qas/train/train_qa.pkl"
    plain.parent.mkdir()
    plain.write_bytes(pickle.dumps(rows))
    assert [q.answer for q in _read("path_vqa_labels", folder).train] == ["only this"]


def test_a_row_without_an_image_is_skipped_in_parquet(own):
    from pyarrow import parquet

    folder = own("path_vqa_parquet")
    path = next(folder.glob("data/train*"))
    table = parquet.read_table(path).to_pylist()
    table[1]["image"] = {"bytes": None, "path": "train_0001.jpg"}
    _write_parquet(table, path)
    splits = _read("path_vqa_parquet", folder)
    assert len(splits.train) == len(table) - 1
    assert [item.key for item in splits.skipped] == [f"{path.stem} 2"]


def _write_parquet(rows, path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path)


class _Runs:
    def __reduce__(self):
        return print, ("this must not be shown",)


@pytest.mark.parametrize(
    ("layout", "file", "content", "message"),
    [
        ("vqa_rad", RAD, b"[{", "cannot be read (Expecting"),
        ("vqa_rad", RAD, b"{}", "it must be a JSON array of questions"),
        ("vqa_rad", RAD, b"[" * 100_000, "cannot be read"),
        ("vqa_rad_mevf", "testset.json", b"\xff\xfe", "not UTF-8 text"),
        ("path_vqa", "qas/test/test_qa.pkl", b"", "cannot be read"),
        ("path_vqa", "qas/test/test_qa.pkl", pickle.dumps({}), "a list of questions, not dict"),
        ("path_vqa", "qas/test/test_qa.pkl", pickle.dumps(_Runs()), "an object of builtins.print"),
        ("path_vqa_parquet", "data/test-00000-of-00001.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_a_damaged_file_is_named(own, capsys, layout, file, content, message):
    folder = own(layout)
    (folder / file).write_bytes(content)
    with pytest.raises(UsageError) as stopped:
        _read(layout, folder)
    assert file in str(stopped.value)
    assert message in str(stopped.value)
    assert "must not be shown" not in capsys.readouterr().out


def test_a_missing_column_is_named(own):
    folder = own("path_vqa_parquet_names")
    path = next(folder.glob("data/train*"))
    _write_parquet([{"image": "a.jpg", "question": "what"}], path)
    with pytest.raises(UsageError, match="no column 'answer'"):
        _read("path_vqa_parquet_names", folder)


def test_parquet_without_pyarrow_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        _read("path_vqa_parquet", folders["path_vqa_parquet"])


@pytest.mark.parametrize("key", VQA)
def test_a_missing_set_says_how_to_get_it(tmp_path, key):
    about = importlib.import_module(VQA[key]).ABOUT
    assert about.key == key
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(AbsentError) as stopped:
            read_questions(key, folder)
        assert about.access in str(stopped.value)
        assert about.licence in str(stopped.value)
        assert str(folder) in str(stopped.value)


def test_a_split_without_questions_is_named(own):
    folder = own("path_vqa")
    (folder / "qas/val/val_qa.pkl").write_bytes(pickle.dumps([{"image": "a"}]))
    with pytest.raises(
        UsageError, match=r"no validation question\. The first of 1 bad rows"
    ) as bad:
        _read("path_vqa", folder)
    assert not isinstance(bad.value, AbsentError)
    (folder / "qas/val/val_qa.pkl").write_bytes(pickle.dumps([]))
    with pytest.raises(AbsentError, match=r"no validation question\. Get"):
        _read("path_vqa", folder)


def test_an_unknown_set_is_answered_with_the_closest(tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'vqa_rad'"):
        read_questions("vqarad", tmp_path)


def test_files_depend_on_nothing_but_the_arguments(folders, tmp_path, layout):
    again = write_vqa(tmp_path / "again", layout=layout, images=IMAGES, seed=1)
    files = sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    first = folders[layout]
    assert files == sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert all((first / p).read_bytes() == (again / p).read_bytes() for p in files)


def test_questions_tell_little_of_their_answers():
    samples = DOMAINS["medical"].samples(2000, 0)
    asked = [q for s in samples for q in questions(s)]
    presence = [q.answer for q in asked if q.question_type == "PRES"]
    assert 0.4 < presence.count("Yes") / len(presence) < 0.6
    sides = [q.answer for q in asked if q.question_type == "SIDE"]
    assert 0.4 < sides.count("Left") / len(sides) < 0.6
    assert len({q.answer for q in asked if q.question_type == "MODALITY"}) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "vqarad"}, "Did you mean 'vqa_rad'"),
        ({"images": 29}, "images must be at least 30 and seed at least 0; got 29"),
        ({"seed": -1}, "got 300 and -1"),
    ],
)
def test_a_wrong_argument_of_the_phantom_is_named(tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        write_vqa(tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_a_folder_with_files_is_not_written_into(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="has files in it"):
        write_vqa(tmp_path, images=30)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
