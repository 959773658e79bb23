"""The command: what it leaves on disk, and what stops it or does not."""

import errno
import functools
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from medfast import cli, evaluate, json_lines
from medfast.data.phantom.classification import write_classification
from medfast.data.phantom.vqa import write_vqa
from medfast.device import number_format
from medfast.errors import UsageError
from medfast.evals.suite import EVALUATIONS, tasks
from medfast.evals.suite.clip_benchmark import without_names
from medfast.evals.vqa import Training, vqa
from medfast.results import read_runs

KEYS = ("pad_ufes_20", "roco", "vqa_rad")
CELLS = (
    *("pad_ufes_20.zero_shot", "pad_ufes_20.linear_probe"),
    *("roco.image_to_text", "roco.text_to_image", "vqa_rad.vqa"),
)


@pytest.fixture(scope="module")
def data(phantom, tmp_path_factory):
    """One set of each kind. Read only."""
    root = tmp_path_factory.mktemp("sets")
    write_classification(root / "pad_ufes_20", "pad_ufes_20", per_class=10)
    (root / "roco").symlink_to(phantom)
    return write_vqa(root / "vqa_rad", images=30).parent


@pytest.fixture
def own_data(data, tmp_path):
    return Path(shutil.copytree(data, tmp_path / "own", symlinks=True))


@pytest.fixture(autouse=True)
def _short_vqa(monkeypatch):
    short = functools.partial(vqa, training=Training(epochs=2))
    monkeypatch.setattr(tasks, "vqa", short)


@pytest.fixture
def command(short_run, tmp_path):
    """Run the command on a trained model; return its folder of results."""

    def run(root, *more):
        out = tmp_path / "out"
        argv = ["--checkpoint", str(short_run), "--data-root", str(root), "--out", str(out)]
        argv += ["--cache-dir", str(tmp_path / "cache"), "--workers", "0", "--device", "cpu"]
        evaluate.main([*argv, *more])
        return out

    return run


def _read(out, cell):
    (row,) = json_lines.read(out / f"{cell}.json")
    return without_names(row)


def _exit_code(function, *arguments):
    with pytest.raises(SystemExit) as stopped:
        function(*arguments)
    # A text is printed, and the code is 1.
    return (
        (stopped.value.code, "") if isinstance(stopped.value.code, int) else (1, stopped.value.code)
    )


def test_each_kind_of_data_set_is_evaluated_and_the_others_are_missing(command, data):
    out = command(data)
    assert {path.stem for path in out.glob("*.json")} == set(CELLS)
    for cell in CELLS:
        row = _read(out, cell)
        assert f"{row['dataset']}.{row['task']}" == cell
        for metric in row["metrics"]:
            low, high = row["ci95"][metric]
            assert low <= row["metrics"][metric] <= high
            assert row["chance"][metric] is not None
        assert row["model"] == "a"
        assert row["n"] > 0
        assert row["seconds"] >= 0
        # "auto" would not tell what was computed.
        assert row["precision"] == number_format("auto", torch.device("cpu"))
        assert row["preprocessing"]["size"] == cli.parse_train([])[0].preset.image_size
        for name in ("split", "seed", "model_sha256", "medfast", "torch", "git", "command"):
            assert name in row
    text = (out / "results.md").read_text()
    assert f"- bach: there is no {data / 'bach'}. Get ICIAR2018_BACH_Challenge.zip" in text
    assert "failed" not in text.lower()
    rows = (out / "results.csv").read_text().splitlines()
    assert {tuple(row.split(",")[1:3]) for row in rows[1:]} == {tuple(c.split(".")) for c in CELLS}
    pictures = [
        "results.png",
        *(f"pad_ufes_20.{t}.confusion.png" for t in ("zero_shot", "linear_probe")),
    ]
    for name in pictures:
        with Image.open(out / name) as image:
            image.load()
    assert not list(out.glob("*.part"))


def test_clip_benchmark_finds_its_keys_and_each_number_is_counted_once(command, data):
    out = command(data, "--datasets", "pad_ufes_20", "roco")
    for cell, name, own in (
        ("pad_ufes_20.zero_shot", "acc1", "accuracy"),
        ("pad_ufes_20.zero_shot", "acc5", "top5_accuracy"),
        ("pad_ufes_20.linear_probe", "lp_mean_per_class_recall", "balanced_accuracy"),
        ("roco.image_to_text", "text_retrieval_recall@5", "R@5"),
        ("roco.text_to_image", "image_retrieval_recall@200", "R@200"),
    ):
        (row,) = json_lines.read(out / f"{cell}.json")
        assert row["metrics"][name] == row["metrics"][own]
        # What its `build` asks of a file.
        assert (row["model"] + " " + row["pretrained"]).startswith("a ")
        assert row["language"] == "en"
        assert "acc1" not in (out / "results.csv").read_text()
    (runs,) = read_runs([out]).values()
    names = [name for row in runs for name in row["metrics"]]
    assert {"accuracy", "R@5"} <= set(names)
    assert not [name for name in names if "acc1" in name or "retrieval" in name]


