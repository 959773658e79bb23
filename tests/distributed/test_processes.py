"""What the processes of a run agree on, and what each hears of the others' mistakes."""

import dataclasses
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from launch import SERVER, run
from test_steps_over_ranks import Case, make_batch, make_step

from medfast.config import TrainConfig, for_processes
from medfast.data.skipped import Skipped, SkippedSamples
from medfast.data.tokens import Tokenizer
from medfast.distributed import processes as module
from medfast.distributed.processes import Processes
from medfast.errors import SharedError, UsageError
from medfast.run_folder import RunFolder
from medfast.trainer import Trainer


def joined(rank):
    """Return the processes of a group that has been made already."""
    from torch.distributed import distributed_c10d

    store = distributed_c10d._get_default_store()
    return Processes(rank, torch.distributed.get_world_size(), rank, "auto", store)


def said(action):
    """Return the sentence of the mistake that `action` finds, and whether all find it."""
    try:
        action()
    except UsageError as error:
        return str(error), isinstance(error, SharedError)
    return None


def _refuse(*_):
    raise UsageError("the disk is full.")


def _agreements(rank):
    group = joined(rank)
    found = {
        "numbers": group.numbers(rank, 10 * rank),
        "objects": group.objects({"rank": rank}),
        "first": group.by_first(lambda: f"by {rank}"),
        "from first": group.from_first(rank),
        "equal": said(lambda: group.require_equal("settings", {"lr": 1.0})),
        "not equal": said(lambda: group.require_equal("settings", {"lr": 1.0 + rank, "wd": 0})),
        "first fails": said(lambda: group.by_first(_refuse)),
    }

    def one_fails():
        with group.together():
            if rank == 1:
                _refuse()

    def all_fail():
        with group.together():
            _refuse()

    return {**found, "one fails": said(one_fails), "all fail": said(all_fail)}


def test_processes_agree_and_share_mistakes(tmp_path):
    first, second = run(2, _agreements, tmp_path)
    assert first == second
    assert first == {
        "numbers": [[0, 0], [1, 10]],
        "objects": [{"rank": 0}, {"rank": 1}],
        "first": "by 0",
        "from first": 0,
        "equal": None,
        "not equal": (
            "the processes of a run must have the same settings: lr is 1.0 on rank 0 and 2.0 on "
            "rank 1.",
            True,
        ),
        "first fails": ("the disk is full.", True),
        "one fails": ("rank 1: the disk is full.", True),
        "all fail": ("the disk is full.", True),
    }


def test_a_process_alone_agrees_with_itself():
    alone = Processes()
    assert alone.numbers(3, 4) == [[3, 4]]
    assert alone.objects("a") == ["a"]
    assert alone.by_first(lambda: 5) == 5
    alone.require_equal("settings", {"lr": 1.0})
    alone.part()
    with pytest.raises(SharedError, match="the disk is full"), alone.together():
        _refuse()


