import json
import shutil

import pytest

from medfast.data.roco import read
from medfast.errors import UsageError

ODD = 'Tumeur, "grande";\tação é 胸部\nsecond line'
CLEAN = 'Tumeur, "grande"; ação é 胸部 second line'


def _folder(root, split="train"):
    folder = root / split / "radiology"
    (folder / "images").mkdir(parents=True)
    return folder


def test_reads_the_original_layout(tmp_path):
    folder = _folder(tmp_path)
    (folder / "captions.txt").write_text(
        f"ROCO_00001\t Chest x-ray.\nROCO_00002\t {ODD}\nROCO_00003\t \n", encoding="utf-8"
    )
    records = read(tmp_path, "train")
    assert [r.caption for r in records] == ["Chest x-ray.", CLEAN, ""]
    assert records[0].key == "ROCO_00001"
    assert records[0].image == folder / "images" / "ROCO_00001.jpg"
    assert records[0].study is None


@pytest.mark.parametrize("name", ["valdata.csv", "radiologyvaldata.csv"])
def test_reads_kaggles_layout(tmp_path, name):
    folder = _folder(tmp_path, "validation")
    quoted = ODD.replace('"', '""')
    (folder / name).write_text(
        f'\ufeffid,name,caption\nROCO_1,a.jpg,"{quoted}"\n', encoding="utf-8", newline=""
    )
    (record,) = read(tmp_path, "validation")
    assert (record.key, record.caption) == ("ROCO_1", CLEAN)
    assert record.image == folder / "images" / "a.jpg"


def test_reads_json_lines(tmp_path):
    line = json.dumps({"caption": ODD, "image_path": "images/b.jpg"}, ensure_ascii=False)
    (tmp_path / "radiologytest_dataset.json").write_text(line + "\n\n", encoding="utf-8")
    (record,) = read(tmp_path, "test")
    assert record.caption == CLEAN
    assert record.image == tmp_path / "images" / "b.jpg"


def test_takes_studies_from_the_sidecar(phantom):
    records = read(phantom, "train")
    studies = {r.study for r in records}
    assert None not in studies
    assert len(studies) < len(records)  # some studies have two views


def test_a_missing_folder_says_what_to_get(tmp_path):
    with pytest.raises(UsageError, match=r"there is no folder .*nowhere.* Get ROCO"):
        read(tmp_path / "nowhere", "train")


def test_an_unknown_layout_says_what_was_looked_for(tmp_path):
    with pytest.raises(UsageError, match=r"no train captions; looked for .*captions\.txt"):
        read(tmp_path, "train")


def test_a_missing_caption_column_names_the_columns(tmp_path):
    folder = _folder(tmp_path)
    (folder / "traindata.csv").write_text("id,name,text\n1,a.jpg,x\n")
    with pytest.raises(UsageError, match="no column 'caption'; its columns are: id, name, text"):
        read(tmp_path, "train")


@pytest.mark.parametrize("text", ["", "id,name,caption\n"])
def test_an_empty_data_set_is_refused(tmp_path, text):
    folder = _folder(tmp_path)
    (folder / ("traindata.csv" if text else "captions.txt")).write_text(text)
    with pytest.raises(UsageError, match="holds no pair"):
        read(tmp_path, "train")


def test_a_file_of_another_format_names_the_line(tmp_path):
    folder = _folder(tmp_path)
    (folder / "captions.txt").write_text("ROCO_00001,Chest x-ray\n")
    with pytest.raises(UsageError, match=r"line 1 of .* must be an id, a tab and a caption"):
        read(tmp_path, "train")


def test_a_damaged_json_line_is_named(tmp_path):
    (tmp_path / "radiologytrain_dataset.json").write_text('{"caption": "x"}\n')
    with pytest.raises(UsageError, match=r"line 1 of .* 'image_path'"):
        read(tmp_path, "train")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (_folder(tmp_path) / "captions.txt").write_bytes(b"ROCO_1\t \xff\xfe\n")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        read(tmp_path, "train")


def test_a_damaged_sidecar_is_named(own_phantom):
    (own_phantom / "phantom.json").write_text("{")
    with pytest.raises(UsageError, match=r"phantom\.json is damaged"):
        read(own_phantom, "train")


def test_a_missing_split_is_refused(own_phantom):
    shutil.rmtree(own_phantom / "test")
    with pytest.raises(UsageError, match="no test captions"):
        read(own_phantom, "test")
