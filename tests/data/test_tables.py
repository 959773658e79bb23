import gzip
import json
import os
import re

import pytest

from medfast.data.skipped import Skipped
from medfast.data.tables import column_names, lines, rows
from medfast.errors import UsageError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ODD = 'Tumeur, "grande"; ação é 胸部\nsecond line'
WANTED = ("image", "caption")


def _write(path, text):
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def _read(path, columns=WANTED, **options):
    return list(rows(path, columns, **options))


def _separated(pairs, mark):
    quoted = (
        mark.join('"' + text.replace('"', '""') + '"' for text in pair)
        for pair in [("image", "caption"), *pairs]
    )
    return "".join(f"{line}\n" for line in quoted)


PAIRS = [("a.jpg", "Chest x-ray."), ("b.jpg", ODD), ("c.jpg", "")]


def _table(folder, kind):
    path = folder / f"table.{kind}"
    if kind == "parquet":
        names, captions = zip(*PAIRS, strict=True)
        parquet.write_table(pa.table({"image": names, "caption": captions}), path)
        return path
    if kind.startswith("jsonl"):
        text = "".join(
            json.dumps({"image": name, "caption": text}, ensure_ascii=False) + "\n"
            for name, text in PAIRS
        )
    else:
        text = _separated(PAIRS, "\t" if kind.startswith("tsv") else ",")
    return _write(path, text)


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "tsv.gz", "jsonl", "jsonl.gz", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    path = _table(tmp_path, kind)
    assert column_names(path) == ["image", "caption"]
    cells = [row[1] for row in _read(path)]
    assert cells == [{"image": name, "caption": text or None} for name, text in PAIRS]


def test_rows_are_named_by_the_line_on_which_they_start(tmp_path):
    path = _write(tmp_path / "t.csv", 'image,caption\na.jpg,"one\ntwo"\n\nb.jpg,x\n')
    assert [name for name, _ in _read(path)] == ["line 2", "line 5"]
    path = _write(tmp_path / "t.jsonl", '\n{"image": "a", "caption": "x"}\n')
    assert [name for name, _ in _read(path)] == ["line 2"]
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"image": ["a"] * 3000, "caption": ["b"] * 3000}), path)
    names = [name for name, _ in _read(path)]
    assert (names[0], names[-1]) == ("row 1", "row 3000")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_mark_of_byte_order_and_any_newline_are_taken(tmp_path, newline):
    text = "\ufeffimage,caption\na.jpg,x\nb.jpg,y\n".replace("\n", newline)
    found = _read(_write(tmp_path / "t.csv", text))
    assert [cells for _, cells in found] == [
        {"image": "a.jpg", "caption": "x"},
        {"image": "b.jpg", "caption": "y"},
    ]


def test_the_last_line_needs_no_newline(tmp_path):
    assert len(_read(_write(tmp_path / "t.csv", 'image,caption\na.jpg,"x"'))) == 1
    assert len(_read(_write(tmp_path / "t.jsonl", '{"image": "a", "caption": "x"}'))) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("b.jpg", "must have 2 cells, as the header has; got 1"),
        ("b.jpg,x,y", "must have 2 cells, as the header has; got 3"),
        ("b.jpg,x\0y", "zero byte|NUL"),
    ],
)
def test_a_bad_row_of_csv_is_skipped_and_named(tmp_path, row, reason):
    path = _write(tmp_path / "t.csv", f"image,caption\na.jpg,x\n{row}\nc.jpg,z\n")
    first, bad, last = _read(path)
    assert (first[0], last[0]) == ("line 2", "line 4")
    assert isinstance(bad, Skipped)
    assert (bad.key, bad.path) == ("line 3", str(path))
    assert re.search(reason, bad.reason)


def test_a_quotation_mark_that_is_never_closed_is_skipped_from_there_on(tmp_path):
    path = _write(tmp_path / "t.csv", 'image,caption\na.jpg,x\nb.jpg,"y\nc.jpg,z\n')
    good, bad = _read(path)
    assert good[0] == "line 2"
    assert bad.key == "line 3"
    assert "never closed" in bad.reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"),
        ("[1, 2]", "must be a JSON object"),
        ("[" * 100_000, "no JSON"),
        ('{"image": "b.jpg"}', "has no 'caption'"),
        ("{}", "has no 'image' and no 'caption'"),
        ('{"image": "b.jpg", "caption": ["x"]}', "'caption' must be text or a number; got list"),
        ('{"image": "b\\u0000.jpg", "caption": "x"}', "'image' holds a zero byte"),
    ],
)
def test_a_bad_line_of_json_is_skipped_and_named(tmp_path, line, reason):
    good = '{"image": "a.jpg", "caption": "x"}'
    path = _write(tmp_path / "t.jsonl", f"{good}\n{line}\n{good}\n")
    first, bad, last = _read(path)
    assert (first[0], last[0]) == ("line 1", "line 3")
    assert (bad.key, bad.path) == ("line 2", str(path))
    assert reason in bad.reason


