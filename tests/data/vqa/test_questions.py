import pickle

import pytest

from medfast.data.vqa import plain_pickle
from medfast.data.vqa.questions import as_text, clean_question


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("What is  shown?", "what is shown"),
        ("Is this a chest X ray?", "is this a chest x-ray"),
        ("Is this a chest X-ray?", "is this a chest x-ray"),
        ("X rays, or CT?", "x-rays or ct"),
        ("Is it T2-weighted -- or not?", "is it t2-weighted or not"),
        ("Larger than 3.5 cm...", "larger than 3.5 cm"),
        ("the patient's lung/heart", "the patients lung heart"),
        ("lung_left", "lung left"),
        # The type of the answer, which must not be told.
        ("Is there a fracture? -yes/no", "is there a fracture"),
        ("Where is it? - open", "where is it"),
        ("Is the wound - open", "is the wound open"),
        ("\uff23\uff34\u00a0scan?", "ct scan"),
        ("?", ""),
    ],
)
def test_a_question_is_lower_case_without_punctuation(text, clean):
    assert clean_question(text) == clean
    assert clean_question(clean) == clean


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (" a \n b ", "a b"),
        (3, "3"),
        (3.0, "3"),
        (2.5, "2.5"),
        (float("nan"), ""),
        (True, "True"),
        (None, ""),
        (["a"], ""),
    ],
)
def test_cells_become_text(value, text):
    assert as_text(value) == text


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_read_from_every_protocol(protocol):
    value = [{"image": "train_0001", "n": (1, 2.5, True, None), "label": {"é": 1}}]
    assert plain_pickle.loads(pickle.dumps(value, protocol)) == value


class _Runs:
    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", [open, eval, exec], ids=lambda f: f.__name__)
def test_nothing_in_a_pickle_is_executed(tmp_path, function, protocol):
    path = tmp_path / "made"
    argument = str(path) if function is open else f"open({str(path)!r}, 'w')"
    arguments = (argument, "w") if function is open else (argument,)
    data = pickle.dumps([_Runs(function, *arguments)], protocol)
    with pytest.raises(pickle.UnpicklingError, match=f"an object of .*{function.__name__}"):
        plain_pickle.loads(data)
    assert not path.exists()
    # It would be, were it read as usual.
    pickle.loads(data)
    assert path.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pickle",
        pickle.dumps([1, 2])[:-2],
        # What older pickles make of a class, a persistent id, and a method without its object.
        b"(ios\ngetcwd\n.",
        b"Pname\n.",
        b"]N}b.",
        # Text that is none.
        b"\x80\x04\x8c\x01\xff.",
        b"\x80\x04\x82\x01.",
    ],
)
def test_a_damaged_or_strange_pickle_is_refused(data):
    with pytest.raises(pickle.UnpicklingError):
        plain_pickle.loads(data)
