import json
import shutil

import pytest
from PIL import Image

from medfast.data import roco
from medfast.data.skipped import Skipped
from medfast.errors import UsageError

ODD = 'Tumeur, "grande";\tação é 胸部\nsecond line'
CLEAN = 'Tumeur, "grande"; ação é 胸部 second line'
COMMAND = "wget -r ftp://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/46/5e/PMC4083729.tar.gz "


def read(root, split):
    return list(roco.read(root, split))


def _folder(root, split="train"):
    folder = root / split / "radiology"
    (folder / "images").mkdir(parents=True)
    return folder


def _image(path):
    Image.new("L", (8, 8)).save(path)


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
    assert records[0].origin is None


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


def test_non_radiology_is_left_out(tmp_path):
    for kind in ("radiology", "non-radiology"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        (tmp_path / "train" / kind / "captions.txt").write_text(f"ROCO_1\t {kind}\n")
    assert [r.caption for r in read(tmp_path, "train")] == ["radiology"]


def test_the_article_comes_from_the_links(tmp_path):
    folder = _folder(tmp_path)
    (folder / "captions.txt").write_text("ROCO_1\t x\nROCO_2\t y\nROCO_3\t z\n")
    (folder / "dlinks.txt").write_text(
        f"ROCO_1\t{COMMAND}\tAMHSR-4-14-g002.jpg\nROCO_2\tno such address\ta.jpg\n"
    )
    assert [r.origin for r in read(tmp_path, "train")] == ["article PMC4083729", None, None]


def test_without_links_the_article_comes_from_the_licences(tmp_path):
    folder = _folder(tmp_path)
    (folder / "captions.txt").write_text("ROCO_1\t x\n")
    (folder / "licences.txt").write_text("ROCO_ID,PMC_ID,CC\nROCO_1,PMC397_a.jpg,CC BY\n")
    (record,) = read(tmp_path, "train")
    assert record.origin == "article PMC397"


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (["ROCO_1.jpg", "PMC4083729_a.jpg", "a.jpg"], "ROCO_1.jpg"),
        (["PMC4083729_a.jpg", "a.jpg"], "PMC4083729_a.jpg"),
        (["a.jpg"], "a.jpg"),
        ([], "ROCO_1.jpg"),
    ],
)
def test_the_image_has_the_name_of_the_id_or_of_the_links(tmp_path, present, expected):
    folder = _folder(tmp_path)
    (folder / "captions.txt").write_text("ROCO_1\t x\n")
    (folder / "dlinks.txt").write_text(f"ROCO_1\t{COMMAND}\ta.jpg\n")
    for name in present:
        _image(folder / "images" / name)
    (record,) = read(tmp_path, "train")
    assert record.image == folder / "images" / expected


def test_kaggles_article_comes_from_links_or_the_name(tmp_path):
    folder = _folder(tmp_path)
    (folder / "traindata.csv").write_text(
        "id,name,caption\nROCO_1,PMC11_a.jpg,x\nROCO_2,b.jpg,y\nROCO_3,c.jpg,z\n"
    )
    (folder / "dlinks.txt").write_text(f"ROCO_2\t{COMMAND}\tb.jpg\n")
    origins = [r.origin for r in read(tmp_path, "train")]
    assert origins == ["article PMC11", "article PMC4083729", None]


def test_takes_studies_from_the_sidecar(phantom):
    records = read(phantom, "train")
    studies = {r.study for r in records}
    assert None not in studies
    assert len(studies) < len(records)  # some studies have two views


def test_an_id_that_comes_twice_gets_a_key_of_its_own(tmp_path):
    folder = _folder(tmp_path)
    (folder / "captions.txt").write_text("ROCO_1\t x\nROCO_1\t y\n")
    first, second = read(tmp_path, "train")
    assert (first.key, second.key) == ("ROCO_1", "ROCO_1#2")
    assert first.image == second.image


def test_a_missing_folder_says_what_to_get(tmp_path):
    with pytest.raises(UsageError, match=r"roco: there is no .*nowhere\. Get ROCO .* Commons"):
        read(tmp_path / "nowhere", "train")


def test_an_unknown_layout_says_what_was_looked_for(tmp_path):
    with pytest.raises(UsageError, match=r"holds none of: train/radiology/captions\.txt, .*json\."):
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
    with pytest.raises(UsageError, match="holds no train pair"):
        read(tmp_path, "train")


def test_a_file_of_another_format_names_the_line(tmp_path):
    folder = _folder(tmp_path)
    (folder / "captions.txt").write_text("ROCO_00001,Chest x-ray\n")
    with pytest.raises(
        UsageError, match=r"no train pair.*line 1: it must be an id, a tab and a cap"
    ):
        read(tmp_path, "train")


def test_lines_before_the_first_id_are_skipped(tmp_path):
    folder = _folder(tmp_path)
    (folder / "captions.txt").write_text("id caption\n\nROCO_1\t x\n")
    bad, record = read(tmp_path, "train")
    assert bad[:2] == ("line 1", str(folder / "captions.txt"))
    assert record.key == "ROCO_1"


def test_a_row_without_an_image_name_is_skipped(tmp_path):
    folder = _folder(tmp_path)
    (folder / "traindata.csv").write_text("id,name,caption\n7,,x\n,,y\nROCO_1,a.jpg,\n")
    first, second, record = read(tmp_path, "train")
    assert first == Skipped("7", str(folder / "traindata.csv"), "it has no image name")
    assert second.key == "line 3"
    assert record.caption == ""


def test_damaged_json_lines_are_skipped_and_named(tmp_path):
    path = tmp_path / "radiologytrain_dataset.json"
    path.write_text(
        '{"caption": "x"}\n{"caption": "x", "image_path": null}\n{"caption"\n'
        '{"caption": null, "image_path": "a.jpg"}\n'
    )
    *bad, record = read(tmp_path, "train")
    assert [skipped.key for skipped in bad] == ["line 1", "line 2", "line 3"]
    assert "no 'image_path'" in bad[0].reason
    assert (record.key, record.caption) == ("a.jpg", "")


@pytest.mark.parametrize("name", ["captions.txt", "dlinks.txt"])
def test_bytes_that_are_no_text_are_refused(tmp_path, name):
    folder = _folder(tmp_path)
    (folder / "captions.txt").write_text("ROCO_1\t x\n")
    (folder / name).write_bytes(b"ROCO_1\t \xff\xfe\n")
    with pytest.raises(UsageError, match=f"{name} is not UTF-8 text"):
        read(tmp_path, "train")


def test_a_damaged_sidecar_is_named(own_phantom):
    (own_phantom / "phantom.json").write_text("{")
    with pytest.raises(UsageError, match=r"phantom\.json is damaged"):
        read(own_phantom, "train")


def test_a_missing_split_is_refused(own_phantom):
    shutil.rmtree(own_phantom / "test")
    with pytest.raises(UsageError, match=r"holds none of: test/radiology/captions\.txt"):
        read(own_phantom, "test")
