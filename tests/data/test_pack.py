import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medfast.data import pack as pack_module
from medfast.data.decode import decode
from medfast.data.pack import pack, read_sources
from medfast.data.records import Record
from medfast.data.shards import read
from medfast.data.skipped import Skipped
from medfast.errors import UsageError


def records_in(folder, count=12, prefix="p"):
    """Write images of every kind and return their records, two to a study."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (30 + i, 40, 3), np.uint8)
        path = folder / f"{prefix}{i}.{('jpg', 'png', 'tif')[i % 3]}"
        Image.fromarray(noise).save(path)
        key = f"{prefix}{i}"
        records.append(Record(key, path, f"caption {i} für", f"s{i // 2}", f"patient {i // 2}"))
    return records


def packed(records, root, out, **options):
    return pack({"train": {"roco": records}}, out, roots={"roco": root}, **options)


def back(out, split="train"):
    return {record.key: record for record in read(out, split)}


def digests(out):
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_what_is_packed_is_read_back(tmp_path):
    records = records_in(tmp_path / "in")
    done = packed(records, tmp_path / "in", tmp_path / "out", samples_per_shard=5, workers=1)
    assert (done.shards, done.samples, done.skipped) == (3, {"train": 12}, 0)
    found = back(tmp_path / "out")
    assert set(found) == {f"roco_{r.key}" for r in records}
    for record in records:
        other = found[f"roco_{record.key}"]
        assert other.caption == record.caption
        assert (other.study, other.origin) == (record.study, record.origin)
        assert other.read() == record.image.read_bytes()


def test_a_shard_holds_image_text_and_facts_of_each_sample(tmp_path):
    records = records_in(tmp_path / "in", 3)
    packed(records, tmp_path / "in", tmp_path / "out", workers=1)
    with tarfile.open(tmp_path / "out" / "train" / "000000.tar") as archive:
        members = archive.getmembers()
        names = [m.name for m in members]
        facts = json.load(archive.extractfile("roco_p1.json"))
    assert sorted(names) == sorted(
        f"roco_p{i}.{suffix}"
        for i in range(3)
        for suffix in (("jpg", "png", "tif")[i], "txt", "json")
    )
    # Sample after sample.
    assert [n.partition(".")[0] for n in names[::3]] == [n.partition(".")[0] for n in names[2::3]]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert facts == {
        "key": "p1",
        "study": "s0",
        "origin": "patient 0",
        "source": "roco",
        "path": "p1.png",
        "sha256": hashlib.sha256(records[1].image.read_bytes()).hexdigest(),
    }


def test_the_index_is_that_of_dalis_own_tool(tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    packed(records_in(tmp_path / "in"), tmp_path / "in", tmp_path / "out", workers=1)
    tar = tmp_path / "out" / "train" / "000000.tar"
    with wds2idx.IndexCreator(str(tar), str(tmp_path / "own.idx"), verbose=False) as creator:
        creator.create_index()
    assert tar.with_suffix(".idx").read_text() == (tmp_path / "own.idx").read_text()


def test_dali_reads_the_shards(tmp_path):
    dali = pytest.importorskip("nvidia.dali")
    packed(
        records_in(tmp_path / "in"),
        tmp_path / "in",
        tmp_path / "out",
        samples_per_shard=5,
        workers=1,
    )
    shards = sorted((tmp_path / "out" / "train").glob("*.tar"))

    @dali.pipeline_def(batch_size=12, num_threads=1, device_id=None)
    def pipeline():
        return tuple(
            dali.fn.readers.webdataset(
                paths=[str(path) for path in shards],
                index_paths=[str(path.with_suffix(".idx")) for path in shards],
                ext=["jpg;png;tif", "txt"],
            )
        )

    pipe = pipeline()
    pipe.build()
    images, texts = pipe.run()
    expected = back(tmp_path / "out")
    for i, key in enumerate(expected):
        assert bytes(np.asarray(images.at(i))) == expected[key].read()
        assert bytes(np.asarray(texts.at(i))).decode() == expected[key].caption


def test_the_bytes_do_not_depend_on_workers(tmp_path):
    records = records_in(tmp_path / "in")
    packed(records, tmp_path / "in", tmp_path / "a", samples_per_shard=4, workers=1)
    packed(records, tmp_path / "in", tmp_path / "b", samples_per_shard=4, workers=2)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    packed(records, tmp_path / "in", tmp_path / "c", samples_per_shard=4, workers=1, seed=1)
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


def test_the_order_is_shuffled(tmp_path):
    records = records_in(tmp_path / "in")
    packed(records, tmp_path / "in", tmp_path / "out", workers=1)
    assert list(back(tmp_path / "out")) != [f"roco_{r.key}" for r in records]


def test_samples_that_cannot_be_used_are_left_out_and_listed(tmp_path):
    records = records_in(tmp_path / "in", 6)
    records[0].image.unlink()
    records[1].image.write_bytes(records[1].image.read_bytes()[:100])
    records[2].image.write_bytes(b"")
    records[3] = Record("p3", records[3].image, "")
    bad_row = Skipped("p9", "captions.txt", "no such id")
    done = packed(records, tmp_path / "in", tmp_path / "out", workers=1, skipped=[bad_row])
    assert done.samples == {"train": 2}
    assert done.skipped == 5
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    reasons = {row["key"]: row["reason"] for row in map(json.loads, lines)}
    assert set(reasons) == {"p0", "p1", "p2", "p3", "p9"}
    assert "caption is empty" in reasons["p3"]
    # The list is the same when nothing is left to do.
    again = packed(records, tmp_path / "in", tmp_path / "out", workers=1, skipped=[bad_row])
    assert (again.kept, again.skipped) == (1, 5)
    assert (tmp_path / "out" / "skipped.jsonl").read_text().splitlines() == lines


def test_an_image_that_was_mended_is_packed_by_the_next_call(tmp_path):
    records = records_in(tmp_path / "in", 6)
    whole = records[0].image.read_bytes()
    records[0].image.write_bytes(b"")
    packed(records, tmp_path / "in", tmp_path / "out", workers=1)
    records[0].image.write_bytes(whole)
    done = packed(records, tmp_path / "in", tmp_path / "out", workers=1)
    assert (done.kept, done.samples, done.skipped) == (0, {"train": 6}, 0)


def test_a_second_call_keeps_what_is_whole_and_mends_the_rest(tmp_path):
    records, out = records_in(tmp_path / "in"), tmp_path / "out"
    options = {"samples_per_shard": 2, "workers": 1}
    packed(records, tmp_path / "in", out, **options)
    before = digests(out)
    train = out / "train"
    times = {path.name: path.stat().st_mtime_ns for path in sorted(train.glob("*.tar"))}
    (train / "000001.tar").unlink()
    (train / "000002.idx").unlink()
    data = (train / "000003.tar").read_bytes()
    (train / "000003.tar").write_bytes(data[: len(data) // 2])
    (train / "000004.tar.99.part").write_bytes(b"half")
    done = packed(records, tmp_path / "in", out, **options)
    assert done.kept == 3
    assert digests(out) == before
    same = [name for name, at in times.items() if (train / name).stat().st_mtime_ns == at]
    assert same == ["000000.tar", "000004.tar", "000005.tar"]


@pytest.mark.parametrize("what", ["image", "text", "facts", "header", "padding", "end"])
def test_a_flipped_byte_is_found_and_mended_by_the_next_call(tmp_path, what):
    records, out = records_in(tmp_path / "in", 6), tmp_path / "out"
    packed(records, tmp_path / "in", out, workers=1)
    before = digests(out)
    tar = out / "train" / "000000.tar"
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
    image, text, facts = members[3:6]
    at = {
        "image": image.offset_data + 50,
        "text": text.offset_data + 2,
        "facts": facts.offset_data + 10,
        "header": text.offset + 140,
        "padding": text.offset_data + text.size + 3,
        "end": tar.stat().st_size - 5,
    }[what]
    data = bytearray(tar.read_bytes())
    data[at] ^= 1
    tar.write_bytes(data)
    assert digests(out) != before
    assert packed(records, tmp_path / "in", out, workers=1).kept == 0
    assert digests(out) == before


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Shards with 240 samples, to be packed again by the command."""
    root = tmp_path_factory.mktemp("many")
    rng = random.Random(0)
    records = []
    for i in range(240):
        buffer = io.BytesIO()
        Image.frombytes("RGB", (64, 64), rng.randbytes(64 * 64 * 3)).save(buffer, "PNG")
        (root / f"{i}.png").write_bytes(buffer.getvalue())
        records.append(Record(f"k{i}", root / f"{i}.png", f"caption {i}"))
    packed(records, root, root / "shards", workers=1)
    return root / "shards"


