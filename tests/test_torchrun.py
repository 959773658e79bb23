"""`torchrun -m medfast.train`: several processes give the run of one, and survive faults."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from medfast import checkpoint, train

SMALL = [
    *("--epochs", "2", "--workers", "0", "--warmup", "2", "--force-image-size", "32"),
    *("--loader", "torch", "--precision", "fp32", "--log-every", "1", "--lr", "1e-4"),
]
# What torchrun waits for, at most; only a fault takes long.
PATIENCE = 240


def _argv(phantom, logs, name, *more):
    return ["--train-data", f"roco:{phantom}", "--logs", str(logs), "--name", name, *SMALL, *more]


def _environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in more.items()}}


def start(world, argv, *options):
    """Begin a run under torchrun; its output is read by `end`."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += [] if "--nnodes" in options else ["--standalone"]
    # torchrun before Python 3.12 would take --logs for an option of its own without "--".
    command += ["--nproc-per-node", str(world), *options, "-m", "--", "medfast.train", *argv]
    return subprocess.Popen(
        command,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # With its processes it can be ended whatever happens.
        start_new_session=True,
    )


def end(job):
    """Return the exit code and what was said."""
    try:
        said = job.communicate(timeout=PATIENCE)[1]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    return job.returncode, said


def torchrun(world, argv, *options):
    code, said = end(start(world, argv, *options))
    assert code == 0, said
    return said


def by_hand(rank, world, port, argv):
    """Begin one of the processes of a run as torchrun would."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "-m", "medfast.train", *argv],
        env=_environment(MASTER_ADDR="127.0.0.1", **names),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def rows(run, kind="train"):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def weights(run, epoch=2):
    state = checkpoint.load(run / "checkpoints" / f"epoch_{epoch}.pt")
    found = {**state["state_dict"], **{f"method {k}": x for k, x in state["method"].items()}}
    # Its rows are in the order of ranks, then of their batches.
    return {**found, "method bank.features": found["method bank.features"].sum(0)}


def assert_close(found, expected):
    """Weights differ by less than one step of many moves them: 1e-4, the learning rate."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        error = (found[name].double() - want.double()).square().mean().sqrt()
        size = want.double().square().mean().sqrt()
        assert error <= 2e-5 + 1e-3 * size, name


def wait_for(job, run, step):
    """Return when a run has taken some step."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and job.poll() is None:
        if (run / "metrics.jsonl").exists() and any(row["step"] >= step for row in rows(run)):
            return
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    raise AssertionError(job.communicate()[1])


def processes_of(job):
    """Return the ids of the training processes of a torchrun, by rank."""
    found = {}
    for folder in os.listdir("/proc"):
        try:
            with open(f"/proc/{folder}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{folder}/environ") as file:
                names = dict(item.partition("=")[::2] for item in file.read().split("\0"))
        except (OSError, ValueError):
            continue
        if parent == job.pid and "RANK" in names:
            found[int(names["RANK"])] = int(folder)
    return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="module")
def alone(phantom, tmp_path_factory):
    """The run of one process to which those of several are compared."""
    logs = tmp_path_factory.mktemp("logs")
    _train_here(_argv(phantom, logs, "alone", "--method", "declip", "--batch-size", "16"))
    return logs / "alone"


def _train_here(argv):
    """Train in this process, with one thread as the others have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.main(argv)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(phantom, tmp_path_factory):
    """The run of two processes that was never stopped."""
    logs = tmp_path_factory.mktemp("logs")
    argv = _argv(phantom, logs, "two", "--method", "declip", "--batch-size", "8")
    torchrun(2, argv)
    return logs / "two"


def test_two_processes_give_the_run_of_one(alone, undisturbed):
    for kind, name in (("train", "losses"), ("validation", "metrics")):
        ours, theirs = rows(undisturbed, kind), rows(alone, kind)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for row, other in zip(ours, theirs, strict=True):
            assert row[name] == pytest.approx(other[name], rel=3e-4, abs=1e-4)
    assert rows(undisturbed)[-1]["samples"] == rows(alone)[-1]["samples"] == 192
    assert_close(weights(undisturbed), weights(alone))
    # The first process alone wrote.
    files = [sorted(path.name for path in run.iterdir()) for run in (undisturbed, alone)]
    assert files[0] == files[1]


