import json

import pytest

from medfast.data import SOURCES, SPLITS, distinct, parse_source, read_split
from medfast.data.mixture import read_mixture
from medfast.data.records import group_ids
from medfast.errors import UsageError


@pytest.fixture
def lines(tmp_path):
    """Write ROCO's JSON lines of a split into a folder of tmp_path and return that."""

    def write(folder, rows, split="train"):
        root = tmp_path / folder
        root.mkdir(exist_ok=True)
        path = root / f"radiology{split}_dataset.json"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return root

    return write


def _rows(*names):
    return [{"image_path": name, "caption": f"about {name}"} for name in names]


def test_sources_follow_one_another(lines):
    a, b = lines("a", _rows("1.jpg", "2.jpg")), lines("b", _rows("3.jpg"))
    found = read_mixture([("roco", a), ("roco", b)], "train")
    assert [r.key for r in found.records] == ["1.jpg", "2.jpg", "3.jpg"]
    assert (found.sizes, found.excluded, found.skipped) == ([2, 1], [0, 0], [])


def test_studies_of_one_name_in_two_sources_are_two(phantom):
    once = read_mixture([("roco", phantom)], "train").records
    twice = read_mixture([("roco", phantom), ("phantom", phantom)], "train").records
    assert len(set(group_ids(twice))) == 2 * len(set(group_ids(once)))


def test_pairs_of_one_key_in_two_sources_are_two(lines):
    a, b = lines("a", _rows("1.jpg", "2.jpg")), lines("b", _rows("1.jpg", "2.jpg"))
    found = read_mixture([("roco", a), ("roco", b)], "train").records
    assert list(group_ids(found)) == [0, 1, 2, 3]


def test_a_fingerprint_tells_sources_keys_and_their_order_and_no_folder(lines):
    def of(*sources):
        return read_mixture([("roco", source) for source in sources], "train").fingerprint()

    a, b, c = (lines(name, _rows("1.jpg", "2.jpg")) for name in "abc")
    assert of(a) == of(b) != of(lines("d", _rows("2.jpg", "1.jpg")))
    assert of(a)["pairs"] == 2
    assert of(a, b) == of(b, c)
    # The same keys, in other sources.
    e, f = lines("e", _rows("1.jpg")), lines("f", _rows("2.jpg"))
    assert len({of(*s)["sha256"] for s in ((a,), (e, f), (a, b))}) == 3
    assert of(lines("g", _rows("1.jpg", "2.jpg", "3.jpg")))["pairs"] == 3


def test_a_source_under_two_names_is_one(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "set")
    one = ("roco", tmp_path / "set")
    assert distinct([one, ("phantom", tmp_path / "link")]) == [one]
    assert len(distinct([one, ("folder", tmp_path / "set")])) == 2


def test_what_is_excluded_is_left_out_and_counted(lines):
    root = lines("a", _rows("1.jpg", "2.jpg", "3.jpg"))
    other = lines("b", _rows("2.jpg"))
    found = read_mixture([("roco", root), ("roco", other)], "train", [{"2.jpg"}, set()])
    assert [r.key for r in found.records] == ["1.jpg", "3.jpg", "2.jpg"]
    assert (found.sizes, found.excluded) == ([2, 1], [1, 0])


def test_a_source_that_is_excluded_as_a_whole_is_refused(lines):
    root = lines("a", _rows("1.jpg"))
    with pytest.raises(UsageError, match="roco: the exclusion lists leave out every train pair"):
        read_mixture([("roco", root)], "train", [{"1.jpg"}])


def test_bad_rows_are_apart_from_the_records(lines):
    root = lines("a", [*_rows("1.jpg"), {"caption": "no image"}])
    found = read_split("roco", root, "train")
    assert [r.key for r in found.records] == ["1.jpg"]
    (bad,) = found.skipped
    assert bad.path.endswith("radiologytrain_dataset.json")
    assert read_mixture([("roco", root)], "train").skipped == [bad]


def test_every_source_can_be_read_and_tells_what_it_is(tmp_path):
    for source in SOURCES:
        missing = tmp_path / "nowhere"
        for split in SPLITS:
            with pytest.raises(UsageError, match="nowhere"):
                read_split(source, missing, split)


@pytest.mark.parametrize("source", SOURCES)
def test_a_name_that_no_file_can_have_is_one_sentence(tmp_path, source):
    with pytest.raises(UsageError, match=f"{'x' * 300}"):
        read_split(source, tmp_path / ("x" * 300), "train")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rocco:/a", r"data source 'rocco' is not known\. Did you mean 'roco'\?"),
        ("roco", "the data source roco needs a folder: roco:FOLDER"),
        ("/data/roco", "must be NAME:FOLDER; got /data/roco"),
    ],
)
def test_a_source_that_cannot_be_understood_is_refused(text, says):
    with pytest.raises(UsageError, match=says):
        parse_source(text)


def test_a_home_folder_is_found():
    assert parse_source("roco:~/x")[1].is_absolute()
