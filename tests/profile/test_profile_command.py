"""The profile command: real steps in fresh processes, what it writes, and what it refuses."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from threading import Timer

import pytest
from PIL import Image

from medfast import cli, profile
from medfast.config import TrainConfig
from medfast.errors import UsageError
from medfast.profile import measure as measuring
from medfast.profile import run as running
from medfast.profile.largest import Largest
from medfast.profile.measure import WARM_UP, Measurement
from medfast.profile.phases import LOSS_FORWARD, PHASES

SMALL = ["--batch-size", "16", "--workers", "0", "--steps", "2", "--force-image-size", "32"]
# A number whose unit the key does not name.
UNITS = ("_s", "_mb", "_share", "_pairs", "_batches", "_processes", "_steps", "_tokens", "_words")
UNITS += ("_flop_per_s", "_flop_per_step_and_device", "_s_and_device")


def _numbers_without_unit(found, key=""):
    """Return the keys under which there is a number that no key above it names the unit of."""
    if isinstance(found, dict):
        inner = ((k if not key.endswith(UNITS) else key, v) for k, v in found.items())
        return [bad for k, v in inner for bad in _numbers_without_unit(v, k)]
    if isinstance(found, list):
        return [bad for v in found for bad in _numbers_without_unit(v, key)]
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    return [key] if is_number and not key.endswith(UNITS) else []


def test_a_profile_prints_both_losses_and_writes_where_it_says(
    phantom, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    argv = ["--train-data", f"roco:{phantom}", "--method", "filip", "--trace", "trace.json", *SMALL]
    cli.main(["profile", *argv])
    shown = capsys.readouterr()
    title, header, *rows = shown.out.splitlines()
    for words in ("filip on tiny", "16 pairs per step", "2 steps after 3"):
        assert words in title
    assert header.split() == ["fused:", "auto", "reference", "difference"]
    for row in ("pairs/s", "model FLOP utilisation", "step", "peak memory", *PHASES):
        (line,) = (line for line in rows if re.match(rf" *{row}  ", line))
        assert len(re.findall(r"\d[\d,.]*", line)) >= 2
    (folder,) = (tmp_path / "profiles").iterdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profiles", "trace.json"]
    assert sorted(path.name for path in folder.iterdir()) == ["profile.json", "profile.png"]
    assert f"wrote {folder.relative_to(tmp_path) / 'profile.json'}" in shown.err
    with Image.open(folder / "profile.png") as image:
        assert image.width > 500

    found = json.loads((folder / "profile.json").read_text())
    settings = found.pop("settings")
    assert settings["method"] == "filip"
    assert found["torch"]
    assert found["device"]
    assert _numbers_without_unit(found) == []
    (point,) = found["points"]
    fused, reference = point["variants"]
    assert (fused["fused_loss"], reference["fused_loss"]) == ("auto", "reference")
    for own in (fused, reference):
        phases = own["phases_mean_s"]
        assert sum(phases.values()) == pytest.approx(own["step_mean_s"])
        assert own["pairs_per_s"] == pytest.approx(16 / own["step_mean_s"])
        assert all(phases[name] > 0 for name in PHASES if name != "communication")
        assert phases["other"] < 0.2 * own["step_mean_s"]
        share = point["model_flop_per_step_and_device"] / point["matrix_product_flop_per_s"]
        share /= own["step_mean_s"]
        assert own["model_flop_utilisation_share"] == pytest.approx(share)
        assert 0 < share < 1
        assert own["memory_before_first_step_mb"] <= own["peak_memory_mb"]

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert set(PHASES) - names == {"communication"}


def test_the_measurement_counts_steps_after_the_warm_up(phantom, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "medfast.trainer.Trainer.train_step", lambda self, step: sizes.append(sum(map(len, step)))
    )
    config = TrainConfig(train_data=(f"roco:{phantom}",), batch_size=40, workers=0)
    found = measuring.measure(config, 4)
    # Over the end of an epoch of two batches.
    assert sizes == [40] * (WARM_UP + 4 + measuring.MEMORY_STEPS)
    assert len(found.step_s) == 4
    assert found.pairs_per_s == pytest.approx(160 / sum(found.step_s))
    assert 1 < found.words < found.tokens <= 48
    assert found.largest is None


def _measurement(**changes):
    own = Measurement(
        step_s=[0.1, 0.3],
        phase_s={phase: 0.02 for phase in PHASES},
        pairs=16.0,
        world=1,
        held_mb=500.0,
        peak_mb={phase: 600.0 for phase in PHASES} | {LOSS_FORWARD: 1234.0},
        sent_mb=0.0,
        tokens=20.3,
        words=12.0,
        product_flops=1e11,
        number_format="float32",
        device="a machine",
        device_type="cpu",
        largest=Largest(2048, 2100, True),
    )
    return dataclasses.replace(own, **changes)


@pytest.fixture
def profiled(phantom, tmp_path, monkeypatch, capsys):
    """Run the command where `answer(config, *rest)` stands for what a fresh process finds."""

    def run(answer, *argv):
        monkeypatch.setattr(running, "_in_fresh_process", answer)
        out = tmp_path / "out"
        profile.main(["--train-data", f"roco:{phantom}", "--out", str(out), *argv])
        (path,) = out.glob("*.json")
        assert path.with_suffix(".png").is_file()
        return capsys.readouterr().out, json.loads(path.read_text())["points"]

    return run


def test_a_sweep_goes_on_where_a_value_runs_out_of_memory(profiled):
    asked = []

    def answer(config, *rest):
        asked.append((config.batch_size, config.fused_loss))
        if config.fused_loss == "reference" and config.batch_size > 16:
            return running.OUT_OF_MEMORY
        if config.batch_size == 64:
            return running.ENDED
        return _measurement(pairs=2.0 * config.batch_size)

    said, points = profiled(answer, "--method", "clip", "--sweep", "batch-size=16,32,64,16")
    assert asked == [(n, impl) for n in (16, 32, 64) for impl in ("auto", "reference")]
    rows = {line.split()[0]: line for line in said.splitlines() if line[:1].isdigit()}
    assert rows["16"].split()[1:] == [
        "160.0",
        *rows["16"].split()[2:5],
        "160.0",
        *rows["16"].split()[6:],
    ]
    assert "320.0" in rows["32"]
    assert rows["32"].endswith("out of memory")
    assert "process ended, as by a lack of memory" in rows["64"]
    assert [[own.get("failure") for own in point["variants"]] for point in points] == [
        [None, None],
        [None, "out of memory"],
        ["process ended, as by a lack of memory", "out of memory"],
    ]
    assert [point["batch_size_pairs"] for point in points] == [16, 32, 64]


def test_a_sweep_of_which_nothing_fits_says_so(profiled):
    said, points = profiled(lambda *_: running.OUT_OF_MEMORY, "--sweep", "workers=0,2")
    assert "no value could be measured (out of memory)" in said
    assert [point["workers_processes"] for point in points] == [0, 2]


def test_a_reference_that_does_not_fit_leaves_the_fused_column(profiled):
    def answer(config, *rest):
        return running.OUT_OF_MEMORY if config.fused_loss == "reference" else _measurement()

    said, (point,) = profiled(answer, "--method", "clip")
    assert "reference: out of memory" in said
    assert "80.0" in said
    assert "about 2,048" in said
    assert point["variants"][1] == {"fused_loss": "reference", "failure": "out of memory"}
    assert point["variants"][0]["largest_batch_size_pairs"] == 2048


def test_several_processes_count_in_total_and_per_device(profiled, monkeypatch):
    def answer(config, *rest):
        return _measurement(world=4, sent_mb=1.5)

    said, (point,) = profiled(answer, "--method", "clip")
    assert "4 x 64 pairs per step" in said
    (line,) = (line for line in said.splitlines() if line.startswith("pairs/s per device"))
    assert line.split()[-3:-1] == ["20.0", "20.0"]
    assert "sent per step: by each of 4 processes" in said
    assert point["variants"][0]["pairs_per_s_and_device"] == 20.0
    assert point["world_processes"] == 4


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--no-fused-loss"], "--no-fused-loss"),
        (["--resume", "latest"], "--resume is for medfast train"),
        (["--dry-run"], "--dry-run is for medfast train"),
        (["--fused-loss", "cuda"], "--fused-loss cuda"),
        (["--train-data", "roco:/nowhere"], "there is no /nowhere. Get ROCO"),
        (["--method", "filipp"], "Did you mean 'filip'?"),
        (["--sweep", "batch-sizes=8"], "Did you mean 'batch-size'?"),
        (["--sweep", "lr=1"], "Known: accum-freq, batch-size, workers"),
        (["--sweep", "batch-size"], "--sweep must be KEY=N,N,..."),
        (["--sweep", "batch-size="], "--sweep must be KEY=N,N,..."),
        (["--sweep", "batch-size=8,,9"], "must be whole numbers"),
        (["--sweep", "batch-size=8,many"], "must be whole numbers"),
        (["--sweep", "batch-size=8,0"], "--sweep: --batch-size must be at least 2"),
        (["--sweep", "accum-freq=0"], "--sweep: --accum-freq must be at least 1"),
        (["--sweep", "workers=-1"], "--sweep: --workers must be 0 or more"),
        (["--sweep", "workers=1", "--trace", "a.json"], "--trace is of one profile"),
        (["--batch-size", "97"], "a step takes 97 pairs, and the data hold 96 training pairs"),
        (["--sweep", "batch-size=16,4096"], "a step takes 4,096 pairs"),
        (["--sweep", "accum-freq=1,2"], "a step takes 128 pairs"),
        (["--trace", "a.txt"], "--trace must be a file that ends in .json"),
        (["--out", "/dev/null/out"], "--out: the folder /dev/null/out cannot be written"),
        (["--trace", "/dev/null/a.json"], "--trace: the folder /dev/null cannot be written"),
    ],
)
def test_what_cannot_be_profiled_is_refused_in_one_sentence(
    phantom, tmp_path, monkeypatch, capsys, argv, says
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        profile.main(["--train-data", f"roco:{phantom}", *argv])
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("medfast.profile: error: ")
    assert says in line
    assert list(tmp_path.rglob("*.json")) == []


def test_steps_that_do_not_fit_are_refused_and_leave_nothing(
    phantom, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(running, "_in_fresh_process", lambda *_: running.OUT_OF_MEMORY)
    with pytest.raises(SystemExit, match="2"):
        profile.main(["--train-data", f"roco:{phantom}", "--out", str(tmp_path / "out")])
    assert "--fused-loss auto: out of memory; lower --batch-size." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_images_that_cannot_be_read_are_not_waited_for_forever(own_phantom):
    for image in (own_phantom / "train" / "radiology" / "images").iterdir():
        image.write_bytes(b"")
    config = TrainConfig(train_data=(f"roco:{own_phantom}",), workers=0, max_bad_samples=1.0)
    with pytest.raises(UsageError, match="nothing to time"):
        measuring.measure(config, 1)


def test_help_does_not_import_torch():
    code = (
        "import sys; from medfast import cli; cli.parse_profile(['--sweep', 'workers=1,2']);"
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_interrupted_profile_leaves_no_process_behind(monkeypatch):
    class Endless(ProcessPoolExecutor):
        """Works for longer than anybody waits, whatever is asked."""

        def submit(self, *_):
            future = super().submit(time.sleep, 60)
            Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
            return future

    monkeypatch.setattr(running, "ProcessPoolExecutor", Endless)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        running._in_fresh_process(TrainConfig(), 1, "name", None, False)
    assert time.monotonic() - started < 50
