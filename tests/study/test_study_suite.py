"""The study on the suite: what is evaluated when, what a failure loses, and what means are over."""

import csv
import json
import shlex
from pathlib import Path

import pytest
from study_runs import Process, study_of, write_evaluation, write_run

from medfast import cli, evaluate, train
from medfast.data.phantom.classification import write_classification
from medfast.evals.suite import EVALUATIONS, folder
from medfast.evals.suite import phantom as phantom_suite
from medfast.study import __main__ as study_command
from medfast.study import execute
from medfast.study.plan import PRETRAINING, Run
from medfast.study.report import tables
from medfast.study.results import read_outcome, with_suite

CELLS = {("bach", "zero_shot"): 0.5, ("bach", "linear_probe"): 0.7, ("vqa_rad", "vqa"): 0.4}


@pytest.fixture
def root(tmp_path):
    """A folder of data sets, of which two are there."""
    for key in ("bach", "vqa_rad"):
        (tmp_path / "sets" / folder(key)).mkdir(parents=True)
    return tmp_path / "sets"


@pytest.fixture
def suite(fake, root):
    fake.suite = CELLS
    return ["--data-root", str(root)]


def test_every_run_but_the_pretraining_is_evaluated_once_it_is_done(fake, argv, suite, tmp_path):
    study_command.main(argv("clip", "lit", more=suite))
    assert sorted(fake.evaluated) == sorted(set(fake.names) - {PRETRAINING.name})
    named = [
        Path(w[w.index("--checkpoint") + 1]).name if "--name" not in w else w[-1]
        for w in fake.commands
    ]
    for name in fake.evaluated:
        assert [
            words[1] for words, own in zip(fake.commands, named, strict=True) if own == name
        ] == [
            "medfast.train",
            "medfast.evaluate",
        ]
    record = json.loads((tmp_path / "study" / "study.json").read_text())
    assert {f"{name}.evaluation" for name in fake.evaluated} < record["seconds"].keys()


def test_commands_of_evaluation_are_those_of_medfast_evaluate(root, tmp_path):
    words = ["--data-root", str(root), "--datasets", "bach", "--out", str(tmp_path / "s")]
    study, _, _ = cli.parse_study(["--methods", "local", *words])
    run = Run("local", "scratch")
    (study.runs / run.name).mkdir(parents=True)
    command = study.evaluation_command(run)
    assert command[:2] == ["-m", "medfast.evaluate"]
    plan = cli.parse_evaluate(command[2:])
    assert plan.out == study.runs / run.name / "evaluations"
    assert plan.roots == study.suite.roots == {"bach": root / folder("bach")}
    assert plan.skip_existing
    assert plan.cache == study.cache
    given = study.whole_command()
    assert cli.parse_study(given[2:])[0] == study


def test_settings_that_evaluation_has_too_reach_it(root):
    (root.parent / "b.yaml").write_text("workers: 0\ndevice: cpu\nepochs: 3\n")
    words = ["--budget", str(root.parent / "b.yaml"), "--data", f"bach:{root}"]
    study, _, _ = cli.parse_study(words)
    command = study.evaluation_command(Run("local", "scratch"))
    plan = cli.parse_evaluate(["--model", "x", *command[4:]])
    assert (plan.workers, plan.device) == (0, "cpu")
    assert "--epochs" not in command


def test_a_data_set_that_fails_loses_nothing_else(fake, argv, suite, tmp_path, capsys):
    fake.failed_sets = {"local-scratch-seed1": "bach"}
    with pytest.raises(SystemExit) as stopped:
        study_command.main(argv("local", more=suite))
    assert "1 of the runs could not be evaluated" in stopped.value.code
    assert "local-scratch-seed1: medfast.evaluate: error: bach failed" in stopped.value.code
    assert fake.evaluated == [f"local-scratch-seed{k}" for k in range(3)]
    shown = capsys.readouterr().out
    assert "local-scratch-seed1 could not be evaluated on bach: OSError: it is damaged" in shown
    for name in ("study.md", "study.html"):
        assert "OSError: it is damaged" in (tmp_path / "study" / name).read_text()
    # The same command tries that one again, and no other.
    fake.failed_sets, fake.commands = {}, []
    study_command.main(argv("local", more=suite))
    assert (fake.names, fake.evaluated) == ([], ["local-scratch-seed1"])
    assert "could not be evaluated" not in capsys.readouterr().out


def test_what_fails_alike_for_all_runs_is_said_once(fake, argv, suite, capsys):
    fake.failed_sets = {f"local-scratch-seed{k}": "bach" for k in range(3)}
    with pytest.raises(SystemExit):
        study_command.main(argv("local", more=suite))
    lines = [line for line in capsys.readouterr().out.splitlines() if "could not be" in line]
    names = ", ".join(fake.failed_sets)
    assert lines == [f"{names} could not be evaluated on bach: OSError: it is damaged"]