def test_parts_of_weights_of_batches_and_of_activations_change_nothing(phantom, tmp_path):
    more = ("--method", "declip", "--batch-size", "4", "--accum-freq", "2", "--comm", "ring")
    more += ("--sharding", "full", "--grad-checkpointing")
    torchrun(2, _argv(phantom, tmp_path, "sharded", *more))
    # Batch norm of the towers has the statistics of a part: it must be the same part.
    train.main(_argv(phantom, tmp_path, "one", *more[:2], "--batch-size", "8", "--accum-freq", "2"))
    for row, other in zip(rows(tmp_path / "sharded"), rows(tmp_path / "one"), strict=True):
        assert row["losses"] == pytest.approx(other["losses"], rel=3e-4, abs=1e-4)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-3)
    assert_close(weights(tmp_path / "sharded"), weights(tmp_path / "one"))


def _kill_and_compare(phantom, tmp_path, undisturbed, rng):
    """Kill a process at some moment under torchrun; the run must end as if nothing had been."""
    argv = _argv(phantom, tmp_path, "two", "--method", "declip", "--batch-size", "8")
    job = start(2, [*argv, "--save-steps", "2"], "--max-restarts", "1")
    run = tmp_path / "two"
    wait_for(job, run, rng.randint(1, 10))
    time.sleep(rng.uniform(0, 0.3))
    victim = rng.randrange(2)
    os.kill(processes_of(job)[victim], signal.SIGKILL)
    code, said = end(job)
    assert code == 0, said
    # The other one found it gone.
    assert f"the process of rank {victim} has ended or hangs" in said
    if "resumed after epoch" in said:  # else the run began in a new folder
        assert (run / "rank_1.log").exists() == (victim == 0)
        if victim == 0:
            assert "the process of rank 0 has ended" in (run / "rank_1.log").read_text()
    # Before there is a checkpoint a run begins again.
    assert said.count("2 processes train together") == 2
    found, expected = weights(run), weights(undisturbed)
    for name, want in expected.items():
        assert torch.equal(found[name], want), name
    assert [row["step"] for row in rows(run)] == list(range(1, 13))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_process_is_started_again_to_the_same_weights(
    phantom, tmp_path, undisturbed, seed
):
    _kill_and_compare(phantom, tmp_path, undisturbed, random.Random(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 22))
def test_twenty_killed_processes_change_nothing(phantom, tmp_path, undisturbed, seed):
    _kill_and_compare(phantom, tmp_path, undisturbed, random.Random(seed))


