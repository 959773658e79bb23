import hashlib
import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from medfast.data.check import check
from medfast.data.check_report import summary
from medfast.data.exclude import excluded_keys, exclusion_file, read_rows, write_exclusions
from medfast.data.shards import frame
from medfast.errors import UsageError


def png(seed, **options):
    """A picture of a few smooth shapes, other for every seed."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC).save(buffer, "PNG", **options)
    return buffer.getvalue()


def write(root, **splits):
    """Write shards: for each split, (key, image, caption, further facts) of every sample."""
    for split, samples in splits.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        data = b""
        for key, image, caption, facts in samples:
            data += frame(f"{key}.png", image) + frame(f"{key}.txt", caption.encode())
            data += frame(f"{key}.json", json.dumps(facts).encode())
        (root / split / "000000.tar").write_bytes(data + bytes(1024))
    return root


def plain(first, count):
    return [(f"k{i}", png(i), f"caption number {i}", {}) for i in range(first, first + count)]


@pytest.fixture
def clean(tmp_path):
    return write(tmp_path / "set", train=plain(0, 8), validation=plain(20, 3), test=plain(40, 3))


def checked(root, out, **options):
    return check([("shards", root)], out, workers=1, **options)


def by_split(report):
    return {split["split"]: split for split in report["splits"]}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_clean_set_gets_a_clean_bill(tmp_path, clean):
    report = checked(clean, tmp_path / "out")
    counts = {name: split["pairs"] for name, split in by_split(report).items()}
    assert counts == {"train": 8, "validation": 3, "test": 3}
    assert report["excluded"] == 0
    assert report["near_identical"]["pairs"] == 0
    assert report["verdict"] == (
        "All 14 pairs can be used, and none for training is held out elsewhere."
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "contact.png",
        "exclude.jsonl",
        "histograms.png",
        "report.json",
        "report.md",
        "skipped.jsonl",
    }
    assert (tmp_path / "out" / "skipped.jsonl").read_text() == ""
    assert not exclusion_file(clean).exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_lengths_and_sizes_are_counted(tmp_path, clean):
    train = by_split(checked(clean, tmp_path / "out"))["train"]
    assert (train["words"]["min"], train["words"]["median"], train["words"]["max"]) == (3, 3, 3)
    assert sum(train["words"]["counts"]) == 8
    assert dict(zip(train["words"]["bins"], train["words"]["counts"], strict=True))[2] == 8
    assert train["short_side"]["max"] == 40
    assert train["short_side"]["counts"][0] == 8


def test_damaged_samples_are_counted_and_listed(tmp_path):
    train = plain(0, 6)
    train[0] = ("k0", png(0)[:200], "caption number 0", {})
    train[1] = ("k1", b"", "caption number 1", {})
    train[2] = ("k2", png(2), " ", {})
    root = write(tmp_path / "set", train=train)
    with (root / "train" / "000001.tar").open("wb") as file:
        file.write(frame("only.txt", b"a text") + bytes(1024))
    report = checked(root, tmp_path / "out")
    split = by_split(report)["train"]
    assert (split["unreadable"], split["missing"]) == (2, 0)
    assert (split["empty_captions"], split["bad_rows"]) == (1, 1)
    assert report["verdict"] == "Of 6 pairs, 4 rows or pairs cannot be used (skipped.jsonl)."
    rows = {row["key"]: row for row in lines(tmp_path / "out" / "skipped.jsonl")}
    assert set(rows) == {"k0", "k1", "k2", "only"}
    assert rows["k2"]["reason"] == "the caption is empty"
    assert {(row["source"], row["split"]) for row in rows.values()} == {("shards", "train")}
    assert rows["k0"]["reason"].startswith("unreadable")


def test_missing_files_are_told_from_damaged_ones(tmp_path):
    folder = tmp_path / "roco" / "train" / "radiology"
    (folder / "images").mkdir(parents=True)
    names = [f"ROCO_{i:05d}" for i in range(4)]
    for i, name in enumerate(names):
        Image.open(io.BytesIO(png(i))).save(folder / "images" / f"{name}.jpg")
    (folder / "captions.txt").write_text("".join(f"{n}\t caption {n}\n" for n in names))
    (folder / "images" / "ROCO_00001.jpg").unlink()
    cut = folder / "images" / "ROCO_00002.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    report = check([("roco", tmp_path / "roco")], tmp_path / "out", workers=1)
    split = by_split(report)["train"]
    assert (split["pairs"], split["missing"], split["unreadable"]) == (4, 1, 1)
    reasons = {r["key"]: r["reason"] for r in lines(tmp_path / "out" / "skipped.jsonl")}
    assert reasons["ROCO_00001"] == "missing"
    assert set(reasons) == {"ROCO_00001", "ROCO_00002"}


def test_a_split_that_cannot_be_read_is_noted(tmp_path):
    root = write(tmp_path / "set", train=plain(0, 3))
    report = checked(root, tmp_path / "out")
    assert [split["split"] for split in report["splits"]] == ["train"]
    assert sum("no validation shards" in note for note in report["notes"]) == 1


def test_planted_duplicates_are_found(tmp_path):
    train = plain(0, 4)
    train.append(("file", png(0), "another caption", {}))
    train.append(("pixels", png(1, compress_level=1), "one more caption", {}))
    train.append(("text", png(100), "caption number 2", {}))
    test = [("again", png(0), "caption number 3", {}), ("new", png(50), "new", {})]
    root = write(tmp_path / "set", train=train, test=test)
    found = checked(root, tmp_path / "out")["duplicates"]
    assert png(1) != png(1, compress_level=1)
    files, pixels, captions = found["file"], found["pixels"], found["caption"]
    assert (files["groups"], files["within_a_split"], files["groups_across_splits"]) == (1, 1, 1)
    assert (pixels["groups"], pixels["within_a_split"], pixels["groups_across_splits"]) == (2, 2, 1)
    assert (captions["groups"], captions["within_a_split"]) == (2, 1)
    assert captions["groups_across_splits"] == 1
    assert any("pixels" in place for group in pixels["examples"] for place in group)


def test_duplicates_between_sources_are_found(tmp_path):
    a = write(tmp_path / "a", train=plain(0, 4))
    b = write(tmp_path / "b", train=plain(3, 4))
    report = check([("shards", a), ("shards", b)], tmp_path / "out", workers=1)
    assert report["duplicates"]["file"]["groups_across_sources"] == 1
    assert report["duplicates"]["file"]["groups_across_splits"] == 0
    assert report["excluded"] == 0


def test_alike_images_are_reported_and_not_excluded(tmp_path):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(1))).save(buffer, "JPEG", quality=90)
    root = write(tmp_path / "set", train=plain(0, 6), test=[("near", buffer.getvalue(), "x y", {})])
    report = checked(root, tmp_path / "out")
    near = report["near_identical"]
    assert (near["pairs"], near["across_splits"]) == (1, 1)
    assert near["listed"][0][0].endswith("train k1")
    assert report["excluded"] == 0


def test_even_images_are_not_alike(tmp_path):
    def even(shade):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 40), (shade,) * 3).save(buffer, "JPEG")
        return buffer.getvalue()

    root = write(tmp_path / "set", train=[(f"k{i}", even(i), f"c {i}", {}) for i in range(9)])
    assert checked(root, tmp_path / "out")["near_identical"]["pairs"] == 0


@pytest.mark.parametrize(
    ("train", "held_out", "reason"),
    [
        ({"origin": "patient 7"}, {"origin": "patient 7"}, "same patient"),
        ({"origin": "article PMC1"}, {"origin": "article PMC1"}, "same article"),
        ({"study": "s1"}, {"study": "s1"}, "same study"),
        ({}, {}, "same pixels"),
    ],
)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_training_pairs_that_are_held_out_are_listed(tmp_path, train, held_out, reason, split):
    # The same pixels, in another file.
    image = png(1, compress_level=1) if reason == "same pixels" else png(99)
    samples = plain(0, 4)
    samples[1] = ("k1", png(1), "caption", train)
    root = write(tmp_path / "set", train=samples, **{split: [("held", image, "text", held_out)]})
    report = checked(root, tmp_path / "out")
    assert (report["excluded"], report["overlap"]) == (1, {reason: 1})
    assert lines(tmp_path / "out" / "exclude.jsonl") == [
        {
            "source": "shards",
            "root": str(root),
            "key": "k1",
            "reason": reason,
            "overlaps_with": {
                "source": "shards",
                "root": str(root),
                "split": split,
                "key": "held",
            },
        }
    ]
    # The list lies where training looks for it.
    assert exclusion_file(root) == root / "medfast-exclude.jsonl"
    assert excluded_keys([("shards", root)]) == [{"k1"}]
    assert report["exclusion_lists"] == [str(root / "medfast-exclude.jsonl")]
    assert "1 training pairs are also held out" in report["verdict"]
    assert str(root / "medfast-exclude.jsonl") in summary(report)


def test_studies_of_two_sets_have_nothing_to_do_with_one_another(tmp_path):
    a = write(tmp_path / "a", train=[("k", png(0), "text", {"study": "1"})])
    b = write(tmp_path / "b", test=[("k", png(1), "text", {"study": "1"})])
    report = check([("shards", a)], tmp_path / "out", against=[("shards", b)], workers=1)
    assert report["excluded"] == 0


def test_held_out_splits_of_other_sets_count(tmp_path, clean):
    patient = {"origin": "patient 7"}
    held_out = [("a", png(3), "text", {}), ("b", png(70), "text", patient)]
    train = [("c", png(4), "text", {})]
    other = write(tmp_path / "other", train=train, test=held_out)
    options = {"against": [("shards", other)]}
    report = checked(clean, tmp_path / "out", **options)
    assert [row["key"] for row in lines(tmp_path / "out" / "exclude.jsonl")] == ["k3"]
    # Its training split is no matter.
    assert [s["split"] for s in report["splits"] if s["against"]] == ["test"]
    assert not exclusion_file(other).exists()


def test_a_mended_set_loses_its_list(tmp_path):
    train = plain(0, 2)
    root = write(tmp_path / "set", train=train, test=[("t", png(0), "text", {})])
    assert checked(root, tmp_path / "out")["excluded"] == 1
    assert exclusion_file(root).exists()
    write(root, test=[("t", png(9), "text", {})])
    assert checked(root, tmp_path / "out")["excluded"] == 0
    assert not exclusion_file(root).exists()


def test_what_was_found_against_another_set_is_kept(tmp_path, clean):
    other = write(tmp_path / "other", test=[("held", png(5), "text", {})])
    checked(clean, tmp_path / "out", against=[("shards", other)])
    # Of the same kind, but not the same set.
    checked(clean, tmp_path / "out", against=[("shards", write(tmp_path / "c", test=plain(60, 1)))])
    assert excluded_keys([("shards", clean)]) == [{"k5"}]
    # Another split of it is not the one.
    (other / "test").rename(other / "validation")
    checked(clean, tmp_path / "out", against=[("shards", other)])
    assert excluded_keys([("shards", clean)]) == [{"k5"}]
    # Looked at again, it holds the image no longer.
    write(other, test=plain(60, 1), validation=plain(70, 1))
    checked(clean, tmp_path / "out", against=[("shards", other)])
    assert excluded_keys([("shards", clean)]) == [set()]


def test_what_was_found_within_a_set_that_has_moved_is_found_anew(tmp_path):
    root = write(tmp_path / "set", train=plain(0, 3), test=[("t", png(0), "text", {})])
    checked(root, tmp_path / "out")
    moved = root.rename(tmp_path / "moved")
    assert excluded_keys([("shards", moved)]) == [{"k0"}]
    write(moved, test=plain(9, 1))
    checked(moved, tmp_path / "out")
    assert not exclusion_file(moved).exists()


def test_rows_that_a_person_wrote_are_kept(tmp_path, clean):
    exclusion_file(clean).write_text('{"source": "shards", "key": "k2"}\n')
    checked(clean, tmp_path / "out")
    assert excluded_keys([("shards", clean)]) == [{"k2"}]


def _tables(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "pairs.csv").write_text("")
    return [("csv", tmp_path / name / "pairs.csv") for name in names]


def test_a_list_that_lies_with_a_set_is_about_that_set_alone(tmp_path):
    a, b = _tables(tmp_path, "a", "b")
    write_exclusions(exclusion_file(a[1]), [{"source": "csv", "root": "/once", "key": "1.jpg"}])
    assert excluded_keys([a, b]) == [{"1.jpg"}, set()]


def test_a_list_of_several_sets_tells_them_apart_by_place(tmp_path):
    a, b = _tables(tmp_path, "a", "b")
    path = tmp_path / "exclude.jsonl"
    rows = [
        {"source": "csv", "root": str(a[1]), "key": "1.jpg"},
        {"source": "csv", "root": str(b[1]), "key": "2.jpg"},
        {"source": "csv", "key": "3.jpg"},
        {"source": "roco", "root": str(b[1]), "key": "4.jpg"},
    ]
    write_exclusions(path, rows)
    assert excluded_keys([a, b], path) == [{"1.jpg", "3.jpg"}, {"2.jpg", "3.jpg"}]
    # Alone, its key is enough: it may have moved.
    assert excluded_keys([a], path) == [{"1.jpg", "2.jpg", "3.jpg"}]


def test_a_phantom_is_read_as_roco(tmp_path):
    write_exclusions(exclusion_file(tmp_path), [{"source": "phantom", "key": "a"}])
    assert excluded_keys([("roco", tmp_path)]) == [{"a"}]
    assert excluded_keys([("folder", tmp_path)]) == [set()]


def test_a_set_that_is_named_twice_is_read_once(tmp_path, clean):
    (tmp_path / "link").symlink_to(clean)
    named = [("shards", clean), ("shards", tmp_path / "link")]
    report = check(named, tmp_path / "out", against=named, workers=1)
    assert len(report["splits"]) == 3
    assert report["duplicates"]["file"]["groups"] == 0


def test_bytes_that_are_not_those_that_were_packed_are_found(tmp_path, clean):
    facts = {"source": "roco", "path": "a", "sha256": hashlib.sha256(png(0)).hexdigest()}
    train = [("a", png(0), "one", facts), ("b", png(1), "two", facts)]
    # Of other tools' facts the hash may be that of the file before it was resized.
    train.append(("c", png(2), "three", {"sha256": "0" * 64}))
    report = checked(write(tmp_path / "packed", train=train), tmp_path / "out")
    assert by_split(report)["train"]["unreadable"] == 1
    (row,) = lines(tmp_path / "out" / "skipped.jsonl")
    assert (row["key"], "not those that were packed" in row["reason"]) == ("b", True)


def test_a_check_without_a_pair_that_can_be_used_fails_after_its_report(tmp_path):
    root = write(tmp_path / "set", train=[("a", b"x", "words", {}), ("b", png(0), "", {})])
    with pytest.raises(UsageError, match=r"no pair can be used, as .*skipped\.jsonl"):
        checked(root, tmp_path / "out")
    assert len(lines(tmp_path / "out" / "skipped.jsonl")) == 2
    assert "unreadable" in (tmp_path / "out" / "report.md").read_text()


def test_a_read_error_does_not_blame_out(tmp_path, clean, monkeypatch):
    def refuse(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.glob", refuse)
    with pytest.raises(UsageError, match=r"shards: .*cannot be read .Permission denied"):
        checked(clean, tmp_path / "out")


def test_a_damaged_list_is_replaced_and_noted(tmp_path, clean):
    exclusion_file(clean).write_text("not JSON\n")
    report = checked(clean, tmp_path / "out")
    assert any("damaged list" in note for note in report["notes"])
    assert not exclusion_file(clean).exists()


def test_a_list_that_cannot_be_written_names_the_flag(tmp_path):
    root = write(tmp_path / "set", train=plain(0, 2), test=[("t", png(0), "text", {})])
    # For root too: where the list goes there is a folder.
    (root / "medfast-exclude.jsonl.part").mkdir()
    report = checked(root, tmp_path / "out")
    flag = f"--exclude {tmp_path / 'out' / 'exclude.jsonl'}"
    assert any(flag in note for note in report["notes"])
    assert report["exclusion_lists"] == []


def test_images_of_credentialed_sets_are_shown_only_when_asked(tmp_path, clean):
    checked(clean, tmp_path / "out")
    assert (tmp_path / "out" / "contact.png").exists()
    (clean / "pack.json").write_text('{"credentialed": true}')
    report = checked(clean, tmp_path / "out")
    assert not (tmp_path / "out" / "contact.png").exists()
    assert any("--show-images" in note for note in report["notes"])
    checked(clean, tmp_path / "out", show_images=True)
    assert (tmp_path / "out" / "contact.png").exists()


def test_the_contact_sheet_shows_at_most_24_images_of_the_seed(tmp_path):
    root = write(tmp_path / "set", train=plain(0, 30))
    sheets = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        checked(root, tmp_path / name, seed=seed)
        sheets[name] = (tmp_path / name / "contact.png").read_bytes()
    assert sheets["a"] == sheets["b"] != sheets["c"]
    with Image.open(io.BytesIO(sheets["a"])) as sheet:
        assert sheet.width < 1300
        assert 900 < sheet.height < 1100  # six columns, four rows


def test_several_processes_find_the_same(tmp_path):
    samples = plain(0, 130)
    samples[70] = ("k70", b"no image", "text", {})
    root = write(tmp_path / "set", train=samples, test=plain(125, 10))
    alone = check([("shards", root)], tmp_path / "a", workers=1)
    together = check([("shards", root)], tmp_path / "b", workers=2)
    assert alone == together
    assert alone["excluded"] == 5


def test_progress_counts_every_pair(tmp_path, clean):
    calls = []
    checked(clean, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(8, 14), (11, 14), (14, 14)]


def test_the_report_is_a_page_with_tables(tmp_path, clean):
    checked(clean, tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert f"| shards:{clean} | train | 8 | 0 | 0 | 0 | 0 | 0 | 0 |" in page
    assert "All 14 pairs can be used" in page


def test_an_out_that_cannot_be_written_is_refused_before_the_work(clean):
    seen = []
    with pytest.raises(UsageError, match=r"--out .* cannot be written"):
        check(
            [("shards", clean)], clean / "train" / "000000.tar", progress=lambda *n: seen.append(n)
        )
    assert not seen


def test_a_set_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"there is no .*nowhere"):
        checked(tmp_path / "nowhere", tmp_path / "out")


def test_flipped_bits_in_images_never_stop_a_check(tmp_path):
    rng = random.Random(0)
    samples = []
    for i in range(60):
        buffer = io.BytesIO()
        kind = ("PNG", "JPEG", "TIFF", "WEBP")[i % 4]
        Image.open(io.BytesIO(png(i))).save(buffer, kind)
        data = bytearray(buffer.getvalue())
        for _ in range(10):
            data[rng.randrange(min(len(data), 400))] ^= 1 << rng.randrange(8)
        samples.append((f"k{i}", bytes(data), "text", {}))
    split = by_split(checked(write(tmp_path / "set", train=samples), tmp_path / "out"))["train"]
    assert split["pairs"] == 60
    assert split["unreadable"] > 10


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"source": "roco", "key": "a"}\n{"source": "roco"\n', r"line 2 of the exclusion list"),
        ('["roco", "a"]\n', "must be a JSON object with 'source' and 'key'"),
        ('{"source": "roco", "key": 3}\n', "must be a JSON object with 'source' and 'key'"),
    ],
)
def test_a_damaged_exclusion_list_is_refused(tmp_path, text, says):
    path = tmp_path / "exclude.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        read_rows(path)


def test_an_exclusion_list_that_is_no_text_or_not_there_is_refused(tmp_path):
    path = tmp_path / "exclude.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        read_rows(path)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_rows(tmp_path / "none.jsonl")


def test_an_exclusion_list_keeps_every_key(tmp_path):
    keys = ["a", "é/ü", "with space", "\udcff", 'quo"te', "line\nbreak"]
    rows = [{"source": "csv", "key": key, "reason": "same pixels"} for key in keys]
    write_exclusions(tmp_path / "exclude.jsonl", rows)
    assert [row["key"] for row in read_rows(tmp_path / "exclude.jsonl")] == keys


def test_the_list_of_a_set_that_is_a_file_lies_beside_it(tmp_path):
    (tmp_path / "pairs.csv").write_text("")
    assert exclusion_file(tmp_path / "pairs.csv") == tmp_path / "pairs.csv.medfast-exclude.jsonl"
