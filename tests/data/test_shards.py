import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc

import pytest
from PIL import Image

from medfast.data.records import Record
from medfast.data.shards import Member, frame, is_credentialed, read, read_index, write_index
from medfast.data.sources import hash_split
from medfast.errors import UsageError


def jpeg(shade=0, size=(20, 16)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 40, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


def shard(path, members):
    """Write a tar of (name, bytes) with tarfile, as other tools do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def triples(count, start=0):
    for i in range(start, start + count):
        yield f"{i:03d}.jpg", jpeg(i)
        yield f"{i:03d}.txt", f"caption {i}".encode()
        yield f"{i:03d}.json", json.dumps({"study": f"s{i}", "origin": f"patient {i}"}).encode()


def index(tar):
    """Write the index with DALI's own tool."""
    wds2idx = pytest.importorskip("wds2idx")
    with wds2idx.IndexCreator(str(tar), str(tar.with_suffix(".idx")), verbose=False) as creator:
        creator.create_index()


def split(root, name="train"):
    items = list(read(root, name))
    good = [item for item in items if isinstance(item, Record)]
    return good, [item for item in items if not isinstance(item, Record)]


@pytest.mark.parametrize("with_index", [True, False])
def test_a_sample_comes_with_its_caption_study_origin_and_image(tmp_path, with_index):
    tar = shard(tmp_path / "train" / "000000.tar", triples(3))
    if with_index:
        index(tar)
    records, skipped = split(tmp_path)
    assert not skipped
    assert [r.key for r in records] == ["000", "001", "002"]
    assert [r.caption for r in records] == ["caption 0", "caption 1", "caption 2"]
    assert [r.study for r in records] == ["s0", "s1", "s2"]
    assert records[1].origin == "patient 1"
    assert [r.read() for r in records] == [jpeg(0), jpeg(1), jpeg(2)]
    assert records[0].image == tar


def test_with_an_index_only_the_texts_are_read(tmp_path):
    big = [("a.jpg", bytes(20_000_000)), ("a.txt", b"a caption"), ("a.json", b"{}")]
    tar = shard(tmp_path / "train" / "0.tar", big)
    index(tar)
    tracemalloc.start()
    (record,), _ = split(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert record.caption == "a caption"
    assert peak < 1_000_000


@pytest.mark.parametrize("suffix", ["jpeg", "JPG", "png", "webp", "tif", "dcm"])
def test_images_of_any_suffix_are_found(tmp_path, suffix):
    shard(tmp_path / "train" / "0.tar", [(f"a.{suffix}", jpeg()), ("a.txt", b"text")])
    (record,), _ = split(tmp_path)
    assert record.read() == jpeg()


def test_what_img2dataset_writes_is_read(tmp_path):
    facts = {"caption": "from  the\nfacts", "key": "00000", "status": "success", "width": 20}
    members = [("00000.jpg", jpeg()), ("00000.json", json.dumps(facts).encode())]
    shard(tmp_path / "train" / "00000.tar", members)
    (record,), _ = split(tmp_path)
    assert (record.caption, record.study) == ("from the facts", None)


def test_half_characters_in_facts_are_replaced(tmp_path):
    facts = b'{"caption": "a \\ud83d b", "study": "\\udc00", "origin": 7}'
    shard(tmp_path / "0.tar", [("a.jpg", jpeg()), ("a.json", facts)])
    (record,) = [r for name in ("train", "validation", "test") for r in _try(tmp_path, name)]
    assert (record.caption, record.study, record.origin) == ("a ? b", "?", "7")


def _try(root, name):
    try:
        return split(root, name)[0]
    except UsageError:
        return []


def test_a_further_picture_of_a_sample_is_not_its_image(tmp_path):
    members = [("a.mask.png", b"mask"), ("a.jpg", jpeg()), ("a.txt", b"text"), ("a.cls", b"3")]
    shard(tmp_path / "train" / "0.tar", members)
    (record,), _ = split(tmp_path)
    assert record.read() == jpeg()


def test_folders_hidden_files_and_long_names_in_an_archive_are_no_trouble(tmp_path):
    for name in ("x" * 150, "été"):
        (tmp_path / "in" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "deep" / f"{name}.jpg").write_bytes(jpeg())
        (tmp_path / "in" / "deep" / f"{name}.txt").write_text("text")
    (tmp_path / "in" / "._x.jpg").write_bytes(b"macOS")
    (tmp_path / "set" / "train").mkdir(parents=True)
    for format in ("gnu", "pax"):
        command = ["tar", f"--format={format}", "--sort=name", "-cf"]
        tar = tmp_path / "set" / "train" / f"{format}.tar"
        subprocess.run([*command, tar, "."], check=True, cwd=tmp_path / "in")
    records, skipped = split(tmp_path / "set")
    assert not skipped
    assert [r.key for r in records[:2]] == ["deep/" + "x" * 150, "deep/été"]
    assert [r.read() for r in records] == [jpeg()] * 4


def test_shards_without_folders_are_split_by_patient(tmp_path):
    for number in range(3):
        shard(tmp_path / f"{number}.tar", triples(100, 100 * number))
    found = {name: split(tmp_path, name)[0] for name in ("train", "validation", "test")}
    assert sum(map(len, found.values())) == 300
    assert 5 <= len(found["validation"]) <= 30
    for name, records in found.items():
        assert all(hash_split(r.origin, 0.05, 0.05) == name for r in records)


def test_one_tar_file_is_a_set(tmp_path):
    tar = shard(tmp_path / "all.tar", triples(60))
    counts = [len(split(tar, name)[0]) for name in ("train", "validation", "test")]
    assert sum(counts) == 60
    assert counts[0] > 40


def test_a_key_that_several_shards_have_is_told_apart(tmp_path):
    shard(tmp_path / "train" / "a.tar", triples(2))
    shard(tmp_path / "train" / "b.tar", triples(2))
    records, _ = split(tmp_path)
    assert [r.key for r in records] == ["000", "001", "b/000", "b/001"]


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize(
    ("lost", "reason"),
    [("jpg", "the sample has no image"), ("txt", "the sample has no text")],
)
def test_half_a_sample_is_skipped(tmp_path, lost, reason, with_index):
    members = [(name, data) for name, data in triples(3) if name != f"001.{lost}"]
    tar = shard(tmp_path / "train" / "0.tar", members)
    if with_index:
        index(tar)
    records, (skipped,) = split(tmp_path)
    assert [r.key for r in records] == ["000", "002"]
    assert (skipped.key, skipped.path, skipped.reason) == ("001", f"{tar}, 001", reason)


@pytest.mark.parametrize(
    ("member", "data", "reason"),
    [
        ("001.txt", b"caf\xe9", "the text is not UTF-8"),
        ("001.json", b"{'study': 3}", "its .json cannot be read"),
        ("001.json", b"[1, 2]", "its .json is no object"),
        ("001.json", b"[" * 100_000, "its .json cannot be read"),
    ],
)
def test_texts_that_cannot_be_read_are_skipped(tmp_path, member, data, reason):
    members = [(name, data if name == member else old) for name, old in triples(3)]
    shard(tmp_path / "train" / "0.tar", members)
    records, (skipped,) = split(tmp_path)
    assert [r.key for r in records] == ["000", "002"]
    assert skipped.key == "001"
    assert skipped.reason.startswith(reason)


def _header(tar, name):
    with tarfile.open(tar) as archive:
        return archive.getmember(name).offset


@pytest.mark.parametrize("with_index", [True, False])
def test_a_shard_that_is_cut_off_gives_the_samples_before_the_cut(tmp_path, with_index):
    tar = shard(tmp_path / "train" / "0.tar", triples(6))
    if with_index:
        index(tar)
    cuts = {
        "in an image": _header(tar, "003.jpg") + 700,
        "in a header": _header(tar, "003.txt") + 100,
        "between members": _header(tar, "003.json"),
        "in the last text": _header(tar, "003.json") + 520,
    }
    whole = tar.read_bytes()
    for size in cuts.values():
        tar.write_bytes(whole[:size])
        records, (skipped,) = split(tmp_path)
        assert [r.caption for r in records] == [f"caption {i}" for i in range(3)]
        assert "cut off" in skipped.reason
        assert "after 3 samples" in skipped.reason
        assert skipped.path == str(tar)


def test_a_cut_between_samples_is_noticed_too(tmp_path):
    tar = shard(tmp_path / "train" / "0.tar", triples(6))
    tar.write_bytes(tar.read_bytes()[: _header(tar, "003.jpg")])
    records, (skipped,) = split(tmp_path)
    assert len(records) == 3
    assert "cut off" in skipped.reason


def _damage_header(tar, name, at):
    data = bytearray(tar.read_bytes())
    start = _header(tar, name) + at
    data[start : start + 8] = b"\xff" * 8
    tar.write_bytes(data)


@pytest.mark.parametrize(
    ("at", "with_index"), [(148, False), (0, False), (124, False), (0, True), (124, True)]
)
def test_a_broken_header_ends_its_shard_and_no_other(tmp_path, at, with_index):
    """The bytes at 0 are the name, at 124 the size, at 148 the checksum."""
    first = shard(tmp_path / "train" / "0.tar", triples(6))
    shard(tmp_path / "train" / "1.tar", triples(2, 10))
    if with_index:
        index(first)
    _damage_header(first, "002.txt", at)
    records, (skipped,) = split(tmp_path)
    assert [r.key for r in records] == ["000", "001", "010", "011"]
    assert "header is damaged after 2 samples" in skipped.reason


def test_an_index_makes_up_for_a_broken_checksum(tmp_path):
    tar = shard(tmp_path / "train" / "0.tar", triples(6))
    index(tar)
    _damage_header(tar, "002.jpg", 148)
    records, skipped = split(tmp_path)
    assert [r.read() for r in records] == [jpeg(i) for i in range(6)]
    assert not skipped


def test_a_header_with_a_negative_size_does_not_hang(tmp_path):
    tar = shard(tmp_path / "train" / "0.tar", triples(2))
    data = bytearray(tar.read_bytes())
    start = _header(tar, "001.jpg")
    data[start + 124 : start + 136] = b"\xff" * 10 + b"\xf0\x00"
    data[start + 148 : start + 156] = b" " * 8
    checksum = sum(data[start : start + 512])
    data[start + 148 : start + 156] = f"{checksum:06o}\0 ".encode()
    tar.write_bytes(data)
    records, (skipped,) = split(tmp_path)
    assert [r.key for r in records] == ["000"]
    assert "damaged" in skipped.reason


def test_an_empty_shard_is_skipped(tmp_path):
    shard(tmp_path / "train" / "1.tar", triples(1))
    (tmp_path / "train" / "0.tar").write_bytes(b"")
    (tmp_path / "train" / "2.tar").write_bytes(b"no archive at all, but text\n" * 100)
    (tmp_path / "train" / "3.tar").write_bytes(bytes(10240))
    (tmp_path / "train" / "4.tar").mkdir()
    os.mkfifo(tmp_path / "train" / "5.tar")  # to open it would wait for ever
    records, skipped = split(tmp_path)
    assert [r.key for r in records] == ["000"]
    assert [s.key for s in skipped] == ["0.tar", "2.tar", "3.tar", "4.tar", "5.tar"]
    assert "0 bytes" in skipped[0].reason


def test_flipped_bytes_never_crash_or_hang(tmp_path):
    tar = shard(tmp_path / "train" / "0.tar", triples(2))
    whole = tar.read_bytes()
    for at in range(0, 3 * 1024, 7):
        tar.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            records, skipped = split(tmp_path)
        except UsageError as error:  # the kind of a member became that of a link or device
            assert "ordinary file" in str(error)  # noqa: PT017
        else:
            assert records or skipped


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "x/../../a.jpg", "..\\a.jpg"])
def test_a_member_that_would_leave_its_folder_is_refused(tmp_path, name):
    tar = shard(tmp_path / "train" / "0.tar", [*triples(1), (name, jpeg())])
    with pytest.raises(UsageError) as refused:
        split(tmp_path)
    assert str(tar) in str(refused.value)
    assert name in str(refused.value)