def _command(many, out):
    arguments = [f"shards:{many}", "--out", str(out), "--samples-per-shard", "6", "--workers", "2"]
    return [sys.executable, "-m", "medfast.data", "pack", *arguments]


def _wait_for(out, shards):
    until = time.monotonic() + 20
    while len(list(out.glob("train/*.tar"))) < shards:
        assert time.monotonic() < until
        time.sleep(0.002)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_pack_goes_on_and_gives_the_same_bytes(tmp_path, many, how):
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run(_command(many, whole), check=True, capture_output=True)
    process = subprocess.Popen(_command(many, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _wait_for(out, 3)
    process.send_signal(how)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert b"Traceback" not in errors
    assert len(list(out.glob("train/*.tar"))) < 40, "it was over too soon to be stopped"
    kept = len(list(out.glob("train/*.tar")))
    again = subprocess.run(_command(many, out), check=True, capture_output=True, text=True)
    assert int(again.stdout.partition(" shards, ")[2].split()[0]) >= kept
    assert digests(out) == digests(whole)


def test_workers_do_not_outlive_a_killed_pack(tmp_path, many):
    process = subprocess.Popen(
        _command(many, tmp_path / "out"), stdout=subprocess.DEVNULL, start_new_session=True
    )
    _wait_for(tmp_path / "out", 1)
    process.kill()
    process.wait()
    until = time.monotonic() + 10
    # Who is left of the session of the killed process?
    while subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True).stdout:
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": 1}, r"begun with seed 0; got 1"),
        ({"short_side": 20}, r"begun with short_side None; got 20"),
        ({"samples_per_shard": 3}, r"begun with samples_per_shard 5; got 3"),
    ],
)
def test_other_settings_in_a_begun_folder_are_refused(tmp_path, options, says):
    records = records_in(tmp_path / "in", 6)
    packed(records, tmp_path / "in", tmp_path / "out", workers=1, samples_per_shard=5)
    with pytest.raises(UsageError, match=says):
        packed(records, tmp_path / "in", tmp_path / "out", workers=1, **options)


