import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from medfast.data.__main__ import main
from medfast.data.shards import frame, read


def write(root, **splits):
    """Write shards of samples whose image depends on their number alone."""
    for split, numbers in splits.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        data = b""
        for i in numbers:
            buffer = io.BytesIO()
            noise = np.random.default_rng(i).integers(0, 256, (24, 24, 3), np.uint8)
            Image.fromarray(noise).save(buffer, "PNG")
            data += frame(f"k{i}.png", buffer.getvalue())
            data += frame(f"k{i}.txt", f"caption {i}".encode())
        (root / split / "000000.tar").write_bytes(data + bytes(1024))
    return root


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "set", train=range(6), test=(4, 10))


def refused(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in argv])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("medfast.data")
    assert "error: " in line
    return line


def test_check_ends_with_a_table_and_a_verdict(source, tmp_path, capsys):
    main(["check", f"shards:{source}", "--out", str(tmp_path / "out"), "--workers", "1"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:3] == ["source", "split", "pairs"]
    assert shown[1].split()[:3] == [f"shards:{source}", "train", "6"]
    assert shown[-2].startswith("Of 8 pairs, 1 training pairs are also held out")
    assert shown[-1] == f"More in {tmp_path / 'out' / 'report.md'}"
    assert any(str(source / "medfast-exclude.jsonl") in line for line in shown)


def test_a_check_is_written_into_a_folder_named_after_its_sources(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["check", f"shards:{source}", "--workers", "1"])
    assert (tmp_path / "check-shards" / "report.md").is_file()


def test_check_looks_at_other_sets(source, tmp_path):
    other = write(tmp_path / "other", validation=(0, 30))
    out = tmp_path / "out"
    command = ["check", f"shards:{source}", "--against", f"shards:{other}", "--out", str(out)]
    main([*command, "--workers", "1"])
    rows = (out / "exclude.jsonl").read_text().splitlines()
    assert [json.loads(row)["key"] for row in rows] == ["k0", "k4"]


def test_what_check_excludes_is_not_packed(source, tmp_path, capsys):
    main(["check", f"shards:{source}", "--out", str(tmp_path / "check"), "--workers", "1"])
    out = tmp_path / "out"
    main(["pack", f"shards:{source}", "--out", str(out), "--workers", "1"])
    assert "5 train, 2 test pairs in 2 shards" in capsys.readouterr().out
    assert sorted(r.caption for r in read(out, "train")) == [
        f"caption {i}" for i in (0, 1, 2, 3, 5)
    ]
    (row,) = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    assert row["key"] == "k4"


def test_pack_says_how_to_train_on_the_shards_and_what_it_kept(source, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["pack", f"shards:{source}", "--out", str(out), "--samples-per-shard", "4"]
    main([*command, "--workers", "1"])
    assert f"--train-data shards:{out}" in capsys.readouterr().out
    main([*command, "--workers", "1"])
    assert "in 3 shards, 3 of them from before" in capsys.readouterr().out


def test_pack_takes_some_splits(source, tmp_path):
    out = tmp_path / "out"
    main(["pack", f"shards:{source}", "--out", str(out), "--splits", "test", "--workers", "1"])
    assert sorted(path.name for path in out.iterdir()) == ["pack.json", "skipped.jsonl", "test"]


def test_pack_resizes(source, tmp_path):
    out = tmp_path / "out"
    command = ["pack", f"shards:{source}", "--out", str(out), "--short-side", "16"]
    main([*command, "--workers", "1"])
    for record in read(out, "train"):
        with Image.open(io.BytesIO(record.read())) as image:
            assert image.size == (16, 16)


def test_mistakes_are_one_sentence(source, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    assert "Did you mean 'shards'?" in refused(capsys, ["check", f"shard:{source}"])
    assert "needs a folder" in refused(capsys, ["check", "roco"])
    assert "there is no" in refused(capsys, ["pack", f"shards:{tmp_path / 'none'}", *out])
    wrong = ["pack", f"shards:{source}", *out, "--splits", "tests"]
    assert "Did you mean 'test'?" in refused(capsys, wrong)
    missing = ["pack", f"shards:{source}", *out, "--splits", "validation"]
    assert "no validation shards" in refused(capsys, missing)
    assert "new or empty folder" in refused(capsys, ["pack", f"shards:{source}", "--out", source])
    assert "--workers" in refused(capsys, ["check", f"shards:{source}", *out, "--workers", "0"])
    assert "cannot be written" in refused(
        capsys, ["check", f"shards:{source}", "--out", source / "train" / "000000.tar"]
    )


@pytest.mark.parametrize("argv", [["check"], ["pack", "shards:x"], [], ["unpack"]])
def test_what_is_missing_on_the_command_line_is_named(capsys, argv):
    assert refused(capsys, argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--help"], ["phantom", "check", "pack"]),
        (["check", "--help"], ["--against", "--show-images", "medfast-exclude.jsonl"]),
        (["pack", "--help"], ["--samples-per-shard", "--short-side", "256 MiB", "goes on"]),
    ],
)
def test_the_help_says_what_there_is_and_is_quick(argv, words):
    code = (
        "import sys\nfrom medfast.data.__main__ import main\n"
        f"try:\n    main({argv!r})\n"
        "except SystemExit:\n    print('modules', *sys.modules, file=sys.stderr)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert all(word in shown.stdout for word in words)
    heavy = {"torch", "numpy", "PIL", "matplotlib", "pyarrow", "pydicom", "tqdm"}
    assert not heavy & set(shown.stderr.split())


def test_the_phantom_is_still_written(tmp_path, capsys):
    main(["phantom", "--out", str(tmp_path / "phantom"), "--pairs", "30"])
    assert "30 pairs" in capsys.readouterr().out
    assert "layout" in refused(capsys, ["phantom", "--layout", "x", "--out", tmp_path / "x"])


def test_the_columns_of_a_table_can_be_named(tmp_path, capsys):
    rows = []
    for i in range(8):
        Image.new("L", (20, 20), i).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png;words {i};{'train' if i < 6 else 'test'}\n")
    (tmp_path / "pairs.csv").write_text("picture;says;split\n" + "".join(rows))
    source = f"csv:{tmp_path / 'pairs.csv'}"
    said = refused(capsys, ["pack", source, "--out", tmp_path / "no"])
    assert "picture" in said
    columns = ["--csv-img-key", "picture", "--csv-caption-key", "says", "--csv-separator", ";"]
    main(["check", source, "--out", str(tmp_path / "check"), "--workers", "1", *columns])
    report = json.loads((tmp_path / "check" / "report.json").read_text())
    assert sum(split["pairs"] for split in report["splits"]) == 8
    main(["pack", source, "--out", str(tmp_path / "packed"), "--workers", "1", *columns])
    assert len(list(read(tmp_path / "packed", "train"))) == 6


def test_the_phantom_says_how_to_train_on_it(tmp_path, capsys):
    for layout, source in (("roco_json", f"roco:{tmp_path / 'roco_json'}"), ("csv", "csv:")):
        main(["phantom", "--layout", layout, "--pairs", "30", "--out", str(tmp_path / layout)])
        assert f"--train-data {source}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "pack"])
def test_a_separator_that_cannot_be_one_is_one_sentence(tmp_path, capsys, command):
    (tmp_path / "pairs.csv").write_text("filepath,title\na.jpg,x\n")
    argv = [command, f"csv:{tmp_path / 'pairs.csv'}", "--out", tmp_path / "out"]
    assert "must be a single character" in refused(capsys, [*argv, "--csv-separator", "::"])


def test_pairs_that_cannot_be_used_at_all_end_with_a_sentence(tmp_path, capsys):
    (tmp_path / "pairs.csv").write_text("filepath,title,split\na.jpg,x,train\n")
    for command in ("check", "pack"):
        source = f"csv:{tmp_path / 'pairs.csv'}"
        argv = [command, source, "--out", tmp_path / command, "--workers", "1"]
        assert f"{command}: no pair can be used, as {tmp_path}" in refused(capsys, argv)


def test_a_name_that_no_file_can_have_is_one_sentence(tmp_path, capsys):
    for name in ("csv", "roco", "x" * 300):
        said = refused(capsys, ["check", f"{name}:{'x' * 300}", "--out", tmp_path / "out"])
        assert "x" * 300 in said
        assert "--out" not in said


@pytest.mark.parametrize("command", ["check", "pack"])
def test_a_split_that_cannot_be_read_is_no_split_that_is_absent(tmp_path, capsys, command):
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    row = '{"image_path": "a.png", "caption": "words"}\n'
    (tmp_path / "radiologytest_dataset.json").write_text(row)
    argv = [command, f"roco:{tmp_path}", "--workers", "1", "--out"]
    main([str(argument) for argument in [*argv, tmp_path / "without"]])
    (tmp_path / "radiologytrain_dataset.json").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in refused(capsys, [*argv, tmp_path / "with"])
