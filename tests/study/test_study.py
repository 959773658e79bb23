"""The study: its plan, what it takes up again, what it refuses, and what it says of the numbers."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from scipy import stats
from study_runs import TINY, Process, names_of, study_of, write_run

from medfast import cli, train
from medfast.methods import METHODS
from medfast.study import __main__ as study_command
from medfast.study import execute, folder, plan
from medfast.study.plan import OWN_SETTINGS, PRETRAINING, Run
from medfast.study.report import document, tables
from medfast.study.results import COLUMNS, difference, read_outcome

BEST = {"unimodal": "slip", "granularity": "sparc"}
TRANSFER = [f"clip-{init}-seed{seed}" for init in ("general", "frozen") for seed in range(3)]


# What runs, and in which order


def test_all_methods_come_once_then_more_seeds_of_the_best_then_transfer():
    assert names_of(study_of().plan(BEST)) == [
        "clip-pretraining-seed0",
        *("clip-scratch-seed0", "lit-general-seed0", "slip-scratch-seed0", "declip-scratch-seed0"),
        *("cyclip-scratch-seed0", "local-scratch-seed0", "filip-scratch-seed0"),
        "sparc-scratch-seed0",
        *("clip-scratch-seed1", "clip-scratch-seed2", "slip-scratch-seed1", "slip-scratch-seed2"),
        *("sparc-scratch-seed1", "sparc-scratch-seed2"),
        *TRANSFER,
    ]


@pytest.mark.parametrize(
    ("methods", "best", "names"),
    [
        (("local",), {"granularity": "local"}, [f"local-scratch-seed{k}" for k in range(3)]),
        (("lit",), {}, ["clip-pretraining-seed0", "lit-general-seed0"]),
        (("slip", "cyclip"), {}, ["slip-scratch-seed0", "cyclip-scratch-seed0"]),
        (
            ("clip",),
            {},
            ["clip-pretraining-seed0", *(f"clip-scratch-seed{k}" for k in range(3)), *TRANSFER],
        ),
    ],
)
def test_a_subset_of_methods_shrinks_the_plan(methods, best, names):
    assert names_of(study_of(*methods).plan(best)) == names


def test_general_weights_that_are_given_are_not_trained():
    study = study_of("clip", "lit", pretrained="some/weights")
    runs = study.plan({})
    assert PRETRAINING not in runs
    for run in runs:
        given = "--pretrained" in study.command(run)
        assert given == (run.init != "scratch")
        assert not given or "some/weights" in study.command(run)


def test_every_command_is_one_of_training_with_the_budget(tmp_path):
    study = study_of(out=tmp_path / "a study")
    study.general_data.mkdir(parents=True)
    for run in study.plan(BEST):
        words = shlex.split(shlex.join(study.command(run)))
        config, _ = cli.parse_train(words[2:])
        assert words[:2] == ["-m", "medfast.train"]
        assert (config.method, config.seed, config.name) == (run.method, run.seed, run.name)
        assert (config.phantom_pairs, config.force_image_size) == (6000, 64)
        assert config.epochs == (12 if run == PRETRAINING else 4)
        assert config.logs == str(tmp_path / "a study" / "runs")
        general = config.train_data == (f"roco:{study.general_data}",)
        assert general == (run == PRETRAINING)
        assert (config.pretrained is not None) == run.takes_weights
        assert config.lock_image == (run.init == "frozen")
        assert config.lock_image_unlocked_groups == 2 * (run.init == "frozen")


def test_weights_of_a_run_that_stops_early_are_those_of_its_best_epoch():
    assert study_of().weights.endswith("clip-pretraining-seed0")
    early = study_of(settings={"early_stop": 2})
    assert early.weights.endswith("clip-pretraining-seed0/checkpoints/best.pt")


def test_the_best_is_chosen_by_the_last_validation_and_not_by_the_test(tmp_path):
    study = study_of("slip", "declip", "local", "filip", out=tmp_path)
    recalls = {"slip": (0.3, 0.1), "declip": (0.2, 0.9), "local": (0.1, 0.5)}
    for method, (validation, test) in recalls.items():
        write_run(tmp_path / "runs" / f"{method}-scratch-seed0", validation, test)
    # The first validation of each is 0.9 less its last, so that it orders them the other way.
    assert folder.best(study) == {"unimodal": "slip"}
    assert folder.undecided(study) == [["local", "filip"]]
    write_run(tmp_path / "runs" / "filip-scratch-seed0", 0.2, 0.1)
    assert folder.best(study) == {"unimodal": "slip", "granularity": "filip"}


# The list


def test_the_list_shows_commands_and_what_waits_and_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["study", "--list", "--out", "my study"])
    lines = capsys.readouterr().out.splitlines()
    assert list(tmp_path.iterdir()) == []
    commands = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert commands[0][:4] == ["python", "-m", "medfast.data", "phantom"]
    assert commands[0][commands[0].index("--out") + 1] == "my study/general"
    runs = names_of(study_of().plan({}))
    assert [words[-1] for words in commands[1:]] == runs
    assert "waits for the line above" in lines[2]
    assert "the best of slip, declip, cyclip follow" in lines[-2]
    assert "the best of local, filip, sparc follow" in lines[-1]


def test_the_list_leaves_out_what_is_done_and_goes_on_with_what_was_begun(argv, tmp_path, capsys):
    runs = tmp_path / "study" / "runs"
    for method in ("slip", "cyclip"):
        write_run(runs / f"{method}-scratch-seed0", {"slip": 0.1, "cyclip": 0.2}[method])
    checkpoints = runs / "cyclip-scratch-seed1" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "epoch_1.pt").touch()
    study_command.main(argv("slip", "cyclip", more=["--list"]))
    comment, *lines = capsys.readouterr().out.splitlines()
    assert comment == "# 2 runs are done and left out"
    assert [shlex.split(line)[-1] for line in lines] == [
        "cyclip-scratch-seed1",
        "cyclip-scratch-seed2",
    ]
    assert ["--resume latest" in line for line in lines] == [True, False]


def test_help_and_list_do_not_import_torch(tmp_path):
    code = (
        "import sys\nfrom medfast import cli\n"
        "cli.main(['study', '--list'])\n"
        "try: cli.main(['study', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)


# Running


def test_a_study_runs_its_plan_in_order_and_leaves_its_tables(fake, argv, tmp_path, capsys):
    fake.validation = {"slip-scratch-seed0": 0.4}
    study_command.main(argv("all", more=["--jobs", "3"]))
    study = study_of(out=tmp_path / "study")
    planned = names_of(study.plan({"unimodal": "slip", "granularity": "local"}))
    assert sorted(fake.names) == sorted(planned)
    first_with_weights = min(i for i, c in enumerate(fake.commands) if "--pretrained" in c)
    assert fake.names.index(PRETRAINING.name) < first_with_weights
    shown = capsys.readouterr()
    finished = [line for line in shown.err.splitlines() if " s, R@1 " in line]
    assert len(finished) == len(planned)
    assert re.fullmatch(
        r"clip-pretraining-seed0: \d+ s, R@1 19.0% image to text, 21.0% text to image "
        r"\(\d+ of 21 runs\)",
        finished[0],
    )
    text = (study.out / "study.md").read_text()
    assert shown.out.strip() in text
    assert train.PHANTOM_NOTE in shown.out
    record = json.loads((study.out / "study.json").read_text())
    assert record["methods"] == list(METHODS)
    assert record["settings"]["epochs"] == 1
    assert record["seconds"].keys() == set(planned)


def test_a_failed_run_stops_the_study_with_its_log(fake, argv, tmp_path, capsys):
    fake.fails = {"local-scratch-seed1"}
    with pytest.raises(SystemExit) as stopped:
        study_command.main(argv("local"))
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    log = tmp_path / "study" / "runs" / "local-scratch-seed1.log"
    assert last == (
        "medfast.study: error: the run local-scratch-seed1 failed with exit code 3; its output is "
        f"in {log} and ends with: output of local-scratch-seed1"
    )
    assert fake.names == ["local-scratch-seed0", "local-scratch-seed1"]


def test_a_run_that_leaves_no_results_has_failed(argv, monkeypatch, capsys):
    monkeypatch.setattr(execute, "start", lambda *_: Process(0))
    monkeypatch.setattr(execute, "write_data", lambda study: None)
    with pytest.raises(SystemExit, match="2"):
        study_command.main(argv("local"))
    assert "local-scratch-seed0 failed with exit code 0" in capsys.readouterr().err


def test_a_study_takes_every_run_up_where_it_is(fake, argv, tmp_path):
    fake.fails = {"local-scratch-seed1"}
    with pytest.raises(SystemExit):
        study_command.main(argv("local"))
    runs = tmp_path / "study" / "runs"
    (runs / "local-scratch-seed1" / "checkpoints").mkdir()
    (runs / "local-scratch-seed1" / "checkpoints" / "epoch_1.pt").touch()
    (runs / "local-scratch-seed2").mkdir()  # begun, with nothing to go on from
    (runs / "local-scratch-seed2" / "metrics.jsonl").touch()
    done = (runs / "local-scratch-seed0" / "results.jsonl").stat().st_mtime_ns
    fake.fails, fake.commands = set(), []
    study_command.main(argv("local"))
    assert fake.names == ["local-scratch-seed1", "local-scratch-seed2"]
    assert ["--resume" in words for words in fake.commands] == [True, False]
    assert (runs / "local-scratch-seed0" / "results.jsonl").stat().st_mtime_ns == done
    assert (runs / "local-scratch-seed1.log").read_text().count("output of") == 2


def test_a_finished_study_only_shows_its_tables_again(fake, argv, capsys):
    study_command.main(argv("clip"))
    before, fake.commands = capsys.readouterr().out, []
    study_command.main(argv("clip"))
    assert fake.commands == []
    assert capsys.readouterr().out == before


def test_at_most_so_many_runs_are_at_work_and_share_the_threads(argv, monkeypatch):
    import torch

    at_work, most, given = set(), [], set()

    class Slow(Process):
        """Ends, and leaves its results, when it is asked for the third time."""

        def __init__(self, place):
            super().__init__(None)
            self.place, self.polls = place, 0
            at_work.add(place)

        def poll(self):
            self.polls += 1
            if self.polls == 3:
                write_run(self.place)
                at_work.remove(self.place)
                self.returncode = 0
            return self.returncode

    def start(command, output, threads, lock):
        process = Slow(output.with_suffix(""))
        given.add(threads)
        most.append(len(at_work))
        return process

    monkeypatch.setattr(execute, "start", start)
    monkeypatch.setattr(execute, "write_data", lambda study: None)
    monkeypatch.setattr(execute, "_LOOK", 0.0)
    study_command.main(argv("lit", "slip", "filip", "sparc", more=["--jobs", "2"]))
    assert max(most) == 2
    assert len(most) == 9  # with the general weights, and two more seeds of two methods
    assert given == {max(1, torch.get_num_threads() // 2)}


def test_a_process_gets_its_threads_and_keeps_its_output(tmp_path):
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS']); print('bad', file=sys.stderr)"
    with (tmp_path / "lock").open("a") as lock:
        for _ in range(2):
            execute.start(["-u", "-c", code], tmp_path / "log", 3, lock).wait()
    assert (tmp_path / "log").read_text() == "3\nbad\n" * 2


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_stopped_study_ends_its_processes_and_can_go_on(
    fake, argv, monkeypatch, capsys, sent, code
):
    started = []

    def start(command, output, threads, lock):
        sleep = ["-c", "import time; time.sleep(60)"]
        started.append(subprocess.Popen([sys.executable, *sleep], pass_fds=(lock.fileno(),)))
        threading.Timer(0.2, os.kill, (os.getpid(), sent)).start()
        return started[-1]

    with monkeypatch.context() as patch:
        patch.setattr(execute, "start", start)
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            study_command.main(argv("local"))
    assert stopped.value.code == code
    assert signal.getsignal(signal.SIGTERM) == before
    assert [process.returncode for process in started] == [-signal.SIGTERM]
    study_command.main(argv("local"))
    assert fake.names == [f"local-scratch-seed{k}" for k in range(3)]


def test_a_run_that_outlives_its_study_keeps_others_out(fake, argv, tmp_path, capsys):
    study = study_of("local", out=tmp_path / "study")
    with folder.locked(study) as lock:
        process = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(lock.fileno(),)
        )
    try:
        with pytest.raises(SystemExit, match="2"):
            study_command.main(argv("local"))
        assert "a run of a killed one, is at work there" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()
    study_command.main(argv("local"))
    assert len(fake.names) == 3


def test_general_data_that_were_not_finished_are_written_anew(tmp_path):
    settings = {**TINY, "cache_dir": str(tmp_path / "cache")}
    study = study_of("lit", out=tmp_path, settings=settings)
    study.general_data.mkdir()
    (study.general_data / "half").touch()
    execute.write_data(study)
    sidecar = json.loads((study.general_data / "phantom.json").read_text())
    assert sidecar["generator"] == "medfast phantom-general"
    assert sidecar["pairs"] == 60
    assert not (study.general_data / "half").exists()


# Refusals


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--methods", "clip", "locla"], "--methods 'locla' is not known. Did you mean 'local'?"),
        (["--budget", "quik"], "--budget 'quik' is not known. Did you mean 'quick'?"),
        (["--budget", "no.yaml"], "--budget no.yaml cannot be read: No such file"),
        (["--jobs", "0"], "--jobs must be at least 1; got 0"),
        (["--out", "file"], "--out file must be a folder; it is a file"),
        (["--out", "full"], "--out full must be a study's folder, or new or empty"),
        (["--budget", "damaged.yaml"], "--budget damaged.yaml is not YAML"),
        (["--budget", "bad.yaml"], "--budget bad.yaml: --epochs must be at least 1; got 0"),
        (["--pretrained", "/no/weights.pt"], "--pretrained /no/weights.pt: there is no such file"),
        (["--budget", "gpu.yaml"], "--fused-loss cuda"),
        (["--jbos", "2"], "Did you mean --jobs?"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_any_work(
    tmp_path, monkeypatch, capsys, more, says
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(execute, "execute", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "damaged.yaml").write_text("a: [")
    (tmp_path / "bad.yaml").write_text("epochs: 0")
    (tmp_path / "gpu.yaml").write_text("fused_loss: cuda")
    with pytest.raises(SystemExit) as stopped:
        study_command.main(more)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("medfast.study: error: ")
    assert says in line
    assert not (tmp_path / "studies").exists()


@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_a_budget_does_not_set_what_is_the_studys(tmp_path, name, capsys):
    file = tmp_path / "own.yaml"
    file.write_text(f"{name}: 1")
    with pytest.raises(SystemExit, match="2"):
        study_command.main(["--budget", str(file), "--out", str(tmp_path / "study")])
    assert f"sets {name}, which is the study's; leave it out" in capsys.readouterr().err


def test_a_folder_of_another_study_is_refused(fake, argv, budget, capsys):
    study_command.main(argv("local"))

    def refused(arguments):
        with pytest.raises(SystemExit, match="2"):
            study_command.main(arguments)
        return capsys.readouterr().err.splitlines()[-1]

    assert "a study with another --methods (local)" in refused(argv("filip"))
    assert "another --methods (local)" in refused(argv("filip", more=["--list"]))
    more = ["--pretrained", "x"]
    assert "a study with another --pretrained (none)" in refused(argv("local", more=more))
    budget.write_text(budget.read_text().replace("epochs: 1", "epochs: 2"))
    assert f"a study with another --budget ({budget})" in refused(argv("local"))


def test_runs_that_were_made_elsewhere_are_taken_if_their_settings_are_the_studys(
    fake, argv, tmp_path, capsys
):
    place = tmp_path / "study" / "runs" / "local-scratch-seed1"
    write_run(place)
    params = {**TINY, "method": "local", "seed": 1, "name": "local-scratch-seed1"}
    (place / "params.yaml").write_text(yaml.safe_dump({**params, "epochs": 3}))
    with pytest.raises(SystemExit, match="2"):
        study_command.main(argv("local"))
    said = capsys.readouterr().err
    assert "its run local-scratch-seed1 has --epochs 3, this study 1" in said
    (place / "params.yaml").write_text(yaml.safe_dump(params))
    study_command.main(argv("local"))
    assert fake.names == ["local-scratch-seed0", "local-scratch-seed2"]
    assert ", without 1 run elsewhere" in (tmp_path / "study" / "study.md").read_text()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("study.json", "study.json is damaged. Move it away"),
        ("runs/slip-scratch-seed0/results.jsonl", "results of its run slip-scratch-seed0"),
        ("runs/slip-scratch-seed0/metrics.jsonl", "results of its run slip-scratch-seed0"),
    ],
)
def test_a_damaged_file_is_named(fake, argv, tmp_path, capsys, name, says):
    study_command.main(argv("slip", "cyclip"))
    (tmp_path / "study" / name).write_text('{"cut": ')
    with pytest.raises(SystemExit, match="2"):
        study_command.main(argv("slip", "cyclip"))
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("key", ["budget", "methods", "settings", "pretrained", "jobs", "seconds"])
def test_a_record_that_lacks_something_is_damaged(fake, argv, tmp_path, capsys, key):
    study_command.main(argv("slip"))
    path = tmp_path / "study" / "study.json"
    record = json.loads(path.read_text())
    del record[key]
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="2"):
        study_command.main(argv("slip"))
    assert "study.json is damaged" in capsys.readouterr().err.splitlines()[-1]


# Numbers


def test_the_interval_is_welchs():
    # By hand: means 2 and 5, both variances 1, so 4 degrees of freedom: t = 2.7764.
    found = difference([1, 2, 3], [4, 5, 6])
    assert found.value == -3
    assert found.interval == pytest.approx((-3 - 2.7764 * (2 / 3) ** 0.5, -0.7331), abs=1e-4)
    # By hand: variances 0.0004 / 3 and 0.0018 / 2, 1.2976 degrees of freedom.
    a, b = [0.30, 0.32, 0.34], [0.20, 0.26]
    found = difference(a, b)
    error2 = 0.0004 / 3 + 0.0018 / 2
    freedom = error2**2 / ((0.0004 / 3) ** 2 / 2 + 0.0009**2 / 1)
    half = stats.t.ppf(0.975, freedom) * error2**0.5
    assert found.value == pytest.approx(0.09)
    assert found.interval == pytest.approx((0.09 - half, 0.09 + half))
    theirs = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert found.interval == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ([0.3], [0.1, 0.2], "one seed, no interval"),
        ([0.3, 0.3], [0.2, 0.2], "all seeds alike, no interval"),
    ],
)
def test_without_a_spread_there_is_no_interval_and_nothing_is_shown(a, b, why):
    found = difference(a, b)
    assert found.interval is None
    assert found.why_not == why
    assert not found.is_shown


def _outcomes(tmp_path, **recalls):
    """Return a study of runs whose test R@1 are given by METHOD_INIT."""
    study = study_of("clip", "slip", "local", out=tmp_path)
    outcomes = []
    for key, values in recalls.items():
        method, init = key.split("_")
        for seed, value in enumerate(values):
            run = Run(method, init, seed)
            side = [("two_choice", "side", 0.6 + seed / 100)]
            write_run(study.runs / run.name, 0.3, value, side)
            outcomes.append(read_outcome(study, run))
    return study, outcomes


def _record(jobs=1):
    return folder.Record(Path("unused"), {"seconds": {"clip-scratch-seed0": 90.0}, "jobs": jobs})


def _row(text, *begin):
    """Return the cells of the one table row that begins with these."""
    rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines()]
    (row,) = [row for row in rows if row[: len(begin)] == list(begin)]
    return row


def test_one_seed_is_shown_bare_and_several_with_their_range(tmp_path):
    study, outcomes = _outcomes(tmp_path, clip_scratch=[0.20, 0.22, 0.30], slip_scratch=[0.25])
    text = tables(study, _record(), outcomes)
    assert _row(text, "clip", "scratch") == [
        *("clip", "scratch", "0 1 2", "23.0 % (19.0 to 29.0)", "25.0 % (21.0 to 31.0)", "12.0"),
        *("-", "-", "61.0 % (60.0 to 62.0)", "-", "-", "100", "502 MB"),
    ]
    assert _row(text, "slip", "scratch")[2:6] == ["0", "24.0 %", "26.0 %", "12.5"]
    assert "slowed one another" not in text
    assert "Up to 4 runs shared the machine" in tables(study, _record(jobs=4), outcomes)


def test_sentences_say_no_more_than_the_intervals(tmp_path):
    study, outcomes = _outcomes(
        tmp_path,
        clip_scratch=[0.20, 0.21, 0.22],
        clip_general=[0.40, 0.41, 0.42],
        clip_frozen=[0.30, 0.45, 0.48],
        local_scratch=[0.10, 0.11, 0.12],
        slip_scratch=[0.30],
    )
    text = tables(study, _record(), outcomes)
    half = 2.7764 * (2 / 3) ** 0.5  # in points, as in the test of the interval
    low, high = 20 - half, 20 + half
    none = "no difference shown in two-choice side"
    assert (
        f"- clip from general weights against clip from scratch: R@1 is higher by 20.0 points "
        f"({low:.1f} to {high:.1f}); {none}.\n"
    ) in text
    assert (
        "- clip from general weights, partly frozen against clip from general weights: no "
        "difference shown in R@1, two-choice side.\n"
    ) in text
    assert (
        "- local from scratch against clip from scratch: R@1 is lower by 10.0 points "
        f"({10 - half:.1f} to {10 + half:.1f}); {none}.\n"
    ) in text
    assert (
        "- slip from scratch against clip from scratch: one seed, no interval, for R@1 +9.0, "
        "two-choice side -1.0 points.\n"
    ) in text
    assert _row(text, "slip from scratch minus clip from scratch")[1] == (
        "+9.0 (one seed, no interval)"
    )
    assert "Of 6, 0.3 would leave out 0 on average" in text


def test_a_question_without_two_sides_is_not_answered(tmp_path):
    study, outcomes = _outcomes(tmp_path, local_scratch=[0.2, 0.3])
    text = tables(study, _record(), outcomes)
    assert text.count("Not asked:") == 3
    assert "Welch" not in text


def test_the_document_holds_commands_versions_and_time(tmp_path):
    study, outcomes = _outcomes(tmp_path, clip_pretraining=[0.5], clip_scratch=[0.2])
    text = document(study, _record(), outcomes)
    assert "medfast 9.8.7 (abc) with torch 6.5.4" in text
    assert "1.5 min, added up over 1 runs, without 1 run elsewhere" in text
    block = text.partition("```bash\n")[2].partition("\n```")[0].splitlines()
    assert [line.split()[:3] for line in block] == [
        ["python", "-m", name]
        for name in ("medfast.study", "medfast.data", "medfast.train", "medfast.train")
    ]
    assert "general domain, where its R@1 is 50.0 %" in text
    assert "| clip   | scratch" in text
    assert "pretraining |" not in text  # its numbers are those of other data


def test_results_csv_has_one_row_per_run_task_and_metric(fake, argv, tmp_path):
    study_command.main(argv("lit"))
    with (tmp_path / "study" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [(row["run"], row["metric"]) for row in rows] == [
        (name, f"{way}_R@1")
        for name in ("clip-pretraining-seed0", "lit-general-seed0")
        for way in ("image_to_text", "text_to_image")
    ]
    assert rows[2] == {
        **{"run": "lit-general-seed0", "method": "lit", "init": "general", "seed": "0"},
        **{"dataset": "phantom", "task": "retrieval", "name": ""},
        **{"metric": "image_to_text_R@1", "value": "0.19"},
        **{"low": "0.1", "high": "0.3", "chance": "0.02", "n": "50"},
    }


# In earnest


def test_a_real_study_trains_and_compares(argv, monkeypatch, tmp_path, capsys):
    """Every run of clip and local, in this process: a fresh one takes seconds to import torch."""

    def start(command, output, threads, lock):
        train.main(command[2:])
        return Process()

    monkeypatch.setattr(execute, "start", start)
    monkeypatch.setattr(plan, "MORE_SEEDS", (1,))
    study_command.main(argv("clip", "local"))
    text = capsys.readouterr().out
    out = tmp_path / "study"
    for init in ("scratch", "general weights", "general weights, partly frozen"):
        assert _row(text, "clip", init)[2] == "0 1"
    assert _row(text, "local", "scratch")[2] == "0 1"
    assert "clip from general weights against clip from scratch:" in text
    assert "local from scratch against clip from scratch:" in text
    study = cli.parse_study(argv("clip", "local"))[0]
    assert sorted(p.name for p in study.runs.iterdir()) == sorted(
        names_of(study.plan({"granularity": "local"}))
    )
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["task"] for row in rows} == {"retrieval", "zero_shot", "two_choice"}
    assert all(0 <= float(row["value"]) <= 1 for row in rows)


def test_a_real_study_in_processes_goes_on_after_a_kill(argv, tmp_path):
    """The general weights, then lit from them."""
    runs = tmp_path / "study" / "runs"
    command = [sys.executable, "-m", "medfast.study", *argv("lit")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (runs / "lit-general-seed0").exists() and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not (tmp_path / "study" / "study.md").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "lit" in _row(done.stdout, "lit", "general weights")
    assert "clip-pretraining-seed0:" not in done.stderr
    assert "lit-general-seed0:" in done.stderr
