import json
from collections import defaultdict

import pytest
from PIL import Image

from medfast.data import pmc_oa
from medfast.errors import UsageError

SUBFIGURES = "caption_T060_filtered_top4_sep_v0_subfigures"
CAPTION = 'Axial CT, "late" phase.\nArrow: cyst, left.'
CLEAN = 'Axial CT, "late" phase. Arrow: cyst, left.'


def read(root, split):
    return list(pmc_oa.read(root, split))


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(name, caption=CAPTION, **more):
    return {"image": name, "caption": caption, **more}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_reads_a_file_of_json_lines_per_split(tmp_path, split):
    for stem, own in [("train", "train"), ("valid", "validation"), ("test", "test")]:
        _write(tmp_path / f"{stem}.jsonl", [_row(f"PMC1_{own}.jpg", alignment_score=0.5)])
    (tmp_path / "images").mkdir()
    (record,) = read(tmp_path, split)
    assert record.key == f"PMC1_{split}.jpg"
    assert record.caption == CLEAN
    assert record.image == tmp_path / "images" / record.key
    assert record.origin == "article PMC1"
    assert record.study is None


def test_reads_csv(tmp_path):
    quoted = CAPTION.replace('"', '""')
    (tmp_path / "valid.csv").write_text(f'image,caption\nPMC22_a.jpg,"{quoted}"\n')
    (record,) = read(tmp_path, "validation")
    assert (record.key, record.caption) == ("PMC22_a.jpg", CLEAN)


@pytest.mark.parametrize("folder", ["images", SUBFIGURES, f"images/{SUBFIGURES}", "."])
def test_finds_the_folder_of_the_images(tmp_path, folder):
    _write(tmp_path / "train.jsonl", [_row("PMC1_a.jpg")])
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / folder / "PMC1_a.jpg")
    (record,) = read(tmp_path, "train")
    assert record.image.is_file()


@pytest.mark.parametrize("name", ["pmc_oa.jsonl", "pmc_oa_beta.jsonl"])
def test_upstreams_single_file_is_split_by_article(tmp_path, name):
    names = [f"PMC{number // 3}_{number}.jpg" for number in range(3000)]
    _write(tmp_path / name, map(_row, names))
    splits = {split: read(tmp_path, split) for split in ("train", "validation", "test")}
    assert sorted(r.key for records in splits.values() for r in records) == sorted(names)
    found = defaultdict(set)
    for split, records in splits.items():
        for record in records:
            found[record.origin].add(split)
    assert {len(own) for own in found.values()} == {1}
    assert 0.07 < len(splits["validation"]) / 3000 < 0.13
    assert 0.07 < len(splits["test"]) / 3000 < 0.13


def test_files_per_split_come_before_the_single_file(tmp_path):
    _write(tmp_path / "pmc_oa.jsonl", [_row("PMC1_whole.jpg")])
    _write(tmp_path / "train.jsonl", [_row("PMC1_own.jpg")])
    assert [r.key for r in read(tmp_path, "train")] == ["PMC1_own.jpg"]


def test_captions_of_one_image_have_keys_of_their_own(tmp_path):
    _write(tmp_path / "train.jsonl", [_row("PMC1_a.jpg"), _row("PMC1_a.jpg", "Other.")])
    assert [r.key for r in read(tmp_path, "train")] == ["PMC1_a.jpg", "PMC1_a.jpg#2"]


def test_a_name_without_an_article_has_no_origin(tmp_path):
    _write(tmp_path / "train.jsonl", [_row("a.jpg", None)])
    (record,) = read(tmp_path, "train")
    assert record.origin is None
    assert record.caption == ""


def test_bad_rows_are_skipped_and_those_of_a_shared_file_come_once(tmp_path):
    names = [f"PMC{number}_a.jpg" for number in range(100)]
    _write(tmp_path / "pmc_oa.jsonl", [_row(None), *map(_row, names), {"image": "PMC1_b.jpg"}])
    found = {split: read(tmp_path, split) for split in ("train", "validation", "test")}
    bad = [item for item in found["train"] if not hasattr(item, "caption")]
    assert [item.key for item in bad] == ["line 1", "line 102"]
    assert all(hasattr(item, "caption") for item in found["validation"] + found["test"])


def test_bad_rows_alone_are_refused_with_the_first(tmp_path):
    _write(tmp_path / "test.jsonl", [_row(""), _row(None)])
    with pytest.raises(
        UsageError, match=r"test\.jsonl holds no test pair.*line 1: it has no image"
    ):
        read(tmp_path, "test")


@pytest.mark.parametrize("folder", [".", "nowhere"])
def test_missing_files_say_what_to_get(tmp_path, folder):
    with pytest.raises(UsageError, match=r"pmc_oa: .*Get PMC-OA from Hugging Face, axiong/pmc_oa"):
        read(tmp_path / folder, "validation")
    with pytest.raises(UsageError, match=r"holds none of: valid\.jsonl, .*pmc_oa_beta\.jsonl"):
        read(tmp_path, "validation")


def test_a_missing_column_names_the_columns(tmp_path):
    (tmp_path / "train.csv").write_text("image,text\na.jpg,x\n")
    with pytest.raises(UsageError, match="no column 'caption'; its columns are: image, text"):
        read(tmp_path, "train")
