import os

import pytest

from medfast.data import SPLITS, read_split
from medfast.data.folder import read
from medfast.data.skipped import Skipped
from medfast.errors import UsageError


def _write(root, *names, caption="words"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return root


def test_reads_images_with_the_text_beside_them_in_order(tmp_path):
    _write(tmp_path, "train/b.jpg", "train/a/c.PNG", "train/a.dcm", "val/d.tiff", "test/e.webp")
    (tmp_path / "train" / "notes.md").write_text("no image")
    records = list(read(tmp_path, "train"))
    assert [r.key for r in records] == ["train/a.dcm", "train/b.jpg", "train/a/c.PNG"]
    assert {r.caption for r in records} == {"words"}
    assert records[2].image == tmp_path / "train/a/c.PNG"
    assert [r.key for r in read(tmp_path, "validation")] == ["val/d.tiff"]
    assert [r.key for r in read(tmp_path, "test")] == ["test/e.webp"]


def test_without_folders_of_splits_the_path_decides(tmp_path):
    _write(tmp_path, *(f"{i // 100}/{i}.jpg" for i in range(600)))
    found = {split: [r.key for r in read(tmp_path, split)] for split in SPLITS}
    keys = [key for part in found.values() for key in part]
    assert sorted(keys) == sorted(f"{i // 100}/{i}.jpg" for i in range(600))
    assert 10 <= len(found["validation"]) <= 60
    assert 10 <= len(found["test"]) <= 60


def test_white_space_and_a_mark_of_byte_order_go(tmp_path):
    _write(tmp_path, "train/a.jpg", caption="\ufeff one\r\n two\t")
    (record,) = read(tmp_path, "train")
    assert record.caption == "one two"


def test_an_image_without_a_text_is_skipped_beside_others(tmp_path):
    _write(tmp_path, "train/a.jpg")
    _write(tmp_path, "train/b.jpg", caption=None)
    (tmp_path / "train/c.jpg").write_bytes(b"x")
    (tmp_path / "train/c.txt").write_bytes(b"\xff\xfe\xff")
    found = {r.key: getattr(r, "reason", "") for r in read(tmp_path, "train")}
    assert found["train/a.jpg"] == ""
    assert "there is no b.txt beside it" in found["train/b.jpg"]
    assert "cannot be read" in found["train/c.jpg"]


def test_images_without_any_text_are_refused(tmp_path):
    _write(tmp_path, "train/a.jpg", caption=None)
    with pytest.raises(UsageError, match=r"holds no train pair.*there is no a\.txt"):
        list(read(tmp_path, "train"))


def test_links_that_lead_out_are_not_followed(tmp_path):
    outside = _write(tmp_path / "outside", "o.jpg")
    root = _write(tmp_path / "root", "train/a.jpg", "train/b.jpg")
    os.symlink(outside / "o.jpg", root / "train" / "o.jpg")
    (root / "train" / "o.txt").write_text("a link")
    os.symlink(outside, root / "train" / "folder")
    os.symlink(root / "train" / "a.jpg", root / "train" / "same.jpg")
    os.symlink(root / "train" / "a.txt", root / "train" / "same.txt")
    found = {r.key: isinstance(r, Skipped) for r in read(root, "train")}
    assert found == {
        "train/a.jpg": False,
        "train/b.jpg": False,
        "train/o.jpg": True,
        "train/same.jpg": False,
    }


def test_a_folder_that_is_missing_or_a_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"there is no .*nowhere"):
        next(read(tmp_path / "nowhere", "train"))
    _write(tmp_path, "a.jpg")
    with pytest.raises(UsageError, match="is a file; name its folder"):
        next(read(tmp_path / "a.jpg", "train"))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    _write(tmp_path, "train/a.jpg", "train/secret/b.jpg")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"folder: .*secret cannot be read .Permission denied"):
        read_split("folder", tmp_path, "train")


def test_a_named_pipe_is_skipped_and_not_waited_for(tmp_path):
    _write(tmp_path, "train/a.jpg")
    _write(tmp_path, "train/b.jpg", caption=None)
    os.mkfifo(tmp_path / "train" / "b.txt")
    (bad,) = [r for r in read(tmp_path, "train") if isinstance(r, Skipped)]
    assert (bad.key, bad.reason) == ("train/b.jpg", "the caption is no plain file")


def test_an_empty_split_says_what_to_do(tmp_path):
    _write(tmp_path / "a", "b.jpg")
    with pytest.raises(UsageError, match=r"about 100 of them: .* make folders train, validation"):
        list(read(tmp_path / "a", "validation"))
    _write(tmp_path / "c", "train/b.jpg")
    with pytest.raises(UsageError, match=r"holds no test pair\. Put images .* into .*test"):
        list(read(tmp_path / "c", "test"))


@pytest.mark.parametrize("text", ["[]", '{"samples": {"a.jpg": {}}}', '{"samples": []}', "{}"])
def test_another_programs_sidecar_is_one_sentence(tmp_path, text):
    _write(tmp_path, "train/a.jpg")
    (tmp_path / "phantom.json").write_text(text)
    with pytest.raises(UsageError, match=r"phantom\.json is damaged .* rename the file"):
        list(read(tmp_path, "train"))