def test_an_evaluation_that_leaves_less_than_it_was_asked_for_is_not_repeated(fake, argv, suite):
    fake.suite = {("bach", "zero_shot"): 0.5}
    study_command.main(argv("local", more=suite))
    assert len(fake.evaluated) == 3


def test_a_finished_study_is_evaluated_later_without_training(fake, argv, suite):
    study_command.main(argv("local"))
    assert fake.evaluated == []
    fake.commands = []
    study_command.main(argv("local", more=suite))
    assert (fake.names, len(fake.evaluated)) == ([], 3)
    fake.commands = []
    study_command.main(argv("local"))
    assert fake.commands == []


def test_evaluations_take_their_turn_in_the_job_slots(argv, suite, monkeypatch):
    at_work, most = [], []

    class Slow(Process):
        def __init__(self, end):
            super().__init__(None)
            self.end, self.polls = end, 0
            at_work.append(self)
            most.append(len(at_work))

        def poll(self):
            self.polls += 1
            if self.polls == 3:
                self.end()
                at_work.remove(self)
                self.returncode = 0
            return self.returncode

    def start(command, output, threads, lock):
        if command[1] == "medfast.train":
            return Slow(lambda: write_run(output.with_suffix("")))
        place = Path(command[3])
        return Slow(lambda: [write_evaluation(place, *cell, 0.5) for cell in CELLS])

    monkeypatch.setattr(execute, "start", start)
    monkeypatch.setattr(execute, "_LOOK", 0.0)
    study_command.main(argv("local", more=[*suite, "--jobs", "2"]))
    assert len(most) == 6
    assert max(most) == 2


def test_the_list_has_the_evaluations_that_are_left(argv, suite, tmp_path, capsys):
    runs = tmp_path / "study" / "runs"
    for seed in (0, 1):
        write_run(runs / f"local-scratch-seed{seed}")
    for cell in CELLS:
        write_evaluation(runs / "local-scratch-seed0", *cell, 0.5)
    study_command.main(argv("local", more=[*suite, "--list"]))
    done, train_line, comment, *lines = capsys.readouterr().out.splitlines()
    assert done == "# 2 runs are done and left out"
    assert shlex.split(train_line)[-1] == "local-scratch-seed2"
    assert comment == "# each evaluation waits for the run that it names"
    commands = [shlex.split(line) for line in lines]
    assert all(words[:3] == ["python", "-m", "medfast.evaluate"] for words in commands)
    assert [Path(words[4]).name for words in commands] == [
        "local-scratch-seed1",
        "local-scratch-seed2",
    ]


# Phantoms


def test_phantoms_of_the_suite_are_listed_and_written_once(
    fake, argv, tmp_path, monkeypatch, capsys
):
    more = ["--data-root", "phantom", "--datasets", "bach"]
    study_command.main(argv("local", more=[*more, "--list"]))
    first, *_, last = (shlex.split(x) for x in capsys.readouterr().out.splitlines() if x[0] != "#")
    place = tmp_path / "study" / "suite"
    assert first == ["python", "-m", "medfast.evals.suite.phantom", "--out", str(place)]
    assert last[last.index("--data-root") + 1] == str(place)
    written = []
    monkeypatch.undo()
    monkeypatch.setattr(execute, "write_suite", lambda out: written.append(out) or out.mkdir())
    monkeypatch.setattr(execute.parts, "phantom_root", lambda config: None)
    monkeypatch.setattr(execute, "start", fake)
    fake.suite = {("bach", "zero_shot"): 0.5, ("bach", "linear_probe"): 0.5}
    for _ in range(2):
        study_command.main(argv("local", more=more))
    assert written == [place]
    assert len(fake.evaluated) == 3
    given = cli.parse_study(argv("local", more=more))[0].whole_command()
    assert "phantom" in given


def test_results_on_phantoms_and_on_data_do_not_mix(fake, argv, suite, capsys):
    study_command.main(argv("local", more=suite))
    with pytest.raises(SystemExit, match="2"):
        study_command.main(argv("local", more=["--data-root", "phantom"]))
    assert "was evaluated on data sets, and results on phantoms" in capsys.readouterr().err


def test_the_phantom_of_the_suite_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    keys = {key: EVALUATIONS[key] for key in ("bach", "roco", "vqa_rad")}
    monkeypatch.setattr(phantom_suite, "EVALUATIONS", keys)
    for name, least in (("PER_CLASS", 10), ("PAIRS", 30), ("IMAGES", 30)):
        monkeypatch.setattr(phantom_suite, name, least)
    out = tmp_path / "suite"
    with monkeypatch.context() as patch:
        patch.setattr(phantom_suite, "write_vqa", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            phantom_suite.write_suite(out)
    assert not out.exists()
    phantom_suite.main(["--out", str(out)])
    assert {path.name for path in out.iterdir()} == {folder(key) for key in keys}
    assert [path.name for path in tmp_path.iterdir()] == ["suite"]
    with pytest.raises(SystemExit, match="2"):
        phantom_suite.main(["--out", str(out)])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--data-root", "none"], "--data-root none: there is no such folder"),
        (["--data-root", "."], "none of the data sets is there"),
        (["--data", "bahc:."], "--data 'bahc' is not known. Did you mean 'bach'?"),
        (["--datasets", "bach"], "--datasets: say where they are, with --data-root or --data"),
        (["--data-root", ".", "--datasets", "bahc"], "Did you mean 'bach'?"),
        (["--data-root", "phantom", "--data", "bach:."], "leave out --data"),
    ],
)
def test_a_suite_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys, more, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        study_command.main(more)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("medfast.study: error: ")
    assert says in line