def test_an_index_that_names_such_a_member_is_refused(tmp_path):
    tar = shard(tmp_path / "train" / "0.tar", [("a.jpg", jpeg()), ("../a.txt", b"text")])
    index(tar)
    with pytest.raises(UsageError, match=r"\.\./a\.txt"):
        split(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    tar = tmp_path / "0.tar"
    with tarfile.open(tar, "w") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(UsageError, match=r"0\.tar holds a\.jpg, which is a link or a device"):
        split(tmp_path)


@pytest.mark.parametrize("damage", ["other", "words", "version", "short", "binary"])
def test_an_index_that_is_not_the_shards_is_not_believed(tmp_path, damage):
    tar = shard(tmp_path / "train" / "0.tar", triples(3))
    index(tar)
    path = tar.with_suffix(".idx")
    lines = path.read_text().splitlines()
    if damage == "other":
        # The same size, other samples.
        shard(tar, triples(3, 5))
    elif damage == "binary":
        path.write_bytes(b"\xff\xfe" + bytes(100))
    else:
        changed = {
            "words": [lines[0], lines[1] + " x", *lines[2:]],
            "version": ["v9 3", *lines[1:]],
            "short": lines[:-1],
        }
        path.write_text("\n".join(changed[damage]) + "\n")
    records, skipped = split(tmp_path)
    first = 5 if damage == "other" else 0
    assert [r.caption for r in records] == [f"caption {i}" for i in range(first, first + 3)]
    assert [r.read() for r in records] == [jpeg(i) for i in range(first, first + 3)]
    assert not skipped


def test_an_index_older_than_its_shard_is_used_if_it_fits(tmp_path):
    tar = shard(tmp_path / "train" / "0.tar", triples(2))
    index(tar)
    os.utime(tar.with_suffix(".idx"), (0, 0))
    records, _ = split(tmp_path)
    assert [r.read() for r in records] == [jpeg(0), jpeg(1)]


def test_names_with_spaces_are_read_despite_their_index(tmp_path):
    tar = shard(tmp_path / "train" / "0.tar", [("a b c d.jpg", jpeg()), ("a b c d.txt", b"text")])
    index(tar)
    assert read_index(tar.with_suffix(".idx")) is None
    (record,), _ = split(tmp_path)
    assert record.key == "a b c d"


def test_a_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"there is no .*nowhere.*medfast\.data pack"):
        split(tmp_path / "nowhere")


