"""The largest batch that fits, tried or predicted."""

import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

from medfast.data.loader import Batch
from medfast.data.skipped import Skipped
from medfast.data.tokens import Masked, Tokens
from medfast.profile import largest
from medfast.profile.largest import (
    MOST,
    extrapolated,
    predict_largest,
    resized,
    search,
    try_largest,
)
from medfast.profile.memory import OutOfMemoryError, free_memory, naming_lack


@pytest.mark.parametrize("start", [2, 64, 1000])
@pytest.mark.parametrize("limit", [2, 3, 63, 64, 65, 1000, 5000])
def test_the_search_ends_within_a_sixteenth_below_the_limit(start, limit):
    tried = []
    good, bad = search(lambda pairs: tried.append(pairs) or pairs <= limit, start)
    assert good <= limit < bad
    assert bad - good <= max(1, good // 16)
    assert len(tried) == len(set(tried)) < 30


def test_the_search_says_that_none_fits_or_that_all_do():
    assert search(lambda pairs: False, 64) == (0, 2)
    assert search(lambda pairs: True, 64) == (MOST, None)
    assert search(lambda pairs: True, 10 * MOST) == (MOST, None)


@pytest.mark.parametrize(("impl", "most"), [("reference", 16 * 32), ("auto", MOST)])
def test_a_parabola_is_not_trusted_far_beyond_what_was_measured(batch, monkeypatch, impl, most):
    sizes = []
    trainer = SimpleNamespace(
        train_step=lambda batches: sizes.append(len(batches[0])),
        parts=1,
        device=torch.device("cpu"),
        config=SimpleNamespace(batch_size=32, fused_loss=impl),
    )
    monkeypatch.setattr(largest, "forget_peak_memory", lambda device: 0)
    monkeypatch.setattr(largest, "peak_memory", lambda device: 2**21 * sizes[-1])
    monkeypatch.setattr(largest, "memory_for_steps", lambda device: 2**50)
    found = predict_largest(trainer, batch)
    assert sizes == [8, 8, 16, 32]
    assert (found.pairs, found.too_many) == (most, None)


def test_a_line_goes_on_straight_and_a_parabola_bends():
    line = [100 + 3 * n for n in (4, 8, 16)]
    for has_square in (False, True):
        assert extrapolated([4, 8, 16], line, has_square)(1000) == pytest.approx(3100)
    square = [100 + 3 * n + 2 * n**2 for n in (4, 8, 16)]
    assert extrapolated([4, 8, 16], square, True)(1000) == pytest.approx(2_003_100)
    assert extrapolated([4, 8, 16], square, False)(32) == pytest.approx(square[-1] + 16 * 51)
    # Peaks that bend downwards are noise: memory does not shrink.
    assert extrapolated([4, 8, 16], [10, 20, 30], True)(32) == pytest.approx(50)


@pytest.mark.parametrize(("sizes", "peaks"), [([2], [5]), ([2, 4], [5, 5]), ([2, 4, 8], [1, 9, 8])])
def test_peaks_that_do_not_grow_tell_nothing(sizes, peaks):
    assert extrapolated(sizes, peaks, has_square=False) is None


@pytest.fixture
def batch():
    """Three pairs with everything that a method may ask for; their ids are their numbers."""
    ids = torch.arange(3)[:, None].repeat(1, 5)
    mask, number = ids >= 0, torch.arange(3)
    return Batch(
        *(torch.rand(3, 3, 2, 2), ids, mask, mask, number, number),
        views=(torch.rand(3, 3, 2, 2),),
        texts=(Tokens(ids, mask, mask),),
        masked=Masked(ids, ids),
        skipped=(Skipped("a", "b", "c"),),
    )


@pytest.mark.parametrize("pairs", [1, 3, 8])
def test_a_batch_of_another_size_has_the_same_pairs_over_and_over(batch, pairs):
    ids = batch.ids
    found = resized(batch, pairs)
    rows = [n % 3 for n in range(pairs)]
    assert len(found) == pairs
    assert found.skipped == ()
    assert found.ids[:, 0].tolist() == found.masked.labels[:, 0].tolist() == rows
    assert torch.equal(found.views[0], batch.views[0][rows])
    assert torch.equal(found.texts[0].ids, ids[rows])


def test_trying_goes_on_after_a_step_that_did_not_fit_and_keeps_nothing_of_it(batch, monkeypatch):
    left = []

    class Activations:
        pass

    def empty_cache():
        assert [x() for x in left if x() is not None] == []

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)

    def train_step(batches):
        assert [len(own) for own in batches] == [len(batches[0])] * 2
        activations = Activations()
        left.append(weakref.ref(activations))
        if len(batches[0]) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = SimpleNamespace(
        train_step=train_step,
        parts=2,
        device="cuda",
        config=SimpleNamespace(batch_size=16),
        optimizer=SimpleNamespace(zero_grad=lambda set_to_none: None),
    )
    found = try_largest(trainer, batch)
    assert found.pairs <= 100 < found.too_many <= found.pairs + 6
    assert not found.is_predicted


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_a_lack_of_memory_has_one_name(error):
    with pytest.raises(OutOfMemoryError), naming_lack():
        raise error


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes"), naming_lack():
        raise RuntimeError("shapes do not fit")


def test_there_is_memory():
    assert 2**20 < free_memory() < 2**50


def test_a_process_may_refuse_to_take_more_than_there_is():
    code = (
        "from medfast.profile import memory\n"
        "memory.free_memory = lambda: 300_000_000\n"
        "memory.refuse_more_than_there_is()\n"
        "bytearray(400_000_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().endswith("MemoryError")
