import os

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


def test_checkpoints_within_an_epoch_lie_between_those_of_its_ends(tmp_path):
    for epoch, batch, step in ((0, 5, 5), (1, 0, 10), (1, 5, 15), (1, 9, 109), (2, 0, 120)):
        checkpoint.save(tmp_path, {**STATE, "epoch": epoch, "batch": batch, "step": step}, keep=9)
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
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, STATE, keep=1)
    assert path.read_bytes() == before
    assert checkpoint.listing(tmp_path) == [path]


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
    others = {key: STATE[key] for key in checkpoint.KEYS - {"optimizer", "rng"}}
    for state, lacks in (
        ({"model": {}}, "batch, config, data, epoch"),
        ([1], "batch, config, data"),
        (others, "optimizer, rng"),
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
    assert checkpoint.find("latest", tmp_path, None).parent.parent.name == "new"
    assert checkpoint.find("latest", tmp_path, "old").parent.parent.name == "old"
    assert checkpoint.find("a/b.pt", tmp_path, None).name == "b.pt"


@pytest.mark.parametrize("name", [None, "x"])
def test_latest_of_nothing_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match="has no checkpoint; start without --resume"):
        checkpoint.find("latest", tmp_path, name)


def test_a_checkpoint_that_does_not_know_its_data_is_refused(tmp_path):
    torch.save({key: STATE[key] for key in checkpoint.KEYS - {"data"}}, tmp_path / "epoch_1.pt")
    with pytest.raises(UsageError, match="it lacks data"):
        checkpoint.load(tmp_path / "epoch_1.pt")