@pytest.mark.slow
def test_nodes_that_count_restarts_apart_go_on_together(phantom, tmp_path, undisturbed):
    """torchrun counts a restart on the node whose process failed, and not always on the others."""
    argv = _argv(phantom, tmp_path, "two", "--method", "declip", "--batch-size", "8")
    options = ["--nnodes", "2", "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1"]
    options += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--max-restarts", "1"]
    nodes = [start(1, [*argv, "--save-steps", "2"], *options) for _ in range(2)]
    wait_for(nodes[0], tmp_path / "two", 3)
    os.kill(processes_of(nodes[1])[0], signal.SIGKILL)
    ends = [end(node) for node in nodes]
    said = "".join(text for _, text in ends)
    assert [code for code, _ in ends] == [0, 0], said
    # At the first try.
    assert said.count("resumed after epoch") == 1
    assert "did not find one another" not in said
    for name, want in weights(undisturbed).items():
        assert torch.equal(weights(tmp_path / "two")[name], want), name


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bitwise(
    phantom, tmp_path, undisturbed, alone, world
):
    """SIGTERM to one process, as before a preemption."""
    batch = str(16 // world)
    argv = _argv(phantom, tmp_path, "a", "--method", "declip", "--batch-size", batch)
    job = by_hand(0, 1, 0, argv) if world == 1 else start(world, argv)
    wait_for(job, tmp_path / "a", 3)
    os.kill(job.pid if world == 1 else processes_of(job)[-1], signal.SIGTERM)
    code, said = end(job)
    # What torchrun and SLURM take for a process that was ended, and start again.
    assert code == 143 if world == 1 else re.search(r"exitcode *: 143", said)
    step = int(re.search(r"asked to stop \(SIGTERM\) and saved at step (\d+)", said)[1])
    assert 3 <= step < 12
    newest = checkpoint.listing(tmp_path / "a" / "checkpoints")[-1]
    assert checkpoint.load(newest)["step"] == step
    if world == 1:
        _train_here([*argv, "--resume", "auto"])
    else:
        torchrun(world, [*argv, "--resume", "auto"])
    for name, want in weights({1: alone, 2: undisturbed}[world]).items():
        assert torch.equal(weights(tmp_path / "a")[name], want), name


def test_another_number_of_processes_goes_on_with_the_same_steps(phantom, tmp_path, alone):
    run = shutil.copytree(alone, tmp_path / "alone")
    (run / "checkpoints" / "epoch_2.pt").unlink()
    # With the --batch-size of its beginning: as that the settings of the run stay.
    argv = _argv(phantom, tmp_path, "alone", "--method", "declip", "--batch-size", "16")
    said = torchrun(2, [*argv, "--resume", "auto"])
    assert "2 processes go on in place of 1, with 8 pairs in 1 batches each" in said
    assert "Not bitwise" in said
    for row, other in zip(rows(run), rows(alone), strict=True):
        assert row["losses"] == pytest.approx(other["losses"], rel=3e-4, abs=1e-4)
    assert_close(weights(run), weights(alone))


def test_a_process_that_hangs_is_named_in_bounded_time(phantom, tmp_path):
    argv = _argv(phantom, tmp_path, "two", "--method", "clip", "--batch-size", "8")
    job = start(2, [*argv, "--timeout", "8", "--epochs", "50"])
    wait_for(job, tmp_path / "two", 3)
    hanging = processes_of(job)[1]
    os.kill(hanging, signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        # torchrun waits 30 seconds for the one that hangs to end.
        code, said = end(job)
    finally:
        if os.path.exists(f"/proc/{hanging}"):
            os.kill(hanging, signal.SIGKILL)
    assert code != 0
    assert "the process of rank 1 has ended or hangs: it did not answer" in said
    assert time.monotonic() - stopped < 90


def test_processes_with_other_settings_are_told_which(phantom, tmp_path):
    port = free_port()
    argv = _argv(phantom, tmp_path, "two", "--batch-size", "8")
    jobs = [by_hand(0, 2, port, argv), by_hand(1, 2, port, [*argv, "--seed", "7"])]
    said = [job.communicate(timeout=PATIENCE)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [2, 2]
    assert "must have the same settings: seed is 0 on rank 0 and 7 on rank 1" in said[0]
    assert "error" not in said[1]
    assert not (tmp_path / "two").exists()


def test_a_process_that_never_comes_is_reported(phantom, tmp_path):
    job = by_hand(0, 2, free_port(), [*_argv(phantom, tmp_path, "two"), "--timeout", "3"])
    said = job.communicate(timeout=PATIENCE)[1]
    assert job.returncode == 2
    assert "did not find one another within --timeout 3 seconds" in said


def test_a_mistake_is_told_once(tmp_path):
    argv = ["--train-data", "roco:/nowhere", "--logs", str(tmp_path)]
    code, said = end(start(2, argv))
    assert code != 0
    told = [line for line in said.splitlines() if line.startswith("medfast.train: error:")]
    assert len(told) == 1, said
    assert "there is no /nowhere. Get ROCO" in told[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--method", "filipp"], "Did you mean 'filip'?"),
        (["--lrr", "1"], "unknown argument '--lrr'"),
        ([], "torchrun --max-restarts needs a --name"),
    ],
)
def test_the_first_process_tells_a_mistake_in_the_command(argv, says, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as stopped:
            train.main(argv)
        assert stopped.value.code == 2
        told = capsys.readouterr().err
        assert says in told if rank == 0 else told == ""


def test_a_profile_counts_what_processes_send(phantom, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "-m", "medfast.profile", "--train-data", f"roco:{phantom}", "--comm", "ring"]
    command += ["--method", "clip", "--batch-size", "8", "--steps", "2", "--workers", "0"]
    command += ["--force-image-size", "32", "--precision", "fp32", "--loader", "torch"]
    command += ["--out", str(tmp_path / "profile")]
    said = subprocess.check_output(command, env=_environment(), text=True, timeout=PATIENCE)
    assert "2 x 8 pairs per step" in said
    (sent,) = (line for line in said.splitlines() if line.startswith("sent per step  "))
    # 8 x 128 features in fp32 to the other, their gradient back, and statistics of batch norm.
    assert 2 * 8 * 128 * 4 / 1e6 <= float(sent.split()[3]) < 0.05
    assert "open_clip's all-gather of global features in fp32, and back: 0.02 MB" in said


def test_a_run_of_one_process_refuses_what_is_for_several(phantom, tmp_path, refusal):
    said = refusal(_argv(phantom, tmp_path, "a", "--sharding", "full"))
    assert "--sharding full is for several processes; start them with torchrun" in said
    said = refusal(["--sharding", "full", "--optimizer", "lamb"])
    assert "--optimizer lamb needs whole weights" in said
    said = refusal(["--sharding", "full", "--precision", "amp"])
    assert "--precision amp needs gradients that are all whole; use amp_bf16" in said
    assert "--resume must be with a --name" in refusal(["--resume", "auto"])
