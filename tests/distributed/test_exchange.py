"""The exchange itself: what arrives, how many bytes were sent for it, how much memory it takes."""

import ctypes
import os

import pytest
import torch
from launch import run

from medfast import distributed
from medfast.device import forget_peak_memory, peak_memory
from medfast.distributed import Ring, cost
from medfast.distributed.ring import SMALL_BLOCK

D = 16


def test_an_unknown_comm_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"comm 'rings' .*'ring'.*auto, gather, ring"):
        Ring(comm="rings")


def _exchanged(rank, comm, sizes):
    ring = Ring(comm=comm)
    assert ring.sizes(torch.zeros(sizes[rank], 2)) == list(sizes)
    whole = torch.arange(2 * sum(sizes)).view(-1, 2)
    own, spans = whole.split(sizes)[rank], ring.spans(sizes)
    seen = []
    for span, (first, second) in ring.blocks(sizes, own, own.to(torch.uint8)):
        assert first.equal(whole[span])
        assert second.equal(whole[span].to(torch.uint8))
        seen += range(sum(sizes))[span]
    assert sorted(seen) == list(range(sum(sizes)))
    assert ring.gather(own, sizes).equal(whole)
    of_all = sum(range(1, ring.world + 1))
    assert ring.sum_home(whole * (rank + 1.0), sizes).equal(whole[spans[rank]] * of_all)
    return seen[: sizes[rank]] == list(range(sum(sizes)))[spans[rank]], ring.sent


@pytest.mark.parametrize("sizes", [(3,), (2, 2), (5, 3), (4, 1, 2)])
def test_every_row_comes_once(tmp_path, sizes):
    for own_first, _ in run(len(sizes), _exchanged, tmp_path, "ring", sizes):
        assert own_first
    run(len(sizes), _exchanged, tmp_path, "gather", sizes)


def _chosen(rank):
    ring = Ring()
    rows = torch.zeros(1, SMALL_BLOCK // 8, dtype=torch.float64)
    return [ring.gathers(sizes, rows) for sizes in ([1, 1], [1, 2], [2, 1])]


def test_auto_gathers_small_blocks_and_all_ranks_agree(tmp_path):
    assert run(2, _chosen, tmp_path) == [[True, False, False]] * 2
    assert run(1, _chosen, tmp_path) == [[False, False, False]]


def _sent(rank, comm, sizes, dtype=torch.float32):
    ring = Ring(comm=comm)
    features = [torch.ones(sizes[rank], D, dtype=dtype, requires_grad=True) for _ in range(2)]
    distributed.clip_loss(*features, 1.0, ring, impl="torch").backward()
    return ring.sent


@pytest.mark.parametrize(
    ("comm", "sizes", "expected"),
    [
        # Two ranks of 5 and 3 pairs, 64 bytes a row. Their sizes, 16 bytes, are all-reduced; so are
        # both 32 bytes of 8 sums; the gradients of sums are gathered as if both had 5, 20 bytes.
        # Each sends its texts, and home the gradient of the other's.
        ("ring", (5, 3), 2 * [16 + 2 * 32 + 20 + (5 + 3) * 64]),
        # Gathered texts and gradients, too, count as those of 5.
        ("gather", (5, 3), 2 * [16 + 2 * 32 + 20 + (5 + 5) * 64]),
        # Three ranks of 4: an all-reduce is 4/3 of its size, and in the backward all but the first
        # of two blocks come again.
        ("ring", (4, 4, 4), 3 * [32 + 2 * 64 + 2 * 16 + (2 + 1 + 2) * 256]),
        ("gather", (4, 4, 4), 3 * [32 + 2 * 64 + 2 * 16 + (2 + 2) * 256]),
        ("ring", (6,), [0]),
    ],
)
def test_the_ring_counts_the_bytes_it_sends(tmp_path, comm, sizes, expected):
    assert run(len(sizes), _sent, tmp_path, comm, sizes) == expected


@pytest.mark.parametrize("comm", ["ring", "gather"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_cost_model_knows_the_bytes(tmp_path, comm, world):
    for dtype in (torch.float32, torch.bfloat16):
        found = run(world, _sent, tmp_path, comm, (6,) * world, dtype)
        assert found == [cost.clip_bytes(6, D, world, dtype.itemsize, comm)] * world


def test_open_clip_sends_both_features_and_both_gradients():
    # 3 others, of 8 pairs with 16 numbers of 2 bytes each.
    assert cost.open_clip_bytes(8, 16, 4, 2) == 4 * 3 * 256


PAIRS, WIDTH = 128, 8192
BLOCK = PAIRS * WIDTH * 4


def _peak(rank, comm, with_positives):
    """Return the most memory of a step above its inputs, in blocks of features."""
    os.environ["MEDFAST_WORKSPACE_MB"] = "1"
    # Else what was freed may stay with the process: glibc's M_MMAP_THRESHOLD, up to which it may.
    ctypes.CDLL(None).mallopt(-3, BLOCK // 4)
    ring = Ring(comm=comm)
    positives = torch.arange(PAIRS) // 2 if with_positives else None

    def step(pairs, width):
        image, text = (torch.ones(pairs, width, requires_grad=True) for _ in range(2))
        ids = None if positives is None else positives[:pairs]
        before = forget_peak_memory(image.device)
        distributed.clip_loss(image, text, 1.0, ring, positives=ids, impl="torch").backward()
        return (peak_memory(image.device) - before) / BLOCK

    step(4, 8)  # the first one imports
    return step(PAIRS, WIDTH)


@pytest.mark.parametrize("world", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_memory_on_the_ring_does_not_grow_with_the_ranks(tmp_path, world):
    peaks = run(world, _peak, tmp_path, "ring", False)
    assert max(peaks) <= 10
    predicted = cost.predict(cost.A100, PAIRS, WIDTH, world, element_size=4).memory / BLOCK
    assert max(peaks) == pytest.approx(predicted, rel=0.2)
    assert max(run(world, _peak, tmp_path, "ring", True)) <= 12


@pytest.mark.parametrize("world", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_memory_of_a_gather_does(tmp_path, world):
    peaks = run(world, _peak, tmp_path, "gather", False)
    predicted = cost.predict(cost.A100, PAIRS, WIDTH, world, element_size=4, comm="gather")
    assert max(peaks) == pytest.approx(predicted.memory / BLOCK, rel=0.2)
