"""The train command from flags to run folder, with good and with damaged input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from medfast import checkpoint, train
from medfast.data import read_split
from medfast.data.exclude import exclusion_file
from medfast.data.phantom import write_phantom
from medfast.run_folder import RunFolder

SHORT = ["--epochs", "2", "--batch-size", "16", "--workers", "0", "--warmup", "2"]


def _jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _argv(data, logs, *more):
    return ["--train-data", f"roco:{data}", "--logs", str(logs), "--name", "a", *SHORT, *more]


def test_a_run_leaves_everything_it_promises(short_run):
    assert sorted(p.name for p in short_run.iterdir()) == [
        *("checkpoints", "metrics.jsonl", "out.log", "params.yaml", "report.html"),
        *("results.jsonl", "tokenizer"),
    ]
    assert [p.name for p in checkpoint.listing(short_run / "checkpoints")] == [
        "epoch_1.pt",
        "epoch_2.pt",
    ]
    params = yaml.safe_load((short_run / "params.yaml").read_text())
    assert (params["name"], params["batch_size"], params["method"]) == ("a", 16, "local")
    assert "epoch 2/2" in (short_run / "out.log").read_text()


def test_metrics_hold_every_loss_term_and_the_recall_of_every_epoch(short_run):
    rows = _jsonl(short_run / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "train"]
    assert steps[-1]["step"] == 12
    assert steps[-1]["losses"].keys() == {"clip", "local"}
    assert steps[-1]["loss"] == pytest.approx(sum(steps[-1]["losses"].values()))
    epochs = [row for row in rows if row["kind"] == "validation"]
    assert [row["epoch"] for row in epochs] == [1, 2]
    assert epochs[0]["metrics"].keys() == epochs[0]["chance"].keys()


def test_results_carry_what_a_number_needs(short_run):
    rows = _jsonl(short_run / "results.jsonl")
    assert {(r["task"], r["name"]) for r in rows} == {
        ("retrieval", ""),
        *(("zero_shot", name) for name in ("modality", "finding")),
        *(("two_choice", name) for name in ("side", "size", "count", "all")),
    }
    for row in rows:
        assert row["n"] > 0
        assert row["split"] == "test"
        for name, value in row["metrics"].items():
            low, high = row["ci95"][name]
            assert low <= value <= high
            assert 0 < row["chance"][name] <= 1
        for key in ("dataset", "seed", "medfast", "torch", "git", "command", "seconds"):
            assert key in row


def test_the_report_shows_words_and_attention(short_run):
    page = (short_run / "report.html").read_text()
    assert "Word-to-patch attention" in page
    assert page.count("<img") > 20


def test_clip_runs_without_token_features_and_with_group_positives(phantom, tmp_path):
    argv = _argv(phantom, tmp_path, "--method", "clip", "--group-positives", "--no-fused-loss")
    train.main([*argv, "--epochs", "1"])
    steps = [r for r in _jsonl(tmp_path / "a" / "metrics.jsonl") if r["kind"] == "train"]
    assert steps[-1]["losses"].keys() == {"clip"}
    assert "Word-to-patch attention" not in (tmp_path / "a" / "report.html").read_text()


@pytest.mark.parametrize(
    ("method", "terms", "maps"),
    [
        ("filip", {"filip": 1.0}, "Word-to-patch similarity"),
        ("sparc", {"clip": 0.5, "fine": 1.0}, "Word-to-patch attention"),
    ],
)
def test_a_local_method_runs_to_its_report_and_can_be_resumed(
    phantom, tmp_path, method, terms, maps
):
    train.main(_argv(phantom, tmp_path, "--method", method, "--fused-loss"))
    run = tmp_path / "a"
    last = [row for row in _jsonl(run / "metrics.jsonl") if row["kind"] == "train"][-1]
    assert last["losses"].keys() == terms.keys()
    assert last["loss"] == pytest.approx(sum(terms[k] * v for k, v in last["losses"].items()))
    results = _jsonl(run / "results.jsonl")
    assert [row["task"] for row in results].count("retrieval") == 1
    assert len(results) == 7
    page = (run / "report.html").read_text()
    assert f"<h2>{maps}</h2>" in page
    assert "A word&#x27;s weights" in page or "a word&#x27;s weights" in page

    whole = _weights(run, 2)
    (run / "checkpoints" / "epoch_2.pt").unlink()
    train.main(["--resume", "latest", "--logs", str(tmp_path)])
    resumed = _weights(run, 2)
    _assert_same(whole["state_dict"], resumed["state_dict"])
    _assert_same(whole["optimizer"]["state"], resumed["optimizer"]["state"])
    again = _jsonl(run / "results.jsonl")[-len(results) :]
    assert [row["metrics"] for row in again] == [row["metrics"] for row in results]


def test_the_phantom_is_written_once(tmp_path, capsys):
    argv = ["--phantom-pairs", "60", "--cache-dir", str(tmp_path / "cache"), *SHORT]
    argv += ["--logs", str(tmp_path), "--epochs", "1"]
    train.main([*argv, "--name", "a"])
    assert "writing 60 phantom images" in capsys.readouterr().err
    (folder,) = (tmp_path / "cache").iterdir()
    written = (folder / "phantom.json").stat().st_mtime_ns
    train.main([*argv, "--name", "b"])
    assert "writing" not in capsys.readouterr().err
    assert (folder / "phantom.json").stat().st_mtime_ns == written


def test_fused_and_reference_losses_train_alike(phantom, tmp_path):
    curves = []
    for name, flag in (("a", "--fused-loss"), ("b", "--no-fused-loss")):
        argv = _argv(phantom, tmp_path, flag, "--log-every", "1", "--precision", "fp32")
        # At the default rate a rounding error in the weights moves the loss by 1 % in 12 steps.
        train.main([*argv, "--name", name, "--lr", "1e-4"])
        rows = _jsonl(tmp_path / name / "metrics.jsonl")
        curves.append([row["loss"] for row in rows if row["kind"] == "train"])
    assert len(curves[0]) == 12
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


# Resuming


def _weights(run, name):
    return torch.load(run / "checkpoints" / f"epoch_{name}.pt", weights_only=True)


def _assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            _assert_same(a[key], b[key])
        elif isinstance(a[key], torch.Tensor):
            assert torch.equal(a[key], b[key]), key


def test_a_killed_run_goes_on_bitwise(phantom, tmp_path):
    """Kill -9 after the first checkpoint, resume, and compare with the undisturbed run."""
    argv = _argv(phantom, tmp_path, "--epochs", "3", "--keep-checkpoints", "3")
    train.main([*argv, "--name", "whole"])

    run = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "medfast.train", *argv, "--name", "killed"],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "epoch_1.pt").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "results.jsonl").exists()

    train.main(["--resume", "latest", "--name", "killed", "--logs", str(tmp_path)])
    whole, resumed = _weights(tmp_path / "whole", 3), _weights(run, 3)
    for part in ("state_dict", "method"):
        _assert_same(whole[part], resumed[part])
    _assert_same(whole["optimizer"]["state"], resumed["optimizer"]["state"])
    _assert_same(whole["random"][0], resumed["random"][0])
    assert (whole["step"], whole["samples"]) == (resumed["step"], resumed["samples"])
    metrics = [
        [row["metrics"] for row in _jsonl(tmp_path / name / "results.jsonl")]
        for name in ("whole", "killed")
    ]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_run_goes_on_in_the_middle_of_an_epoch_bitwise(phantom, tmp_path, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    argv = _argv(phantom, tmp_path, "--loader", loader, "--save-steps", "4")
    train.main([*argv, "--keep-checkpoints", "9", "--log-every", "1"])
    run = tmp_path / "a"
    names = [p.name for p in checkpoint.listing(run / "checkpoints")]
    assert names == ["epoch_0_step_4.pt", "epoch_1.pt", "epoch_1_step_8.pt", "epoch_2.pt"]
    whole, rows = _weights(run, 2), _jsonl(run / "metrics.jsonl")
    (run / "checkpoints" / "epoch_2.pt").unlink()
    train.main(["--resume", "latest", "--logs", str(tmp_path)])
    resumed, again = _weights(run, 2), _jsonl(run / "metrics.jsonl")
    _assert_same(whole["state_dict"], resumed["state_dict"])
    _assert_same(whole["optimizer"]["state"], resumed["optimizer"]["state"])
    assert (whole["step"], whole["samples"]) == (resumed["step"], resumed["samples"])
    # What was logged after the checkpoint is replaced, not repeated.
    assert [(r["kind"], r["step"]) for r in again] == [(r["kind"], r["step"]) for r in rows]
    assert [r.get("loss") for r in again] == [r.get("loss") for r in rows]


def test_a_run_that_goes_on_keeps_its_loader(phantom, tmp_path, capsys, monkeypatch):
    train.main(_argv(phantom, tmp_path, "--loader", "auto"))
    assert "the dali loader" in capsys.readouterr().err
    (tmp_path / "a" / "checkpoints" / "epoch_2.pt").unlink()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train.main(["--resume", "latest", "--logs", str(tmp_path)])
    assert "--loader dali needs NVIDIA DALI" in capsys.readouterr().err


def test_a_finished_run_can_be_evaluated_again(phantom, tmp_path):
    train.main(_argv(phantom, tmp_path))
    results = (tmp_path / "a" / "results.jsonl").read_bytes()
    (tmp_path / "a" / "results.jsonl").unlink()
    (tmp_path / "a" / "report.html").unlink()
    train.main(["--resume", str(tmp_path / "a" / "checkpoints" / "epoch_2.pt")])
    again = _jsonl(tmp_path / "a" / "results.jsonl")
    assert [r["metrics"] for r in again] == [
        json.loads(line)["metrics"] for line in results.splitlines()
    ]
    assert (tmp_path / "a" / "report.html").exists()


def test_a_run_has_its_results_last_and_as_a_whole(short_run, tmp_path, monkeypatch):
    run = Path(shutil.copytree(short_run, tmp_path / "a"))
    before = (run / "results.jsonl").read_bytes()
    monkeypatch.setattr(train, "write_run_report", lambda *args, **named: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(["--resume", str(run / "checkpoints" / "epoch_2.pt")])
    assert (run / "results.jsonl").read_bytes() == before
    with pytest.raises(TypeError):
        RunFolder(run).write_results([{"task": "retrieval"}, {"task": object()}])
    assert (run / "results.jsonl").read_bytes() == before


def test_resume_refuses_another_learning_rate(short_run, refusal):
    said = refusal(["--resume", "latest", "--logs", str(short_run.parent), "--lr", "0.5"])
    assert "--lr is 0.001 in this run and 0.5 now" in said


@pytest.mark.parametrize("change", ["fewer", "others", "moved"])
def test_resume_goes_on_with_the_same_pairs_alone(own_phantom, tmp_path, refusal, change):
    train.main(_argv(own_phantom, tmp_path, "--epochs", "1"))
    captions = own_phantom / "train" / "radiology" / "captions.txt"
    rows = captions.read_text(encoding="utf-8").splitlines(keepends=True)
    if change == "moved":
        moved = own_phantom.rename(tmp_path / "moved")
        # An image that is gone is no other pair.
        next((moved / "train" / "radiology" / "images").iterdir()).unlink()
        argv = ["--train-data", f"roco:{moved}", "--max-bad-samples", "0.1"]
        train.main(["--resume", "latest", "--logs", str(tmp_path), *argv])
        return
    kept = rows[4:] if change == "fewer" else [rows[1], rows[0], *rows[2:]]
    captions.write_text("".join(kept), encoding="utf-8")
    said = refusal(["--resume", "latest", "--logs", str(tmp_path)])
    assert f"begun with 96 training pairs and finds {len(kept)}" in said


def test_a_run_that_was_stopped_within_a_line_goes_on(own_phantom, tmp_path):
    _damage(own_phantom, 2)
    train.main(_argv(own_phantom, tmp_path, "--max-bad-samples", "0.05"))
    run = tmp_path / "a"
    rows = _jsonl(run / "metrics.jsonl")
    for path in (run / "metrics.jsonl", run / "skipped.jsonl"):
        with path.open("a") as file:
            file.write('{"key": "a", "pa')
    (run / "checkpoints" / "epoch_2.pt").unlink()
    train.main(["--resume", "latest", "--logs", str(tmp_path)])
    assert [row["step"] for row in _jsonl(run / "metrics.jsonl")] == [row["step"] for row in rows]
    assert len(_jsonl(run / "skipped.jsonl")) == 2


def test_resume_from_nothing_is_refused(tmp_path, refusal):
    said = refusal(["--resume", "latest", "--name", "x", "--logs", str(tmp_path)])
    assert "has no checkpoint" in said
    assert list(tmp_path.iterdir()) == []


def test_resume_from_a_missing_file_is_refused(tmp_path, refusal):
    assert "no such checkpoint" in refusal(["--resume", str(tmp_path / "epoch_1.pt")])


def test_a_truncated_checkpoint_gives_way_to_the_one_before(phantom, tmp_path, capsys, refusal):
    train.main(_argv(phantom, tmp_path))
    newest = tmp_path / "a" / "checkpoints" / "epoch_2.pt"
    whole = _weights(tmp_path / "a", 2)
    newest.write_bytes(newest.read_bytes()[:10_000])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    # Asked for by name it is refused, and nothing is touched.
    assert "epoch_2.pt is damaged" in refusal(["--resume", str(newest)])
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    train.main(["--resume", "latest", "--logs", str(tmp_path)])
    said = capsys.readouterr().err
    assert "the newest checkpoint cannot be used, but the one before it" in said
    assert "resumed after epoch 1" in said
    _assert_same(whole["state_dict"], _weights(tmp_path / "a", 2)["state_dict"])


def test_resume_with_another_tokenizer_is_refused(phantom, tmp_path, refusal):
    from medfast.data.tokens import Tokenizer

    train.main(_argv(phantom, tmp_path))
    shutil.rmtree(tmp_path / "a" / "tokenizer")
    Tokenizer.train(["another vocabulary"], 300, 48).save(tmp_path / "a" / "tokenizer")
    said = refusal(["--resume", "latest", "--logs", str(tmp_path)])
    assert "does not fit the run's model" in said


# Bad input


def test_a_missing_folder_is_refused_and_leaves_no_run(tmp_path, refusal):
    said = refusal(_argv(tmp_path / "nowhere", tmp_path / "logs"))
    assert "there is no" in said
    assert "Get ROCO" in said
    assert list((tmp_path / "logs").iterdir()) == []


def test_a_run_that_exists_is_not_overwritten(short_run, phantom, refusal):
    before = (short_run / "params.yaml").read_bytes()
    assert "exists already" in refusal(_argv(phantom, short_run.parent, "--lr", "0.5"))
    assert (short_run / "params.yaml").read_bytes() == before


@pytest.mark.parametrize("kind", ["a file", "read only"])
def test_an_unwritable_run_folder_is_refused(phantom, tmp_path, refusal, kind):
    logs = tmp_path / "logs"
    if kind == "a file":
        logs.write_text("")
    elif os.geteuid() == 0:
        logs = Path("/proc/medfast")  # root may write anywhere else
    else:
        logs.mkdir(mode=0o500)
    assert "cannot be written" in refusal(_argv(phantom, logs))


def _damage(folder, count):
    """Cut one image in half, empty one, delete the rest of `count`; return their names."""
    images = sorted((folder / "train" / "radiology" / "images").iterdir())[:count]
    images[0].write_bytes(images[0].read_bytes()[:500])
    images[1].write_bytes(b"")
    for image in images[2:]:
        image.unlink()
    return {image.stem for image in images}


def test_damaged_images_are_skipped_counted_and_listed(own_phantom, tmp_path, capsys):
    damaged = _damage(own_phantom, 3)
    train.main(_argv(own_phantom, tmp_path, "--max-bad-samples", "0.05"))
    rows = _jsonl(tmp_path / "a" / "skipped.jsonl")
    assert {row["key"] for row in rows} == damaged
    assert len(rows) == 3
    assert "3 samples could not be used" in capsys.readouterr().err


def test_a_run_that_goes_on_does_not_list_a_sample_twice(own_phantom, tmp_path):
    _damage(own_phantom, 2)
    train.main(_argv(own_phantom, tmp_path, "--max-bad-samples", "0.05"))
    (tmp_path / "a" / "checkpoints" / "epoch_2.pt").unlink()
    train.main(["--resume", "latest", "--logs", str(tmp_path)])
    assert len(_jsonl(tmp_path / "a" / "skipped.jsonl")) == 2


def test_too_many_damaged_images_stop_the_run(own_phantom, tmp_path, refusal):
    _damage(own_phantom, 10)
    said = refusal(_argv(own_phantom, tmp_path, "--max-bad-samples", "0.05"))
    assert re.search(
        r"\d+ of 120 samples could not be used, more than --max-bad-samples 0.05", said
    )
    assert _jsonl(tmp_path / "a" / "skipped.jsonl")
    assert "could not be used" in (tmp_path / "a" / "out.log").read_text()


def test_a_held_out_split_that_cannot_be_read_is_refused(own_phantom, tmp_path, refusal):
    for image in (own_phantom / "validation" / "radiology" / "images").iterdir():
        image.write_bytes(b"")
    said = refusal(_argv(own_phantom, tmp_path, "--max-bad-samples", "1"))
    assert "no image of the held-out pairs can be read" in said


def test_training_images_that_cannot_be_read_train_nothing(own_phantom, tmp_path, refusal):
    for image in (own_phantom / "train" / "radiology" / "images").iterdir():
        image.write_bytes(b"")
    said = refusal(_argv(own_phantom, tmp_path, "--max-bad-samples", "1"))
    assert "nothing was trained" in said


def test_a_single_training_pair_is_refused(own_phantom, tmp_path, refusal):
    captions = own_phantom / "train" / "radiology" / "captions.txt"
    captions.write_text(captions.read_text().splitlines()[0] + "\n")
    assert "a single training pair" in refusal(_argv(own_phantom, tmp_path))
    assert list(tmp_path.glob("a")) == []


@pytest.mark.parametrize(
    ("size", "parts", "says"),
    [("500", "2", "1 steps of 96 pairs"), ("40", "9", "1 steps of 80 pairs")],
)
def test_fewer_pairs_than_a_step_asks_for_train_and_are_said(
    own_phantom, tmp_path, capsys, size, parts, says
):
    more = ("--batch-size", size, "--accum-freq", parts, "--epochs", "1", "--method", "clip")
    train.main(_argv(own_phantom, tmp_path, *more, "--dry-run"))
    assert says in capsys.readouterr().out
    train.main(_argv(own_phantom, tmp_path, *more, "--force-image-size", "32"))
    assert says in capsys.readouterr().err
    assert says.split()[3] == str(_jsonl(tmp_path / "a" / "metrics.jsonl")[0]["samples"])


def test_odd_captions_train(own_phantom, tmp_path):
    captions = own_phantom / "train" / "radiology" / "captions.txt"
    lines = captions.read_text().splitlines()
    lines[0] = lines[0].partition("\t")[0] + '\t Опухоль, "слева"\tи 胸部\nsecond line, of two'
    captions.write_text("\n".join(lines) + "\n")
    train.main(_argv(own_phantom, tmp_path, "--epochs", "1"))
    assert not (tmp_path / "a" / "skipped.jsonl").exists()


def test_no_step_is_saved_whose_loss_is_not_finite(phantom, tmp_path, refusal):
    more = ("--lr", "1e30", "--warmup", "0", "--log-every", "99", "--save-steps", "1")
    said = refusal(_argv(phantom, tmp_path, *more))
    assert re.search(r"the loss is (nan|inf) at step 2", said)
    (only,) = checkpoint.listing(tmp_path / "a" / "checkpoints")
    assert checkpoint.load(only)["step"] == 1


def test_a_loss_that_is_not_finite_stops_the_run(phantom, tmp_path, refusal):
    said = refusal(_argv(phantom, tmp_path, "--lr", "1e30", "--log-every", "1", "--warmup", "0"))
    assert re.search(r"the loss is (nan|inf) at step \d+", said)


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_an_implementation_that_cannot_run_is_refused_before_work(phantom, tmp_path, refusal, impl):
    assert f"--fused-loss {impl}" in refusal(_argv(phantom, tmp_path, "--fused-loss", impl))
    assert list(tmp_path.iterdir()) == []


def test_group_positives_without_a_global_loss_are_refused(phantom, tmp_path, refusal):
    said = refusal(_argv(phantom, tmp_path, "--method", "filip", "--group-positives"))
    assert "--group-positives is for methods with a global loss" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(phantom, tmp_path, refusal):
    assert "finds no GPU" in refusal(_argv(phantom, tmp_path, "--device", "cuda"))


def test_a_dry_run_writes_nothing(phantom, tmp_path, capsys):
    train.main(_argv(phantom, tmp_path, "--dry-run"))
    shown = capsys.readouterr().out
    for words in ("1 clip + 1 local", "96 training pairs", "epochs of 6 steps", "parameters"):
        assert words in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [("--name", "a", "exists already"), ("--tokenizer", "/nonexistent", "no such folder")],
)
def test_a_dry_run_refuses_what_the_run_would(short_run, phantom, refusal, flag, value, says):
    argv = ["--train-data", f"roco:{phantom}", "--logs", str(short_run.parent), "--dry-run"]
    assert says in refusal([*argv, flag, value])


def test_a_published_tokenizer_is_used(phantom, short_run, tmp_path):
    argv = _argv(phantom, tmp_path, "--tokenizer", str(short_run / "tokenizer"), "--epochs", "1")
    train.main(argv)
    names = "tokenizer/tokenizer.json"
    assert (
        json.loads((tmp_path / "a" / names).read_text())["model"]
        == json.loads((short_run / names).read_text())["model"]
    )


def test_the_phantom_command_writes_data_that_train_reads(tmp_path, capsys):
    from medfast.data.__main__ import main

    main(["phantom", "--layout", "roco", "--out", str(tmp_path / "d"), "--pairs", "40"])
    assert "--train-data roco:" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["phantom", "--layout", "rocco", "--out", str(tmp_path / "e")])
    assert "Did you mean 'roco'?" in capsys.readouterr().err


# Sources


def _pmc_oa(folder, phantom):
    """Write a small PMC-OA from a phantom's pairs."""
    (folder / "images").mkdir(parents=True)
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        rows = []
        for record in read_split("roco", phantom, split).records[:24]:
            shutil.copy(record.image, folder / "images" / f"PMC1_{record.image.name}")
            row = {"image": f"PMC1_{record.image.name}", "caption": record.caption}
            rows.append(json.dumps(row) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder


def test_sources_are_mixed_by_weight(phantom, tmp_path, capsys):
    other = _pmc_oa(tmp_path / "pmc", phantom)
    argv = [*_argv(phantom, tmp_path), "--train-data-weights", "1", "1"]
    argv[1:2] = [f"roco:{phantom}", f"pmc_oa:{other}"]
    train.main(argv)
    said = capsys.readouterr().err
    assert "roco+pmc_oa: 120 train, 24 validation, 24 test pairs" in said
    rows = _jsonl(tmp_path / "a" / "results.jsonl")
    assert {row["dataset"] for row in rows} == {"roco+pmc_oa"}
    params = yaml.safe_load((tmp_path / "a" / "params.yaml").read_text())
    assert params["train_data_weights"] == [1.0, 1.0]
    train.main(["--config", str(tmp_path / "a" / "params.yaml"), "--name", "b", "--dry-run"])
    assert f"roco:{phantom} pmc_oa:{other}: 120 training pairs" in capsys.readouterr().out


def test_pairs_on_an_exclusion_list_are_not_trained_on(own_phantom, tmp_path, capsys):
    keys = [record.key for record in read_split("roco", own_phantom, "train").records]
    lines = [json.dumps({"source": "roco", "key": key}) + "\n" for key in keys[:40]]
    exclusion_file(own_phantom).write_text("".join(lines))
    train.main(_argv(own_phantom, tmp_path, "--epochs", "1"))
    assert "40 training pairs are on exclusion lists" in capsys.readouterr().err
    assert _jsonl(tmp_path / "a" / "metrics.jsonl")[-2]["samples"] == 48
    other = tmp_path / "mine.jsonl"
    other.write_text(lines[0])
    for exclude, pairs in ((str(other), 95), ("none", 96)):
        train.main(
            [*_argv(own_phantom, tmp_path), "--exclude", exclude, "--name", "b", "--dry-run"]
        )
        assert f": {pairs} training pairs" in capsys.readouterr().out


def test_a_list_that_leaves_out_nothing_is_said(phantom, tmp_path, capsys, caplog):
    path = tmp_path / "mine.jsonl"
    argv = [*_argv(phantom, tmp_path), "--dry-run", "--exclude", str(path)]
    own = read_split("roco", phantom, "train").records[0].key
    for source, key, left_out in (("csv", own, 0), ("roco", "x", 0), ("phantom", own, 1)):
        path.write_text(json.dumps({"source": source, "key": key}) + "\n")
        caplog.clear()
        train.main(argv)
        assert f": {96 - left_out} training pairs" in capsys.readouterr().out
        says = f"the exclusion list {path} leaves out no training pair of this run"
        assert (says in caplog.text) == (not left_out)


def test_one_set_under_two_names_is_refused(phantom, tmp_path, refusal):
    (tmp_path / "link").symlink_to(phantom)
    argv = _argv(phantom, tmp_path)
    argv[1:2] = [f"roco:{phantom}", f"roco:{tmp_path / 'link'}"]
    assert "--train-data must be sources that differ" in refusal(argv)


def test_names_that_are_no_utf8_are_listed(phantom, tmp_path):
    names = [os.fsdecode(b"\xe9%d" % i) for i in range(40)]
    image = read_split("roco", phantom, "train").records[0].image
    for split in ("train", "validation", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        for i, name in enumerate(names):
            (tmp_path / "set" / split / f"{name}.txt").write_text(f"caption {i}")
            shutil.copy(image, tmp_path / "set" / split / f"{name}.jpg")
    (tmp_path / "set" / "train" / f"{names[0]}.jpg").write_bytes(b"")
    argv = ["--train-data", f"folder:{tmp_path / 'set'}", *SHORT, "--max-bad-samples", "0.1"]
    train.main([*argv, "--logs", str(tmp_path), "--name", "a"])
    (row,) = _jsonl(tmp_path / "a" / "skipped.jsonl")
    assert row["key"] == f"train/{names[0]}.jpg"


def test_excluding_everything_is_refused(own_phantom, tmp_path, refusal):
    records = read_split("roco", own_phantom, "train").records
    lines = [json.dumps({"source": "roco", "key": r.key}) + "\n" for r in records]
    exclusion_file(own_phantom).write_text("".join(lines))
    assert "leave out every train pair" in refusal(_argv(own_phantom, tmp_path))


def test_a_missing_exclusion_list_is_refused(phantom, tmp_path, refusal):
    said = refusal(_argv(phantom, tmp_path, "--exclude", str(tmp_path / "none.jsonl")))
    assert "the exclusion list" in said


def test_bad_rows_of_a_caption_file_are_listed(own_phantom, tmp_path):
    captions = own_phantom / "train" / "radiology" / "captions.txt"
    captions.write_text("no tab here\n" + captions.read_text(), encoding="utf-8")
    train.main(_argv(own_phantom, tmp_path, "--epochs", "1"))
    (row,) = _jsonl(tmp_path / "a" / "skipped.jsonl")
    assert row["path"] == str(captions)


def test_open_clips_csv_flags_name_the_columns(phantom, tmp_path, capsys):
    path = tmp_path / "pairs.tsv"
    rows = [f"{r.image};{r.caption}\n" for r in read_split("roco", phantom, "train").records]
    path.write_text("picture;words\n" + "".join(rows))
    argv = ["--train-data", f"csv:{path}", "--csv-img-key", "picture", "--csv-caption-key", "words"]
    train.main([*argv, "--csv-separator", ";", *SHORT, "--logs", str(tmp_path), "--name", "a"])
    assert (tmp_path / "a" / "report.html").exists()


def test_a_report_shows_no_image_of_a_credentialed_set(tmp_path, short_run):
    data = write_phantom(tmp_path / "data", layout="mimic_cxr", pairs=60, seed=1)
    argv = ["--train-data", f"mimic_cxr:{data}", *SHORT, "--epochs", "1", "--logs", str(tmp_path)]
    train.main([*argv, "--name", "a"])
    page = (tmp_path / "a" / "report.html").read_text()
    assert "data:image" in (short_run / "report.html").read_text()
    assert "data:image" not in page
    assert "under an agreement" in page
