"""The profile command: real steps in fresh processes, and what it refuses."""

import re

import pytest

from medfast import cli, profile
from medfast.config import TrainConfig

SMALL = ["--batch-size", "16", "--workers", "0", "--steps", "2"]


def _number(cell):
    return float(re.search(r"[\d.,]+", cell)[0].replace(",", ""))


def test_a_profile_shows_both_losses_and_leaves_nothing(phantom, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["profile", "--train-data", f"roco:{phantom}", "--method", "filip", *SMALL])
    title, header, *rows = capsys.readouterr().out.splitlines()
    for words in ("filip on tiny", "16 pairs per step", "2 steps after 3"):
        assert words in title
    assert header.split() == ["fused:", "auto", "reference", "difference"]
    assert [row[:18].strip() for row in rows] == ["step time, median", "pairs/s", "peak memory"]
    for row in rows:
        fused, reference, difference = (row[i : i + 14] for i in (18, 32, 46))
        assert _number(fused) > 0
        assert _number(reference) > 0
        assert difference.endswith("%")
    assert list(tmp_path.iterdir()) == []


def test_the_measurement_counts_steps_after_the_warm_up(phantom, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "medfast.trainer.Trainer.train_step", lambda self, step: sizes.append(sum(map(len, step)))
    )
    config = TrainConfig(train_data=f"roco:{phantom}", batch_size=40, workers=0)
    found = profile.measure(config, 4)
    assert sizes == [40] * (profile.WARM_UP + 4)  # over the end of an epoch of two batches
    assert found.step_s < 0.1
    assert 0 < found.pairs_per_s < 40 / found.step_s
    assert found.memory_mb >= 0


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
    ],
)
def test_what_cannot_be_profiled_is_refused_in_one_sentence(phantom, capsys, argv, says):
    with pytest.raises(SystemExit) as stopped:
        profile.main(["--train-data", f"roco:{phantom}", *argv])
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("medfast.profile: error: ")
    assert says in line


def test_images_that_cannot_be_read_are_not_waited_for_forever(own_phantom):
    for image in (own_phantom / "train" / "radiology" / "images").iterdir():
        image.write_bytes(b"")
    config = TrainConfig(train_data=f"roco:{own_phantom}", workers=0, max_bad_samples=1.0)
    with pytest.raises(profile.UsageError, match="nothing to time"):
        profile.measure(config, 1)
