import os
import signal
import subprocess
import sys

import pytest

from medfast import cli
from medfast.config import TrainConfig
from medfast.errors import UsageError


def test_flags_reach_the_settings():
    argv = ["--batch-size", "8", "--no-fused-loss", "--group-positives", "--lr", "0.1"]
    config, given = cli.parse_train(argv)
    assert config == TrainConfig(batch_size=8, fused_loss="reference", group_positives=True, lr=0.1)
    assert given == {"batch_size", "fused_loss", "group_positives", "lr"}


@pytest.mark.parametrize(
    ("argv", "impl"),
    [([], "auto"), (["--fused-loss"], "auto"), (["--fused-loss", "torch"], "torch")],
)
def test_fused_loss_takes_an_implementation_or_none(argv, impl):
    assert cli.parse_train([*argv, "--method", "clip"])[0].fused_loss == impl


def test_flags_win_over_the_config_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 0.5\nepochs: 3\n")
    config, given = cli.parse_train(["--config", str(file), "--epochs", "4"])
    assert (config.lr, config.epochs) == (0.5, 4)
    assert given == {"lr", "epochs"}


def test_a_runs_params_are_a_config_file(short_run):
    config, _ = cli.parse_train(["--config", str(short_run / "params.yaml")])
    assert config.batch_size == 16
    assert config.name == "a"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epoch: 3", "'epoch' is not known. Did you mean 'epochs'"),
        ("- 3", "setting: value"),
        ("a: [", "is not YAML"),
        ("lr: fast", "--lr must be float; got 'fast'"),
    ],
)
def test_a_wrong_config_file_is_refused(tmp_path, text, says):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=says):
        cli.parse_train(["--config", str(file)])


def test_a_missing_config_file_is_refused(refusal):
    assert "cannot be read: No such file" in refusal(["--config", "no.yaml"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--bath-size", "3"], "Did you mean --batch-size?"),
        (["--batch-size", "many"], "invalid int value: 'many'"),
        (["--method", "locla"], "Did you mean 'local'?"),
        (["--fused-loss", "tritn"], "Did you mean 'triton'?"),
        (["--fused-loss", "cuda"], "--fused-loss cuda"),
        (["extra"], "unknown argument 'extra'"),
    ],
)
def test_a_wrong_flag_is_one_sentence_with_the_nearest_name(refusal, argv, says):
    assert says in refusal(argv)


def test_help_lists_every_setting_and_does_not_import_torch():
    code = (
        "import sys\nfrom medfast import train\n"
        "try: train.main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    for name in TrainConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in shown


def test_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["trian"])
    assert "Did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_a_module_too(name):
    command = [sys.executable, "-m", f"medfast.{name}", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("usage: medfast")


def test_no_command_lists_them(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "it is one of: train, data, env" in capsys.readouterr().err


def test_env_reports_versions_and_implementations(capsys):
    cli.main(["env"])
    shown = capsys.readouterr().out
    for word in ("torch", "medfast", "clip_loss", "local_alignment_loss", "reference", "triton"):
        assert word in shown


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_is_not_read_to_its_end_is_no_error(unbuffered):
    code = "from medfast import cli\ncli.run(lambda: [print('line') for _ in range(99999)], 'it')"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    ) as process:
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_pipe_that_breaks_elsewhere_is_an_error(capsys):
    def command():
        raise BrokenPipeError("a worker is gone")

    with capsys.disabled(), pytest.raises(BrokenPipeError, match="a worker is gone"):
        cli.run(command, "it")


def test_a_missing_package_is_named_with_its_remedy(capsys):
    def command():
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    with pytest.raises(SystemExit, match="2"):
        cli.run(command, "medfast.train")
    assert "'timm' is missing" in (said := capsys.readouterr().err)
    assert "pip install '.[train]'" in said


def test_results_table_shows_n_interval_and_chance():
    row = {
        **{"task": "zero_shot", "name": "finding", "n": 600},
        **{"metrics": {"accuracy": 0.557}, "chance": {"accuracy": 0.188}},
        "ci95": {"accuracy": [0.514, 0.602]},
    }
    line = cli.results_table([row]).splitlines()[1]
    for cell in ("zero_shot finding accuracy", "600", "55.7%", "51.4%", "60.2%", "18.8%"):
        assert cell in line