def _met(store, world, ranks, timeout=30.0):
    """Return the prefixes that processes agree on, of which the first comes before the others."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        found = []
        for rank in ranks:
            found.append(pool.submit(module._meet, store, rank, world, "run", timeout))
            time.sleep(0.1)
        return {each.result() for each in found}


def test_restarted_processes_do_not_take_what_others_left_in_the_store_for_theirs():
    store = torch.distributed.HashStore()
    (before,), (after,) = (_met(store, 3, (0, 1, 2)) for _ in range(2))
    assert before != after


def test_processes_that_do_not_come_are_named():
    with pytest.raises(UsageError, match="rank 2, 3, of 4 that torchrun announced, did not come"):
        _met(torch.distributed.HashStore(), 4, (0, 1), timeout=0.3)


def _missing(rank, timeout):
    module._ROLL_CALL = 1.0
    group = joined(rank)
    if rank == 2:
        torch.distributed.barrier()  # as the others, which then find it gone
        return None

    def exchange():
        torch.distributed.barrier()
        with group.naming_the_lost():
            raise RuntimeError("[gloo] Timed out waiting 5000ms for recv operation to complete")

    return said(exchange)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_exchange_that_cannot_run_is_refused_by_its_flag(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    met = iter([(torch.distributed.HashStore(), 0, 2)])
    monkeypatch.setattr(module.dist, "rendezvous", lambda *_, **__: met)
    monkeypatch.setattr(module.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(module, "_meet", lambda *_: "here")
    monkeypatch.setattr(module, "has_joined", False)
    with pytest.raises(SharedError, match="--comm: comm='symmetric' cannot run"):
        module.join(1.0, "symmetric")


def test_who_does_not_answer_is_named(tmp_path):
    told = run(3, _missing, tmp_path, 5.0)
    assert told[0] == told[1]
    assert told[0][0] == (
        "the process of rank 2 has ended or hangs: it did not answer ([gloo] Timed out waiting "
        "5000ms for recv operation to complete)."
    )
    # Each tells it, as it may be the only one that can.
    assert told[0][1] is False


def _loses_rank_1(rank, folder):
    module._ROLL_CALL = 1.0
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=4)
    group = joined(rank)
    group.numbers(0)
    if rank == 1:
        os._exit(1)

    def exchange():
        with group.naming_the_lost():
            group.numbers(0)

    (folder / str(rank)).write_text(said(exchange)[0])


def test_who_waits_for_a_live_process_is_not_taken_for_lost(tmp_path):
    """Only the neighbours of one that ended learn of it at once, and the others by their end."""
    group = [SERVER.Process(target=_loses_rank_1, args=(rank, tmp_path)) for rank in range(4)]
    for process in group:
        process.start()
    for process in group:
        process.join()
    for rank in (0, 2, 3):
        assert "the process of rank 1 has ended" in (tmp_path / str(rank)).read_text()


def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match="shapes"), Processes().naming_the_lost():
        raise RuntimeError("shapes differ")


@dataclasses.dataclass
class Batches:
    """A loader of ready batches."""

    batches: list

    def __len__(self):
        return 2

    def epoch(self, epoch, start=0):
        yield from self.batches[start:]


def make_trainer(rank, phantom, folder, path, change):
    """Return one of two trainers, `change` having had the batches of rank 1."""
    group, tokenizer = joined(rank), Tokenizer.load(folder, 48)
    case = Case("clip", "auto", "vit")
    step = make_step(case, tokenizer, group.ring)
    batches = [make_batch(phantom, tokenizer, case, 4) for _ in range(2)]
    if rank == 1:
        batches = change(batches, step)
    path.mkdir(exist_ok=True)
    return Trainer(
        TrainConfig(batch_size=4, epochs=1, warmup=0, log_every=1),
        step.model,
        step.method,
        Batches(batches),
        RunFolder(path, rank),
        SkippedSamples(path / "skipped.jsonl", 100, 0.02, writes=rank == 0),
        torch.device("cpu"),
        validate=dict,
        processes=group,
    )


def _without_pairs(batch, *skipped):
    parts = ("images", "ids", "mask", "word_mask", "group", "index")
    none = {name: getattr(batch, name)[:0] for name in parts}
    return dataclasses.replace(batch, **none, skipped=skipped)


def _ends_early(batches, step):
    return batches[:1]


def _is_not_finite(batches, step):
    with torch.no_grad():
        step.model.image_projection.weight.fill_(torch.nan)
    return batches


def _is_damaged(batches, step):
    return [_without_pairs(batches[0], Skipped("a", "a.jpg", "it is cut off")), batches[1]]


def _are_damaged(batches, step):
    samples = [Skipped(str(i), f"{i}.jpg", "it is cut off") for i in range(3)]
    return [_without_pairs(batches[0], *samples), batches[1]]


CHANGES = (_ends_early, _is_not_finite, _is_damaged, _are_damaged)


def _epochs(rank, phantom, folder, path):
    logging.getLogger("medfast").propagate = False
    found = {}
    for change in CHANGES:
        trainer = make_trainer(rank, phantom, folder, path / change.__name__, change)
        mistake = said(lambda trainer=trainer: trainer._train_epoch(_Bar()))
        found[change.__name__] = (mistake, trainer.step, trainer.samples)
    return found


class _Bar:
    def update(self):
        pass


def test_what_befalls_one_process_stops_or_spares_all(tmp_path, phantom, tokenizer):
    folder = tmp_path / "tokenizer"
    tokenizer.save(folder)
    first, second = run(2, _epochs, tmp_path, phantom, folder, tmp_path)
    assert first == second
    mistake, steps, _ = first["_ends_early"]
    assert mistake[0].startswith("the data of rank 1 ended within epoch 1, before those of")
    assert (mistake[1], steps) == (True, 1)
    mistake, _, _ = first["_is_not_finite"]
    assert "the loss is nan at step 1" in mistake[0]
    assert "; first the features of rank 1 alone were not finite: lower --lr" in mistake[0]
    assert mistake[1] is True
    # A step without pairs of one process is left out by all, and the sample is listed.
    assert first["_is_damaged"] == (None, 1, 8)
    assert (tmp_path / "_is_damaged" / "skipped.jsonl").read_text().count("\n") == 1
    mistake, steps, _ = first["_are_damaged"]
    assert "3 of 100 samples could not be used" in mistake[0]
    assert (mistake[1], steps) == (True, 0)


@pytest.mark.parametrize(
    ("batch_size", "accum_freq", "was", "now", "expected"),
    [
        (8, 1, 2, 2, (8, 1)),
        (8, 1, 2, 1, (8, 2)),
        (8, 1, 2, 4, (4, 1)),
        (8, 2, 2, 4, (8, 1)),
        (8, 2, 3, 1, (8, 6)),
        (8, 3, 1, 4, (6, 1)),
        (9, 1, 2, 1, (9, 2)),
    ],
)
def test_other_processes_take_the_same_pairs_per_step(batch_size, accum_freq, was, now, expected):
    config = TrainConfig(batch_size=batch_size, accum_freq=accum_freq)
    found = for_processes(config, was, now)
    assert (found.batch_size, found.accum_freq) == expected
    assert now * found.batch_size * found.accum_freq == was * batch_size * accum_freq
    assert found.batch_size <= batch_size


@pytest.mark.parametrize(("was", "now"), [(2, 3), (2, 16)])
def test_pairs_that_cannot_be_shared_out_are_refused(was, now):
    with pytest.raises(UsageError, match=f"16 pairs per step, which {now} processes .* use 1 or 2"):
        for_processes(TrainConfig(batch_size=8), was, now)