def test_a_folder_without_shards_says_what_was_looked_for(tmp_path):
    with pytest.raises(UsageError, match=r"holds no train/\*\.tar and no \*\.tar"):
        split(tmp_path)


def test_a_missing_split_says_what_was_looked_for(tmp_path):
    shard(tmp_path / "train" / "0.tar", triples(1))
    with pytest.raises(UsageError, match=r"no validation shards; looked for validation/\*\.tar"):
        split(tmp_path, "validation")


def test_compressed_archives_say_to_unpack_them(tmp_path):
    (tmp_path / "0.tar.gz").write_bytes(b"")
    with pytest.raises(UsageError, match="gunzip"):
        split(tmp_path)


def test_the_manifest_says_whether_a_credentialed_set_was_packed(tmp_path):
    assert not is_credentialed("shards", tmp_path)
    (tmp_path / "pack.json").write_text('{"credentialed": true}')
    assert is_credentialed("shards", tmp_path)
    assert is_credentialed("shards", tmp_path / "train")


def test_a_frame_is_a_member_that_tar_reads(tmp_path):
    tar = tmp_path / "a.tar"
    tar.write_bytes(frame("a.txt", b"text") + bytes(1024))
    shown = subprocess.run(["tar", "-xOf", tar, "a.txt"], check=True, capture_output=True)
    assert shown.stdout == b"text"