@pytest.mark.parametrize("value", ["null", "NaN", '"nan"', '""', '"  "', '"None"'])
def test_what_stands_for_no_value_is_none(tmp_path, value):
    path = _write(tmp_path / "t.jsonl", f'{{"image": "a.jpg", "caption": {value}}}\n')
    assert _read(path) == [("line 1", {"image": "a.jpg", "caption": None})]


def test_parquet_without_a_value_is_none(tmp_path):
    path = tmp_path / "t.parquet"
    table = {"image": ["a", None], "caption": [None, "x"], "n": [float("nan"), 2.0]}
    parquet.write_table(pa.table(table), path)
    assert [cells for _, cells in _read(path, optional=("n",))] == [
        {"image": "a", "caption": None, "n": None},
        {"image": None, "caption": "x", "n": "2"},
    ]


def test_numbers_become_text_and_halves_of_characters_a_question_mark(tmp_path):
    path = _write(tmp_path / "t.jsonl", '{"image": 12, "caption": "x\\ud800y"}\n')
    assert _read(path) == [("line 1", {"image": "12", "caption": "x?y"})]


def test_only_the_asked_columns_are_given(tmp_path):
    path = _write(tmp_path / "t.csv", "x,image,caption,split\n1,a.jpg,c,train\n")
    ((_, cells),) = _read(path, optional=("split", "patient"))
    assert cells == {"image": "a.jpg", "caption": "c", "split": "train"}


@pytest.mark.parametrize(
    ("name", "text", "separator"),
    [
        ("t.csv", "image,caption\na.jpg,x\n", None),
        ("t.csv", "image\tcaption\na.jpg\tx\n", None),
        ("t.tsv", "image\tcaption\na.jpg\tx\n", None),
        ("t.csv", " image , caption \na.jpg, x\n", None),
        ("t.csv", "image;caption\na.jpg;x\n", ";"),
        ("t.tsv", "image|caption\na.jpg|x\n", "|"),
    ],
)
def test_the_separator_is_told_by_name_and_header(tmp_path, name, text, separator):
    path = _write(tmp_path / name, text)
    assert column_names(path, separator) == ["image", "caption"]
    assert _read(path, separator=separator) == [("line 2", {"image": "a.jpg", "caption": "x"})]


def test_a_very_long_cell_is_read(tmp_path):
    path = _write(tmp_path / "t.csv", f"image,caption\na.jpg,{'x' * 1_000_000}\n")
    ((_, cells),) = _read(path)
    assert len(cells["caption"]) == 1_000_000


@pytest.mark.parametrize("text", ["id,caption\n", ""])
def test_a_missing_column_of_csv_names_the_columns(tmp_path, text):
    path = _write(tmp_path / "t.csv", text)
    columns = "id, caption" if text else "none"
    with pytest.raises(UsageError, match=f"no column 'image'; its columns are: {columns}"):
        _read(path)


def test_a_missing_column_of_parquet_names_the_columns(tmp_path):
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"image": ["a"], "text": ["b"]}), path)
    with pytest.raises(UsageError, match="no column 'caption'; its columns are: image, text"):
        _read(path)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.csv.gz"])
def test_bytes_that_are_no_text_are_refused(tmp_path, name):
    path = _write(tmp_path / name, b"image,caption\n\xff\xfe,x\n")
    with pytest.raises(UsageError, match=rf"{name} is not UTF-8 text"):
        _read(path)


@pytest.mark.parametrize("name", ["t.csv.gz", "t.jsonl.gz", "t.parquet"])
@pytest.mark.parametrize("data", [b"", b"nothing of the kind"])
def test_a_file_of_another_kind_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    if name.endswith(".gz") and not data:
        # An empty archive is an empty file.
        assert list(lines(tmp_path / name)) == []
        return
    with pytest.raises(UsageError, match=rf"{name} cannot be read"):
        _read(tmp_path / name)


@pytest.mark.parametrize("kind", ["csv.gz", "parquet"])
def test_a_file_that_is_cut_off_is_refused(tmp_path, kind):
    path = _table(tmp_path, kind)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UsageError, match="cannot be read"):
        _read(path)