def test_an_interrupted_suite_goes_on_where_it_was(command, data, monkeypatch):
    real = tasks.retrieval_figures

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "retrieval_figures", interrupted)
    assert _exit_code(command, data)[0] == 130
    monkeypatch.setattr(tasks, "retrieval_figures", real)
    with pytest.MonkeyPatch.context() as patch:
        # What is there is not asked again.
        patch.setattr(tasks, "_classification", interrupted)
        out = command(data, "--skip-existing")
    assert {path.stem for path in out.glob("*.json")} == set(CELLS)
    assert "pad_ufes_20" in (out / "results.csv").read_text()


def test_only_whole_results_of_the_same_question_and_model_are_kept(command, data, monkeypatch):
    asked = []
    real = evaluate.Results.add
    monkeypatch.setattr(
        evaluate.Results,
        "add",
        lambda self, found, seconds: (asked.append(found["task"]), real(self, found, seconds)),
    )
    options = ("--datasets", "pad_ufes_20", "--skip-existing")
    out = command(data, *options)
    command(data, *options)
    assert asked == ["zero_shot", "linear_probe"]
    command(data, *options, "--prompts", "histology4")
    assert asked[2:] == ["zero_shot"]
    assert _read(out, "pad_ufes_20.zero_shot")["prompts"] == "histology4"
    path = out / "pad_ufes_20.linear_probe.json"
    path.write_bytes(path.read_bytes()[:100])
    command(data, *options, "--prompts", "histology4")
    assert asked[3:] == ["linear_probe"]
    of_another_model = path.read_text().replace(_read(out, path.stem)["model_sha256"], 64 * "0")
    path.write_text(of_another_model)
    command(data, *options, "--prompts", "histology4")
    assert asked[4:] == ["linear_probe"]
    command(data, "--datasets", "pad_ufes_20")
    assert asked[5:] == ["zero_shot", "linear_probe"]
    other = {"fp32": "amp_bf16", "amp_bf16": "fp32"}[_read(out, path.stem)["precision"]]
    command(data, *options, "--precision", other)
    assert asked[7:] == ["zero_shot", "linear_probe"]
    # Prompts of one name may have had other words.
    path = out / "pad_ufes_20.zero_shot.json"
    path.write_text(path.read_text().replace(_read(out, path.stem)["prompts_sha256"], 64 * "0"))
    command(data, *options, "--precision", other)
    assert asked[9:] == ["zero_shot"]


def test_a_data_set_that_fails_takes_down_no_other(command, own_data, monkeypatch, capsys):
    table = own_data / "pad_ufes_20" / "metadata.csv"
    whole = table.read_text()
    table.write_text(whole.replace("diagnostic", "verdict"))
    real = tasks.vqa

    def broken(*_, **__):
        raise RuntimeError("boom")

    monkeypatch.setattr(tasks, "vqa", broken)
    code, said = _exit_code(command, own_data)
    assert code == 1
    first, second, last = said.splitlines()
    assert first.startswith("pad_ufes_20 failed: ")
    assert "diagnostic" in first
    assert second == "vqa_rad failed: RuntimeError: boom"
    assert "2 of the data sets failed: pad_ufes_20, vqa_rad" in last
    out = own_data.parent / "out"
    assert {path.stem for path in out.glob("*.json")} == {
        "roco.image_to_text",
        "roco.text_to_image",
    }
    assert "RuntimeError: boom" in (out / "vqa_rad.error.txt").read_text()
    assert "in broken" in (out / "vqa_rad.error.txt").read_text()
    assert "- vqa_rad: RuntimeError: boom" in (out / "results.md").read_text()
    # Mended, it leaves no trace.
    monkeypatch.setattr(tasks, "vqa", real)
    table.write_text(whole)
    command(own_data, "--skip-existing")
    assert {path.stem for path in out.glob("*.json")} == set(CELLS)
    assert not list(out.glob("*.error.txt"))


def test_an_empty_folder_is_a_missing_set(command, own_data, caplog):
    (own_data / "pcam").mkdir()
    out = command(own_data, "--datasets", "pcam", "roco")
    assert "pcam" in (out / "results.md").read_text().partition("## Not there")[2]
    assert (out / "roco.image_to_text.json").exists()


def test_a_set_may_lie_elsewhere(short_run, phantom, data):
    argv = ["--checkpoint", str(short_run), "--data", f"roco:{phantom}"]
    assert cli.parse_evaluate(argv).roots == {"roco": phantom}
    argv += ["--data-root", str(data)]
    assert list(cli.parse_evaluate(argv).roots) == list(EVALUATIONS)
    assert cli.parse_evaluate(argv).roots["roco"] == phantom
    assert cli.parse_evaluate([*argv, "--datasets", "vqa_rad"]).roots == {
        "vqa_rad": data / "vqa_rad"
    }