# Numbers


def _evaluated(tmp_path, **results):
    """Return a study of runs with a result of the suite by METHOD each."""
    study = study_of(*results, out=tmp_path)
    outcomes = []
    for method, cells in results.items():
        run = Run(method, "scratch")
        write_run(study.runs / run.name)
        for cell, value in cells.items():
            write_evaluation(study.runs / run.name, *cell, value)
        outcomes.append(read_outcome(study, run))
    return study, with_suite(study, outcomes)


def test_means_are_over_what_all_runs_have_and_count_the_same_images_once(tmp_path):
    clip = {
        **{("nct_crc", "zero_shot"): 0.2, ("pathmnist", "zero_shot"): 0.9},  # the same images
        **{("bach", "zero_shot"): 0.4, ("sicap", "zero_shot"): 0.8},
        **{("roco", "image_to_text"): 0.1, ("roco", "text_to_image"): 0.3},
    }
    local = {**clip, ("bach", "zero_shot"): 0.6}
    del local["sicap", "zero_shot"]
    _, (first, second) = _evaluated(tmp_path, clip=clip, local=local)
    assert first.values["suite zero-shot accuracy"] == pytest.approx((0.2 + 0.4) / 2)
    assert second.values["suite zero-shot accuracy"] == pytest.approx((0.2 + 0.6) / 2)
    assert first.values["suite retrieval R@10"] == pytest.approx(0.2)
    assert "suite VQA accuracy" not in first.values


def test_tables_compare_the_suite_and_say_over_what(tmp_path):
    study, outcomes = _evaluated(tmp_path, clip=CELLS, local=dict.fromkeys(CELLS, 0.9))
    text = tables(study, study_command.check(study), outcomes)
    assert "suite zero-shot accuracy +40.0" in text
    assert "suite VQA accuracy +50.0" in text
    assert "(zero-shot accuracy 1, probe accuracy 1, VQA accuracy 1)" in text
    header = next(line for line in text.splitlines() if line.startswith("| method"))
    assert "suite probe accuracy" in header
    assert "suite retrieval" not in header


def test_phantoms_of_the_suite_are_called_so(tmp_path):
    study, outcomes = _evaluated(tmp_path, clip=CELLS)
    said = "data sets are phantoms"
    assert said not in tables(study, study_command.check(study), outcomes)
    study.suite_data.mkdir()
    assert said in tables(study, study_command.check(study), outcomes)


def test_runs_that_are_not_evaluated_yet_are_named_and_left_out_of_means(tmp_path):
    study, outcomes = _evaluated(tmp_path, clip=CELLS, local={})
    assert outcomes[0].values["suite VQA accuracy"] == 0.4
    assert "suite VQA accuracy" not in outcomes[1].values
    text = tables(study, study_command.check(study), outcomes)
    assert "Without results of the suite: local-scratch-seed0." in text


def test_results_csv_has_the_suite_too(fake, argv, suite, tmp_path):
    study_command.main(argv("local", more=suite))
    with (tmp_path / "study" / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] != "phantom"]
    assert len(rows) == 3 * len(CELLS)
    assert {(row["dataset"], row["task"], row["value"]) for row in rows} == {
        (*cell, str(value)) for cell, value in CELLS.items()
    }


# In earnest


def test_a_real_run_is_evaluated_on_a_phantom_of_a_data_set(argv, monkeypatch, tmp_path, capsys):
    """In this process: a fresh one takes seconds to import torch."""

    def start(command, output, threads, lock):
        {"medfast.train": train, "medfast.evaluate": evaluate}[command[1]].main(command[2:])
        return Process()

    monkeypatch.setattr(execute, "start", start)
    monkeypatch.setattr("medfast.study.plan.MORE_SEEDS", ())
    place = write_classification(tmp_path / "sets", "pad_ufes_20", per_class=10)
    more = ["--data", f"pad_ufes_20:{place}"]
    study_command.main(argv("local", more=more))
    assert "suite probe accuracy" in capsys.readouterr().out
    evaluations = tmp_path / "study" / "runs" / "local-scratch-seed0" / "evaluations"
    assert {path.name for path in evaluations.glob("*.json")} == {
        "pad_ufes_20.zero_shot.json",
        "pad_ufes_20.linear_probe.json",
    }
