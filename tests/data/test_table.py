import json

import pytest

from medfast.data import SPLITS
from medfast.data.skipped import Skipped
from medfast.data.table import Columns, read
from medfast.errors import UsageError


def _file(tmp_path, text, name="pairs.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def _all(path, *more):
    """Return the pairs of all splits by split."""
    found = {}
    for split in SPLITS:
        try:
            found[split] = [r for r in read(path, split, *more) if not isinstance(r, Skipped)]
        except UsageError:
            found[split] = []
    return found


def test_reads_open_clips_columns(tmp_path):
    path = _file(tmp_path, "filepath\ttitle\na/1.jpg\tOne.\n/x/2.jpg\tTwo,  and more\n", "a.tsv")
    records = [record for part in _all(path).values() for record in part]
    found = {record.key: (record.image, record.caption) for record in records}
    assert found == {
        "a/1.jpg": (tmp_path / "a/1.jpg", "One."),
        "/x/2.jpg": (tmp_path / "/x/2.jpg", "Two, and more"),
    }


@pytest.mark.parametrize("image", ["image_path", "image", "filename", "path"])
@pytest.mark.parametrize("caption", ["caption", "text"])
def test_usual_names_are_taken_where_the_default_ones_are_absent(tmp_path, image, caption):
    path = _file(tmp_path, f"{image},{caption},split\n1.jpg,One,train\n")
    (record,) = read(path, "train")
    assert (record.key, record.caption) == ("1.jpg", "One")


def test_columns_can_be_named(tmp_path):
    path = _file(tmp_path, "picture;says;split\n1.jpg;One;train\n")
    (record,) = read(path, "train", Columns("picture", "says", ";"))
    assert record.caption == "One"
    with pytest.raises(UsageError, match=r"'pictur'.*picture, says, split"):
        next(read(path, "train", Columns("pictur", "says", ";")))


def test_json_lines_and_parquet_give_the_same(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"filepath": f"{i}.jpg", "title": f"No. {i}", "split": "train"} for i in range(3)]
    lines = _file(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "a.jsonl")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(read(lines, "train")) == list(read(tmp_path / "a.parquet", "train"))


def test_a_column_of_splits_is_used(tmp_path):
    words = ["train", "Training", "val", "valid", "validation", "test"]
    rows = "".join(f"{i}.jpg,x,{word}\n" for i, word in enumerate(words))
    found = _all(_file(tmp_path, f"filepath,title,split\n{rows}"))
    assert {s: [r.key for r in part] for s, part in found.items()} == {
        "train": ["0.jpg", "1.jpg"],
        "validation": ["2.jpg", "3.jpg", "4.jpg"],
        "test": ["5.jpg"],
    }


@pytest.mark.parametrize("group", ["patient", "study", "group"])
def test_without_splits_a_patient_or_study_is_in_one(tmp_path, group):
    rows = "".join(f"{i}.jpg,x,p{i % 300}\n" for i in range(900))
    found = _all(_file(tmp_path, f"filepath,title,{group}\n{rows}"))
    groups = {s: {r.origin or r.study for r in part} for s, part in found.items()}
    assert sum(len(g) for g in groups.values()) == len(set.union(*groups.values())) == 300
    assert 5 <= len(groups["validation"]) <= 30
    assert 5 <= len(groups["test"]) <= 30


def test_studies_and_patients_are_kept(tmp_path):
    path = _file(
        tmp_path, "filepath,title,split,study,patient\n1.jpg,x,train,s1,p1\n2.jpg,y,train,,\n"
    )
    one, two = read(path, "train")
    assert (one.study, one.origin) == ("s1", "patient p1")
    assert (two.study, two.origin) == (None, None)


def test_bad_rows_are_skipped_and_come_once(tmp_path):
    rows = "1.jpg,x,train\n,no image,train\n3.jpg,x,trian\n4.jpg,x,test\n"
    path = _file(tmp_path, f"filepath,title,split\n{rows}")
    bad = [r for r in read(path, "train") if isinstance(r, Skipped)]
    assert [(r.key, r.path) for r in bad] == [("line 3", str(path)), ("line 4", str(path))]
    assert "filepath is empty" in bad[0].reason
    assert "got trian" in bad[1].reason
    assert len(list(read(path, "test"))) == 1


def test_an_empty_caption_is_left_to_the_loader(tmp_path):
    (record,) = read(_file(tmp_path, "filepath,title,split\n1.jpg,,train\n"), "train")
    assert record.caption == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file,words\na,b\n", r"'filepath'.*image_path.*file, words"),
        ("filepath,title,split\n", "holds no train pair"),
        ("", "pairs.csv"),
    ],
)
def test_what_is_no_table_of_pairs_is_refused(tmp_path, text, says):
    with pytest.raises(UsageError, match=says):
        list(read(_file(tmp_path, text), "train"))


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"there is no .*none\.csv"):
        next(read(tmp_path / "none.csv", "train"))
    with pytest.raises(UsageError, match=r"is a folder; name the table in it"):
        next(read(tmp_path, "train"))


def test_a_split_that_only_the_first_line_lacks_is_used(tmp_path):
    rows = [{"split": split} for split in ("train", "validation", "test")]
    rows = [{"filepath": f"{i}.jpg", "title": "x", **row} for i, row in enumerate([{}, *rows])]
    path = _file(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "a.jsonl")
    assert {s: [r.key for r in part] for s, part in _all(path).items()} == {
        "train": ["1.jpg"],
        "validation": ["2.jpg"],
        "test": ["3.jpg"],
    }
    (bad,) = [r for r in read(path, "train") if isinstance(r, Skipped)]
    assert (bad.key, "got nothing" in bad.reason) == ("line 1", True)


def test_keys_are_unique_whatever_the_files_are_called(tmp_path):
    names = ["a.jpg", "a.jpg", "a.jpg#2", "a.jpg", "a.jpg#2"]
    rows = "".join(f"{name},x,train\n" for name in names)
    keys = [r.key for r in read(_file(tmp_path, f"filepath,title,split\n{rows}"), "train")]
    assert len(set(keys)) == len(names)
    assert keys[:2] == ["a.jpg", "a.jpg#2"]


def test_an_empty_split_says_what_to_do(tmp_path):
    few = _file(tmp_path, "filepath,title\na.jpg,x\n")
    with pytest.raises(UsageError, match=r"no validation pair\..* about 100 of them: .*'split'"):
        list(read(few, "validation"))
    named = _file(tmp_path, "filepath,title,split\na.jpg,x,train\n", "b.csv")
    with pytest.raises(UsageError, match=r"no test pair\. Write 'test' into the column 'split'"):
        list(read(named, "test"))


@pytest.mark.parametrize("separator", ["", "::", "\n", '"'])
def test_a_separator_that_cannot_be_one_is_refused(separator):
    with pytest.raises(UsageError, match="--csv-separator must be a single character"):
        Columns(separator=separator)
