import json
import os
import subprocess
import sys

import pytest

from benchmarks import ranks


def test_the_losses_over_ranks_are_checked_and_timed_by_one_command(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "-m", "benchmarks.ranks", "--device", "cpu", "--pairs", "64", "--features"]
    command += ["32", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=240)
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert {(row["loss"], row["comm"]) for row in found["checks"]} >= {
        (loss, comm)
        for loss in ("clip", "siglip", "simclr", "local_alignment", "filip", "sparc")
        for comm in ranks.COMMS
    }
    assert all(0 <= row["error"] <= ranks.TOLERANCE for row in found["checks"])
    assert {row["variant"] for row in found["timings"]} >= {"ring", "gather"}
    assert all(row["seconds"] > 0 and row["sent_bytes"] > 0 for row in found["timings"])
    (merged,) = found["merges"]
    assert merged.pop("seconds") > 0
    assert 0 < merged.pop("error") < ranks.MERGE_TOLERANCE
    assert merged == {"entries": 128, "comm": "ring", "is_alike": True}
    assert found["symmetric_left_out"] == "it is for GPUs"


RIGHT = {"error": 0.0, "is_alike": True}


@pytest.mark.parametrize(
    ("checks", "merges"),
    [
        ([{"error": 2 * ranks.TOLERANCE}], [RIGHT]),
        ([RIGHT], [RIGHT | {"error": 2 * ranks.MERGE_TOLERANCE}]),
        ([RIGHT], [RIGHT | {"is_alike": False}]),
    ],
)
def test_a_wrong_loss_or_merge_fails_the_command(monkeypatch, checks, merges):
    """The processes end with an error where the largest error is above the tolerance."""
    names = {"loss": "clip", "comm": "ring", "entries": 1, "seconds": 1.0}
    for name, rows in (("check", checks), ("measure", []), ("merge", merges)):
        monkeypatch.setattr(ranks, name, lambda *_, rows=rows: [names | row for row in rows])
    monkeypatch.setattr(ranks.results, "write", lambda *_, **__: "nothing")

    class Alone(ranks.Processes):
        def __init__(self):
            super().__init__()
            self.ring = object()

    monkeypatch.setattr(ranks, "join", lambda **_: Alone())
    with pytest.raises(SystemExit) as stopped:
        ranks.main(["--device", "cpu", "--pairs", "64"])
    assert stopped.value.code == 1