def test_other_captions_in_a_begun_folder_are_refused(tmp_path):
    records = records_in(tmp_path / "in", 6)
    packed(records, tmp_path / "in", tmp_path / "out", workers=1)
    records[0] = Record("p0", records[0].image, "another")
    with pytest.raises(UsageError, match="begun with other pairs"):
        packed(records, tmp_path / "in", tmp_path / "out", workers=1)


def test_a_damaged_manifest_is_refused(tmp_path):
    records = records_in(tmp_path / "in", 3)
    packed(records, tmp_path / "in", tmp_path / "out", workers=1)
    (tmp_path / "out" / "pack.json").write_text("{")
    with pytest.raises(UsageError, match=r"pack\.json is damaged"):
        packed(records, tmp_path / "in", tmp_path / "out", workers=1)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_out_with_other_files_is_refused(tmp_path, kind):
    records = records_in(tmp_path / "in", 3)
    out = tmp_path / "in" if kind == "folder" else records[0].image
    with pytest.raises(UsageError, match="new or empty folder"):
        packed(records, tmp_path / "in", out, workers=1)


def test_an_out_that_cannot_be_written_is_refused(tmp_path):
    records = records_in(tmp_path / "in", 3)
    with pytest.raises(UsageError, match="cannot be written"):
        packed(records, tmp_path / "in", Path("/proc/shards"), workers=1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(tmp_path):
    records = records_in(tmp_path / "in", 3)
    records[0].image.unlink()
    packed(records, tmp_path / "in", tmp_path / "out", workers=1)
    # Whatever is written there before it is renamed ends up on a full disk.
    (tmp_path / "out" / "skipped.jsonl.part").symlink_to("/dev/full")
    with pytest.raises(UsageError, match=r"cannot be written: No space left"):
        packed(records, tmp_path / "in", tmp_path / "out", workers=1)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_shard_that_finds_no_room_is_one_sentence(tmp_path, many, workers):
    command = [*_command(many, tmp_path / "out")[:-1], workers]
    # No file may be larger than 40 KiB, a third of a shard.
    limited = ["bash", "-c", 'ulimit -f 40; "$@"', "-", *command]
    process = subprocess.run(limited, capture_output=True, text=True, timeout=30)
    assert process.returncode == 2
    assert "train/000000.tar cannot be written: File too large" in process.stderr
    assert len(process.stderr.splitlines()) == 1
    assert not list((tmp_path / "out" / "train").glob("0*"))


def test_a_shard_that_reads_back_wrong_stops_the_pack(tmp_path, monkeypatch):
    records = records_in(tmp_path / "in", 3)

    def lying(path, samples):
        path.write_text("v1.2 0\n")

    monkeypatch.setattr(pack_module, "write_index", lying)
    with pytest.raises(UsageError, match="does not read back"):
        packed(records, tmp_path / "in", tmp_path / "out", workers=1)
    assert not list((tmp_path / "out" / "train").iterdir())


def test_large_images_are_resized_and_small_ones_keep_their_bytes(tmp_path):
    records = records_in(tmp_path / "in", 9)  # short sides from 30 to 38
    packed(records, tmp_path / "in", tmp_path / "out", short_side=33, workers=1)
    found = back(tmp_path / "out")
    for i, record in enumerate(records):
        data = found[f"roco_{record.key}"].read()
        if i <= 3:
            assert data == record.image.read_bytes()
            continue
        with Image.open(io.BytesIO(data)) as image:
            assert min(image.size) == 33
            assert image.size[1] == 33
            assert image.format == ("JPEG" if i % 3 == 0 else "PNG")
            if image.format == "JPEG":
                from PIL import JpegImagePlugin

                assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4
        size = image.size
        sharp = decode(record.image.read_bytes()).resize(size, Image.Resampling.LANCZOS)
        error = np.abs(np.asarray(decode(data), np.int16) - np.asarray(sharp, np.int16)).mean()
        assert error < (4 if i % 3 == 0 else 0.01)


def test_dicom_keeps_its_bytes_and_becomes_png_when_resized(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    image = FileDataset("a", {}, file_meta=meta, preamble=bytes(128))
    image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    image.Rows, image.Columns, image.SamplesPerPixel = 60, 50, 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    image.PixelData = np.arange(3000, dtype=np.uint16).tobytes()
    path = tmp_path / "image"  # as many DICOM files: without a suffix
    pydicom.dcmwrite(path, image)
    records = [Record("a", path, "text")]
    packed(records, tmp_path, tmp_path / "same", workers=1)
    assert back(tmp_path / "same")["roco_a"].read() == path.read_bytes()
    with tarfile.open(tmp_path / "same" / "train" / "000000.tar") as archive:
        assert "roco_a.dcm" in archive.getnames()
    packed(records, tmp_path, tmp_path / "small", short_side=20, workers=1)
    with Image.open(io.BytesIO(back(tmp_path / "small")["roco_a"].read())) as small:
        assert (small.format, small.size) == ("PNG", (20, 24))


def test_keys_are_made_safe_and_stay_apart(tmp_path):
    (first, *_) = records_in(tmp_path / "in", 1)
    keys = ["a/b.c", "a-b-c", "../x", "p10/" + "1" * 100, "p10/" + "1" * 101, "é"]
    records = [Record(key, first.image, f"caption of {key}") for key in keys]
    packed(records, tmp_path / "in", tmp_path / "out", workers=1)
    found = back(tmp_path / "out")
    assert sorted(r.caption for r in found.values()) == sorted(r.caption for r in records)
    for key in found:
        assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_")
        assert len(key) <= 80


def test_studies_of_several_sources_are_told_apart(tmp_path):
    a, b = records_in(tmp_path / "a", 4), records_in(tmp_path / "b", 4)
    roots = {"roco": tmp_path / "a", "csv": tmp_path / "b"}
    pack({"train": {"roco": a, "csv": b}}, tmp_path / "out", roots=roots, workers=1)
    found = back(tmp_path / "out").values()
    assert {r.study for r in found} == {"roco s0", "roco s1", "csv s0", "csv s1"}
    # A patient is the same wherever he comes from.
    assert {r.origin for r in found} == {"patient 0", "patient 1"}


def test_splits_are_packed_apart(tmp_path):
    records = records_in(tmp_path / "in", 6)
    splits = {"train": {"roco": records[:4]}, "test": {"roco": records[4:]}}
    done = pack(splits, tmp_path / "out", roots={"roco": tmp_path / "in"}, workers=1)
    assert done.samples == {"train": 4, "test": 2}
    assert len(back(tmp_path / "out", "test")) == 2
    with pytest.raises(UsageError, match="no validation shards"):
        back(tmp_path / "out", "validation")


def test_a_shard_is_about_256_mib_unless_told_otherwise(tmp_path, monkeypatch):
    records = records_in(tmp_path / "in")
    mean = sum(r.image.stat().st_size for r in records) / len(records)
    monkeypatch.setattr(pack_module, "SHARD_BYTES", 4.5 * mean)
    assert packed(records, tmp_path / "in", tmp_path / "out", workers=1).shards == 3
    # And stays so, whatever the images of the first samples have become.
    records[0].image.write_bytes(b"")
    assert json.loads((tmp_path / "out" / "pack.json").read_text())["samples_per_shard"] == 4
    packed(records, tmp_path / "in", tmp_path / "out", workers=1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samples_per_shard": 0}, "--samples-per-shard must be at least 1"),
        ({"short_side": -1}, "--short-side must be at least 1"),
        ({"workers": 0}, "--workers must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, options, says):
    with pytest.raises(UsageError, match=says):
        packed(records_in(tmp_path / "in", 3), tmp_path / "in", tmp_path / "out", **options)


def test_nothing_to_pack_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no pair"):
        packed([Record("a", tmp_path / "a.jpg", "")], tmp_path, tmp_path / "out")


def test_progress_counts_every_pair(tmp_path):
    calls = []
    packed(
        records_in(tmp_path / "in", 5),
        tmp_path / "in",
        tmp_path / "out",
        samples_per_shard=2,
        workers=1,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_training_pairs_on_the_exclusion_list_are_not_packed(tmp_path):
    shutil.copytree(_two_splits(tmp_path), tmp_path / "set")
    row = {"source": "shards", "key": "roco_p1", "reason": "same pixels"}
    held_out = {"source": "shards", "key": "roco_p4"}
    lines = f"{json.dumps(row)}\n{json.dumps(held_out)}\n"
    (tmp_path / "set" / "medfast-exclude.jsonl").write_text(lines)
    read = read_sources([("shards", tmp_path / "set")])
    assert {r.key for r in read.records["train"]["shards"]} == {"roco_p0", "roco_p2", "roco_p3"}
    assert {r.key for r in read.records["test"]["shards"]} == {"roco_p4", "roco_p5"}
    (skipped,) = read.skipped
    assert skipped.key == "roco_p1"
    assert "medfast-exclude.jsonl" in skipped.reason


def _two_splits(tmp_path):
    records = records_in(tmp_path / "in", 6)
    splits = {"train": {"roco": records[:4]}, "test": {"roco": records[4:]}}
    pack(splits, tmp_path / "first", roots={"roco": tmp_path / "in"}, workers=1)
    return tmp_path / "first"


def test_splits_that_were_asked_for_must_be_there(tmp_path):
    root = _two_splits(tmp_path)
    assert set(read_sources([("shards", root)]).records) == {"train", "test"}
    with pytest.raises(UsageError, match="no validation shards"):
        read_sources([("shards", root)], ["train", "validation"])
    with pytest.raises(UsageError, match="there is no"):
        read_sources([("shards", root / "nowhere")])


def test_two_folders_of_one_source_have_two_names(tmp_path):
    root = _two_splits(tmp_path)
    shutil.copytree(root, tmp_path / "second")
    read = read_sources([("shards", root), ("shards", tmp_path / "second")], ["train"])
    assert set(read.records["train"]) == {"shards", "shards2"}
    pack(read.records, tmp_path / "out", roots=read.roots, workers=1)
    assert len(back(tmp_path / "out")) == 8


def test_a_set_that_is_named_twice_is_packed_once(tmp_path):
    root = _two_splits(tmp_path)
    (tmp_path / "link").symlink_to(root)
    read = read_sources([("shards", root), ("shards", tmp_path / "link")], ["train"])
    assert set(read.records["train"]) == {"shards"}


def test_a_list_that_lies_with_one_set_leaves_out_nothing_of_another(tmp_path):
    root = _two_splits(tmp_path)
    other = Path(shutil.copytree(root, tmp_path / "second"))
    records = list(back(root).values())
    (root / "medfast-exclude.jsonl").write_text(
        json.dumps({"source": "shards", "key": records[0].key}) + "\n"
    )
    read = read_sources([("shards", root), ("shards", other)], ["train"])
    counts = {name: len(rows) for name, rows in read.records["train"].items()}
    assert counts == {"shards": len(records) - 1, "shards2": len(records)}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_is_full_at_once_does_not_stand_in_the_way_later(tmp_path):
    records, out = records_in(tmp_path / "in", 3), tmp_path / "out"
    out.mkdir()
    # Also what a process that was killed there leaves.
    (out / "pack.json.part").symlink_to("/dev/full")
    with pytest.raises(UsageError, match=r"cannot be written: No space left"):
        packed(records, tmp_path / "in", out, workers=1)
    assert list(out.iterdir()) == []
    (out / "pack.json.part").write_text("{")
    assert packed(records, tmp_path / "in", out, workers=1).samples == {"train": 3}


def test_pairs_that_cannot_be_used_at_all_are_refused(tmp_path):
    records = records_in(tmp_path / "in", 3)
    for record in records:
        record.image.write_bytes(b"")
    with pytest.raises(UsageError, match=r"no pair can be used, as .*skipped\.jsonl"):
        packed(records, tmp_path / "in", tmp_path / "out", workers=1)
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 3


def test_a_shard_that_got_lost_is_missed_by_the_reader(tmp_path):
    records, out = records_in(tmp_path / "in"), tmp_path / "out"
    packed(records, tmp_path / "in", out, samples_per_shard=5, workers=1)
    assert not [item for item in read(out, "train") if isinstance(item, Skipped)]
    (out / "train" / "000001.tar").unlink()
    (bad,) = [item for item in read(out, "train") if isinstance(item, Skipped)]
    assert bad.reason == "the shard is missing: pack.json lists it with 5 samples"