def test_reading_needs_no_heavy_package():
    code = "import medfast.data.shards, sys; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "numpy", "PIL"} & set(loaded)


def _lines(tar):
    return tar.with_suffix(".idx").read_text().splitlines()


def _write_lines(tar, lines):
    lines[0] = f"v1.2 {len(lines) - 1}"
    tar.with_suffix(".idx").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("lie", ["offsets", "names"])
def test_an_index_that_swaps_images_is_not_believed(tmp_path, lie):
    images = [jpeg(100 * i) for i in range(3)]
    members = [
        (name, images[at // 3] if name.endswith("jpg") else data)
        for at, (name, data) in enumerate(triples(3))
    ]
    tar = shard(tmp_path / "train" / "0.tar", members)
    samples = []
    with tarfile.open(tar) as archive:
        for image, *rest in zip(*[iter(archive.getmembers())] * 3, strict=True):
            samples.append([Member(m.name, m.offset_data, m.size) for m in (image, *rest)])
    a, b = samples[0][0], samples[1][0]
    if lie == "offsets":
        a, b = a._replace(offset=b.offset, size=b.size), b._replace(offset=a.offset, size=a.size)
    else:
        a, b = a._replace(name=b.name), b._replace(name=a.name)
    samples[0][0], samples[1][0] = a, b
    write_index(tar.with_suffix(".idx"), samples)
    records, skipped = split(tmp_path)
    assert [(r.key, r.caption) for r in records] == [(f"00{i}", f"caption {i}") for i in range(3)]
    assert [r.read() for r in records] == images
    assert not skipped


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_index_that_leaves_out_a_sample_is_not_believed(tmp_path, at):
    tar = shard(tmp_path / "train" / "0.tar", triples(3))
    index(tar)
    lines = _lines(tar)
    del lines[at]
    _write_lines(tar, lines)
    assert len(split(tmp_path)[0]) == 3


@pytest.mark.parametrize("what", ["shard", "garbage"])
def test_what_follows_the_end_of_an_archive_is_reported(tmp_path, what):
    tar = shard(tmp_path / "train" / "0.tar", [*triples(3), ("9.jpg", jpeg()), ("9.txt", b"9")])
    more = shard(tmp_path / "b.tar", triples(2, 5)).read_bytes() if what == "shard" else b"x" * 999
    with tar.open("ab") as file:
        file.write(more)
    records, (bad,) = split(tmp_path)
    # Nothing is cut off, so that the last sample, though it is smaller, is whole.
    assert len(records) == 4
    assert "more follows the end of the archive" in bad.reason


def test_longer_padding_is_no_trouble(tmp_path):
    tar = shard(tmp_path / "train" / "0.tar", triples(2))
    with tar.open("ab") as file:
        file.write(bytes(2**20))
    assert [len(part) for part in split(tmp_path)] == [2, 0]


def test_shards_and_samples_that_the_manifest_lists_are_missed(tmp_path):
    for name in ("0", "1"):
        shard(tmp_path / "train" / f"{name}.tar", triples(2))
    counts = {"train/0.tar": 2, "train/1.tar": 3, "train/2.tar": 4, "test/0.tar": 5}
    (tmp_path / "pack.json").write_text(json.dumps({"credentialed": False, "shards": counts}))
    records, skipped = split(tmp_path)
    assert len(records) == 4
    assert {bad.key: bad.reason for bad in skipped} == {
        "1.tar": "the shard has 2 samples; pack.json lists 3",
        "2.tar": "the shard is missing: pack.json lists it with 4 samples",
    }


def test_a_shard_that_is_named_alone_is_as_credentialed_as_its_set(tmp_path):
    tar = shard(tmp_path / "train" / "0.tar", triples(1))
    assert not is_credentialed("shards", tar)
    (tmp_path / "pack.json").write_text('{"credentialed": true}')
    assert is_credentialed("shards", tar)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"credentialed": "no"}', "[" * 99_999])
def test_a_damaged_manifest_counts_as_credentialed(tmp_path, text):
    (tmp_path / "pack.json").write_text(text)
    assert is_credentialed("shards", tmp_path)


def test_packed_shards_without_their_manifest_count_as_credentialed(tmp_path):
    facts = {"key": "a", "source": "mimic_cxr", "path": "a.jpg", "sha256": "0"}
    members = [("a.jpg", jpeg()), ("a.txt", b"text"), ("a.json", json.dumps(facts).encode())]
    tar = shard(tmp_path / "train" / "0.tar", members)
    for root in (tmp_path, tmp_path / "train", tar):
        assert is_credentialed("shards", root)
    # The facts of other tools.
    facts = {"key": "a", "url": "http://x", "sha256": "0"}
    shard(tar, [*members[:2], ("a.json", json.dumps(facts).encode())])
    assert not is_credentialed("shards", tmp_path)
