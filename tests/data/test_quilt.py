import csv

import pytest
from PIL import Image

from medfast.data import quilt
from medfast.data.skipped import Skipped
from medfast.errors import UsageError

COLUMNS = [
    *("split", "subset", "caption", "image_path", "pathology", "magnification", "height", "width"),
    *("noisy_text", "corrected_text", "med_umls_ids", "roi_text"),
]
VIDEO = "-3f_qOxxmKg"
CAPTION = 'Nests, "basaloid".\nPalisading.'


def read(root, split):
    return list(quilt.read(root, split))


def _write(root, rows, name="quilt_1M_lookup.csv"):
    with (root / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({"subset": "quilt", "caption": CAPTION, **row} for row in rows)
    return root / name


def _row(image, split="train", **more):
    return {"image_path": image, "split": split, **more}


@pytest.mark.parametrize("name", ["quilt_1M_lookup.csv", "quilt_1M_entries.csv"])
@pytest.mark.parametrize("folder", ["quilt_1m", "images", "."])
def test_reads_a_pair(tmp_path, name, folder):
    _write(tmp_path, [_row("a.jpg", "val", noisy_text="['x, y']")], name)
    (tmp_path / folder).mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / folder / "a.jpg")
    (record,) = read(tmp_path, "test")
    assert record.caption == 'Nests, "basaloid". Palisading.'
    assert (record.key, record.study) == ("a.jpg", "a.jpg")
    assert record.image.is_file()


def test_captions_of_one_image_are_one_study_with_keys_of_their_own(tmp_path):
    _write(tmp_path, [_row("a.jpg", "val"), _row("a.jpg", "val"), _row("b.jpg", "val")])
    records = read(tmp_path, "test")
    assert [r.key for r in records] == ["a.jpg", "a.jpg#2", "b.jpg"]
    assert [r.study for r in records] == ["a.jpg", "a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("image", "origin"),
    [
        (f"{VIDEO}_image_5f2b8e3f-1.jpg", f"video {VIDEO}"),
        (f"sub/{VIDEO}_image_5f2b8e3f-1.jpg", f"video {VIDEO}"),
        ("short_image_1.jpg", "image short_image_1.jpg"),
        ("0a1b.jpg", "image 0a1b.jpg"),
    ],
)
def test_the_origin_is_the_video_or_the_image(tmp_path, image, origin):
    _write(tmp_path, [_row(image, "val")])
    (record,) = read(tmp_path, "test")
    assert record.origin == origin


def test_val_is_test_and_a_hundredth_of_train_is_validation(tmp_path):
    # Two frames of each video, two captions of each frame.
    frames = [f"{number // 2:011d}_image_{number % 2}.jpg" for number in range(6000)]
    rows = [_row(name) for name in frames for _ in range(2)]
    _write(tmp_path, [*rows, _row("z.jpg", "val")])
    splits = {split: read(tmp_path, split) for split in ("train", "validation", "test")}
    assert [r.key for r in splits["test"]] == ["z.jpg"]
    assert len(splits["train"]) + len(splits["validation"]) == len(rows)
    assert 0.005 < len(splits["validation"]) / len(rows) < 0.02
    videos = [{r.origin for r in splits[split]} for split in ("train", "validation")]
    assert not videos[0] & videos[1]


def test_bad_rows_are_skipped_and_come_with_train(tmp_path):
    path = _write(tmp_path, [_row(""), _row("a.jpg", "dev"), _row("b.jpg"), _row("c.jpg", "val")])
    with path.open("a") as file:
        file.write("train,quilt,x\n")
    found = read(tmp_path, "train")
    bad = [item for item in found if isinstance(item, Skipped)]
    # Every caption has two lines.
    assert [item.key for item in bad] == ["line 2", "line 4", "line 10"]
    assert {item.path for item in bad} == {str(path)}
    assert [item.key for item in found if item not in bad] == ["b.jpg"]
    assert [item.key for item in read(tmp_path, "test")] == ["c.jpg"]


def test_a_split_without_a_pair_is_refused(tmp_path):
    _write(tmp_path, [_row("a.jpg", "val")])
    with pytest.raises(UsageError, match=r"quilt_1M_lookup\.csv holds no train pair\."):
        read(tmp_path, "train")


def test_bad_rows_alone_are_refused_with_the_first(tmp_path):
    _write(tmp_path, [_row("a.jpg", "dev")])
    with pytest.raises(UsageError, match="line 2: its split must be train or val; got dev"):
        read(tmp_path, "test")


def test_missing_files_say_whom_to_ask(tmp_path):
    with pytest.raises(UsageError, match=r"there is no .*Ask for Quilt-1M"):
        read(tmp_path / "nowhere", "train")
    with pytest.raises(UsageError, match=r"none of: quilt_1M_lookup\.csv, quilt_1M_entries\.csv"):
        read(tmp_path, "train")


def test_a_missing_column_names_the_columns(tmp_path):
    (tmp_path / "quilt_1M_lookup.csv").write_text("split,caption\ntrain,x\n")
    with pytest.raises(UsageError, match="no column 'image_path'; its columns are: split, caption"):
        read(tmp_path, "train")