def test_a_parquet_file_with_a_flipped_page_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    names = [f"{n:09d}" for n in range(5000)]
    parquet.write_table(pa.table({"image": names, "caption": names}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[100:4000] = bytes(3900)
    path.write_bytes(data)
    with pytest.raises(UsageError, match="cannot be read"):
        _read(path)


@pytest.mark.parametrize("name", ["t.txt", "t", "t.xlsx", "t.parquet.gz"])
def test_an_unknown_format_is_refused(tmp_path, name):
    (tmp_path / name).write_text("image,caption\n")
    with pytest.raises(UsageError, match=r"must be a table whose name ends in one of \.csv"):
        _read(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"t\.csv cannot be read \(No such file"):
        _read(tmp_path / "t.csv")


def test_a_table_is_read_row_by_row(tmp_path):
    path = _write(tmp_path / "t.csv", "image,caption\n" + "a.jpg,x\n" * 5000 + "b.jpg,\0\n")
    found = rows(path, WANTED)
    assert next(found) == ("line 2", {"image": "a.jpg", "caption": "x"})
    found.close()


@pytest.mark.parametrize(
    ("text", "last"),
    [
        # The next mark is within a later caption, is a later cell's first, or closes one.
        ('b.jpg,"5 cm mass\nc.jpg,y\nd.jpg,a "quoted" word\n', 5),
        ('b.jpg,"5 cm mass\nc.jpg,y\nd.jpg,"a, b"\n', 5),
        ('b.jpg,"5 cm mass\nc.jpg,y\nd.jpg,5"\n', 5),
        ('b.jpg,"5 cm mass\nc.jpg,4"\n', 4),
    ],
)
def test_rows_that_a_stray_quotation_mark_joins_are_noticed(tmp_path, text, last):
    path = _write(tmp_path / "t.csv", f"image,caption\na.jpg,x\n{text}z.jpg,z\n")
    first, bad, end = _read(path)
    assert (first[1]["image"], end[1]["image"]) == ("a.jpg", "z.jpg")
    assert bad.key == "line 3"
    assert f"joins it with the rows up to line {last}" in bad.reason


@pytest.mark.parametrize(
    "caption",
    [
        "Axial, coronal\nno effusion, no mass",
        "Findings\n(a) axial, (b) coronal",
        "Figure 1. CT\n\nsee b, c.jpg",
        'said ""no""\nand, then',
    ],
)
def test_captions_of_several_lines_are_kept(tmp_path, caption):
    path = _write(tmp_path / "t.csv", f'image,caption\na.jpg,"{caption}"\nb.jpg,x\n')
    assert [cells["caption"] for _, cells in _read(path)] == [caption.replace('""', '"'), "x"]


def test_the_columns_of_json_are_those_of_all_lines(tmp_path):
    path = _write(tmp_path / "t.jsonl", '{"image": "a"}\n[1]\n{"split": "x", "image": "b"}\n')
    assert column_names(path) == ["image", "split"]


@pytest.mark.parametrize("text", ['[\n {\n  "image": "a"\n }\n]\n', '[{"image": "a"}]', "", "x\n"])
def test_json_that_is_no_lines_of_objects_says_what_it_must_be(tmp_path, text):
    with pytest.raises(UsageError, match=r"must hold a JSON object .* on each line"):
        column_names(_write(tmp_path / "t.json", text))


def test_a_cell_that_is_neither_text_nor_a_number_is_a_bad_row(tmp_path):
    path = tmp_path / "t.parquet"
    table = {"image": ["a", "b"], "caption": ["x", "y"], "patient": [["p"], None]}
    parquet.write_table(pa.table(table), path)
    bad, good = _read(path, optional=("patient",))
    assert bad.reason == "its 'patient' must be text or a number; got list"
    assert good[1]["patient"] is None
    # Without being asked for, it is no matter.
    assert len([row for row in _read(path) if not isinstance(row, Skipped)]) == 2


def test_decimal_numbers_are_kept(tmp_path):
    from decimal import Decimal

    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"image": ["a"], "caption": ["x"], "p": [Decimal("17")]}), path)
    assert _read(path, optional=("p",))[0][1]["p"] == "17"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_that_comes_twice_is_refused(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    if kind == "csv":
        path.write_text("image,caption,caption\na.jpg,,x\n")
    else:
        names = ["image", "caption", "caption"]
        parquet.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, names=names), path)
    with pytest.raises(UsageError, match="has 2 columns 'caption'"):
        _read(path)


def test_a_header_may_be_long_and_holds_no_zero_byte(tmp_path):
    long = _write(tmp_path / "long.csv", f"image,caption,{'x' * 200_000}\na.jpg,x,y\n")
    assert column_names(long)[:2] == ["image", "caption"]
    with pytest.raises(UsageError, match="zero byte in its first line"):
        column_names(_write(tmp_path / "zero.csv", "image,cap\0tion\na.jpg,x\n"))


def test_a_date_that_python_does_not_have_is_one_sentence(tmp_path):
    path = tmp_path / "t.parquet"
    dates = pa.array([2**40], pa.timestamp("s"))
    parquet.write_table(pa.table({"image": ["a"], "caption": ["x"], "patient": dates}), path)
    with pytest.raises(UsageError, match=r"t\.parquet cannot be read"):
        _read(path, optional=("patient",))


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.csv.gz"])
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match="must be a plain file"):
        _read(tmp_path / name)