def test_results_go_to_the_run(short_run, data):
    for source in (short_run, *(short_run / "checkpoints").iterdir()):
        plan = cli.parse_evaluate(["--checkpoint", str(source), "--data-root", str(data)])
        assert plan.out == short_run / "evaluations"
    plan = cli.parse_evaluate(["--model", "hf-hub:them/CLIP", "--data-root", str(data)])
    assert (plan.out, plan.flag) == (Path("evaluations/CLIP"), "--model")


def test_finetune_is_passed_on(command, data, monkeypatch):
    asked = []

    def recorded(*_, finetune, **__):
        asked.append(finetune)
        raise RuntimeError

    monkeypatch.setattr(tasks, "vqa", recorded)
    for more in (["--vqa-finetune"], []):
        _exit_code(command, data, "--datasets", "vqa_rad", *more)
    assert asked == [True, False]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--suite", "medical24"], "--suite 'medical24' is not known. Did you mean 'medical25'"),
        (["--datasets", "bch"], "--datasets 'bch' is not known. Did you mean 'bach'"),
        (["--prompts", "mine"], "--prompts 'mine' is not known"),
        (["--precision", "fp8"], "--precision 'fp8' is not known"),
        (["--precision", "pure_bf16"], "--precision 'pure_bf16' is not known"),
        (["--device", "tpu"], "--device 'tpu' is not known"),
        (["--data", "roko:/data"], "--data 'roko' is not known. Did you mean 'roco'"),
        (["--data", "roco:/no/such"], "a folder that exists; /no/such does not"),
        (["--data", "roco"], "roco:FOLDER with a folder that exists."),
        (["--data-root", "/no/such"], "--data-root /no/such: there is no such folder"),
        (["--batch-size", "0"], "--batch-size must be at least 1; got 0"),
        (["--workers", "-1"], "--workers must be at least 0; got -1"),
        (["--seed", "-1"], "--seed must be at least 0; got -1"),
        (["--checkpoint", "no/run"], "--checkpoint no/run: there is no such"),
        (["--datasets", "bach"], "none of the data sets is there; looked for"),
    ],
)
def test_bad_arguments_are_refused(short_run, data, argv, says):
    good = ["--checkpoint", str(short_run), "--data-root", str(data)]
    with pytest.raises(UsageError, match=re.escape(says)):
        cli.parse_evaluate([*good, *argv])


def test_without_any_place_of_data_nothing_is_begun(short_run):
    with pytest.raises(UsageError, match="--data-root is missing"):
        cli.parse_evaluate(["--checkpoint", str(short_run)])
    argv = ["--checkpoint", str(short_run), "--data", f"roco:{short_run}", "--datasets", "bach"]
    with pytest.raises(UsageError, match="--datasets bach: give --data-root"):
        cli.parse_evaluate(argv)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "one of the arguments --checkpoint --model is required"),
        (["--checkpoint", "a", "--model", "b"], "not allowed with"),
        (["--checkpoint", "a", "--dataset", "b"], "Did you mean --datasets?"),
        (["--checkpoint", "no"], "--checkpoint no: there is no such run folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(capsys, argv, says):
    assert _exit_code(evaluate.main, argv)[0] == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert lines[-1].startswith("medfast.evaluate: error: ")
    assert says in lines[-1]
    assert len(lines) == 1


def test_two_processes_may_evaluate_into_one_folder(command, data, monkeypatch):
    """The other one writes what this one has written but not yet put in its place."""
    written = []

    def other(path, rows):
        real(path, rows)
        if path.name.endswith(".part") and not written:
            written.append(path)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(evaluate.os, "getpid", lambda: 1)
                command(data, "--datasets", "roco")

    real = json_lines.append
    monkeypatch.setattr(json_lines, "append", other)
    out = command(data, "--datasets", "roco")
    assert len(written) == 1
    assert {path.name for path in out.iterdir()} == {
        *("roco.image_to_text.json", "roco.text_to_image.json"),
        *("results.csv", "classes.csv", "results.md", "results.png"),
    }
    assert [_read(out, cell)["dataset"] for cell in CELLS[2:4]] == ["roco", "roco"]


def test_without_room_for_results_the_suite_stops_at_once(command, data, monkeypatch, capsys):
    """It does not go on to compute what it could not keep."""
    tried = []

    def full(path, rows):
        tried.append(path)
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(json_lines, "append", full)
    assert _exit_code(command, data)[0] == 2
    (out,) = {path.parent for path in tried}
    assert len(tried) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "pad_ufes_20.zero_shot.json cannot be written (No space left on device)" in said
    assert "--skip-existing" in said
    assert [path.name for path in out.iterdir()] == ["pad_ufes_20.zero_shot.confusion.png"]


def test_a_read_only_folder_is_refused_before_anything_is_computed(
    command, data, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate.os, "access", lambda *_: False)
    monkeypatch.setattr(tasks, "evaluate", lambda *_: pytest.fail("computed"))
    assert _exit_code(command, data)[0] == 2
    assert "out cannot be written (it is read-only)" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_cannot_be_written_is_refused(command, data, tmp_path, capsys):
    (tmp_path / "out").touch()
    assert _exit_code(command, data)[0] == 2
    assert "--out" in capsys.readouterr().err.splitlines()[-1]
