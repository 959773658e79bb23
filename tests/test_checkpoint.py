import os
import subprocess
import sys

import pytest
import torch

from medfast import checkpoint
from medfast.errors import UsageError

STATE = {
    **dict.fromkeys(checkpoint.KEYS, 0),
    **{"epoch": 1, "state_dict": {"w": torch.ones(2)}, "config": {"lr": 0.1}},
}


def test_a_checkpoint_comes_back_and_the_oldest_go(tmp_path):
    for epoch in (1, 2, 9, 10):
        checkpoint.save(tmp_path, {**STATE, "epoch": epoch}, keep=2)
    assert [p.name for p in checkpoint.listing(tmp_path)] == ["epoch_9.pt", "epoch_10.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_10.pt", "epoch_9.pt"]
    state = checkpoint.load(tmp_path / "epoch_10.pt")
    assert state["epoch"] == 10
    assert torch.equal(state["state_dict"]["w"], torch.ones(2))


def test_a_run_that_went_back_keeps_what_it_writes(tmp_path):
    for epoch in (3, 1):
        checkpoint.save(tmp_path, {**STATE, "epoch": epoch}, keep=1)
    assert [p.name for p in checkpoint.listing(tmp_path)] == ["epoch_1.pt", "epoch_3.pt"]


def test_checkpoints_within_an_epoch_lie_between_those_of_its_ends(tmp_path):
    for epoch, within, step in ((0, 5, 5), (1, 0, 10), (1, 5, 15), (1, 9, 109), (2, 0, 120)):
        state = {**STATE, "epoch": epoch, "epoch_step": within, "step": step}
        checkpoint.save(tmp_path, state, keep=9)
    assert [p.name for p in checkpoint.listing(tmp_path)] == [
        *("epoch_0_step_5.pt", "epoch_1.pt", "epoch_1_step_15.pt", "epoch_1_step_109.pt"),
        "epoch_2.pt",
    ]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path, STATE, keep=1)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        UsageError, match=r"cannot be written \(No space left .*epoch_1.pt is whole"
    ):
        checkpoint.save(tmp_path, {**STATE, "epoch": 2}, keep=1)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_is_told_as_such(tmp_path):
    """In a process that may write no more than so many bytes to a file, as on a full disk."""
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from medfast import checkpoint\n"
        "from medfast.errors import UsageError\n"
        "state = {'epoch': 1, 'epoch_step': 0, 'w': torch.zeros(1000)}\n"
        "checkpoint.save(Path(sys.argv[1]), state, keep=1)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    state |= {'epoch': 2, 'w': torch.zeros(10**6)}\n"
        "    checkpoint.save(Path(sys.argv[1]), state, keep=1)\n"
        "except UsageError as error:\n"
        "    print(error)"
    )
    said = subprocess.check_output([sys.executable, "-c", code, str(tmp_path)], text=True)
    assert "epoch_2.pt cannot be written (File too large); epoch_1.pt is whole" in said
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_1.pt"]


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"epoch_3\.pt: there is no such checkpoint"):
        checkpoint.load(tmp_path / "epoch_3.pt")


def test_a_truncated_checkpoint_names_the_older_one(tmp_path):
    checkpoint.save(tmp_path, STATE, keep=2)
    path = checkpoint.save(tmp_path, {**STATE, "epoch": 2}, keep=2)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UsageError, match=r"epoch_2\.pt is damaged or .* older one: epoch_1\.pt"):
        checkpoint.load(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"state_dict": Evil(), "config": {}}, tmp_path / "epoch_1.pt")
    with pytest.raises(UsageError, match="is damaged"):
        checkpoint.load(tmp_path / "epoch_1.pt")
    assert not (tmp_path / "made").exists()


def test_another_projects_checkpoint_is_refused(tmp_path):
    others = {key: STATE[key] for key in checkpoint.KEYS - {"optimizer", "random"}}
    for state, lacks in (
        ({"model": {}}, "config, data, epoch"),
        ([1], "config, data, epoch"),
        (others, "optimizer, random"),
    ):
        torch.save(state, tmp_path / "epoch_1.pt")
        with pytest.raises(
            UsageError, match=f"not a checkpoint of a medfast run: it lacks {lacks}"
        ):
            checkpoint.load(tmp_path / "epoch_1.pt")


def test_latest_is_the_named_run_or_the_newest(tmp_path):
    for time, name in enumerate(("new", "old", "older")):
        path = tmp_path / name / "checkpoints"
        path.mkdir(parents=True)
        saved = checkpoint.save(path, STATE, keep=1)
        os.utime(saved, (1000 - time, 1000 - time))
    for name, found in ((None, "new"), ("old", "old")):
        path, state = checkpoint.find("latest", tmp_path, name)
        assert path.parent.parent.name == found
        assert state["epoch"] == 1
        assert checkpoint.find("auto", tmp_path, name)[0] == path
    assert checkpoint.find(str(path), tmp_path, None)[0] == path


@pytest.mark.parametrize("asked", ["latest", "auto"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, asked, caplog):
    folder = tmp_path / "a" / "checkpoints"
    folder.mkdir(parents=True)
    for epoch in (1, 2, 3):
        newest = checkpoint.save(folder, {**STATE, "epoch": epoch}, keep=3)
    for damaged, left in ((newest, 2), (folder / "epoch_2.pt", 1)):
        damaged.write_bytes(damaged.read_bytes()[:-200])
        caplog.clear()
        path, state = checkpoint.find(asked, tmp_path, "a")
        assert path.name == f"epoch_{left}.pt"
        assert state["epoch"] == left
        assert f"{damaged.name} is damaged" in caplog.text
    (folder / "epoch_1.pt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"epoch_1\.pt is damaged"):
        checkpoint.find(asked, tmp_path, "a")


def test_auto_begins_where_there_is_nothing_yet(tmp_path):
    assert checkpoint.find("auto", tmp_path, "a") is None


@pytest.mark.parametrize("name", [None, "x"])
def test_latest_of_nothing_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match="has no checkpoint; start without --resume"):
        checkpoint.find("latest", tmp_path, name)


def test_a_checkpoint_that_does_not_know_its_data_is_refused(tmp_path):
    torch.save({key: STATE[key] for key in checkpoint.KEYS - {"data"}}, tmp_path / "epoch_1.pt")
    with pytest.raises(UsageError, match="it lacks data"):
        checkpoint.load(tmp_path / "epoch_1.pt")
