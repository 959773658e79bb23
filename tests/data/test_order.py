import itertools
from collections import Counter

import pytest

from medfast.data.order import Draw, Order
from medfast.errors import UsageError


def _samples(order, epoch=0, start=0):
    return [draw.sample for batch in order.batches(epoch, start) for draw in batch]


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_number():
    order = Order([40], 8)
    assert sorted(_samples(order)) == list(range(40))
    assert _samples(order) == _samples(Order([40], 8))
    assert len({tuple(_samples(Order([40], 8, seed), e)) for seed in (0, 1) for e in (0, 1)}) == 4


def test_without_shuffling_every_sample_comes_in_order():
    order = Order([21], 8, shuffle=False)
    assert _samples(order, epoch=3) == list(range(21))
    assert [len(batch) for batch in order.batches(0)] == [8, 8, 5]
    assert len(order) == 3


def test_the_turn_of_a_plain_epoch_is_its_number():
    assert {draw.turn for batch in Order([20], 5).batches(7) for draw in batch} == {7}


@pytest.mark.parametrize("start", [0, 1, 4, 5])
@pytest.mark.parametrize("weights", [None, [1, 3]])
def test_an_epoch_goes_on_from_any_batch(start, weights):
    order = Order([30, 10], 8, weights=weights)
    whole = list(order.batches(2))
    assert list(order.batches(2, start)) == whole[start:]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_the_steps_of_one_process(world):
    batch = 12 // world
    alone = list(Order([100], 12).batches(1))
    ranks = [list(Order([100], batch, rank=r, world=world).batches(1)) for r in range(world)]
    joined = [list(itertools.chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]
    assert joined == alone


def test_fewer_samples_than_a_step_of_all_ranks_are_refused_with_the_numbers():
    with pytest.raises(UsageError, match=r"4 ranks x 8 pairs are 32 pairs per step.* has 31"):
        Order([31], 8, world=4)
    assert len(Order([32], 8, world=4)) == 1


def test_weights_are_shares_of_an_epoch():
    order = Order([90, 10], 10, weights=[1, 1])
    counts = Counter(sample >= 90 for sample in _samples(order))
    assert order.shares() == [50, 50]
    assert counts == {False: 50, True: 50}


@pytest.mark.parametrize("weights", [[1, 1], [0.2, 0.8], [5, 1]])
def test_a_weighted_source_repeats_nothing_before_all_of_it_came(weights):
    order = Order([37, 11], 1, weights=weights)
    seen = Counter()
    for epoch in range(12):
        seen.update(_samples(order, epoch))
        for source in (range(37), range(37, 48)):
            counts = [seen[sample] for sample in source]
            assert max(counts) - min(counts) <= 1


def test_a_repeated_sample_has_another_turn():
    order = Order([4, 36], 1, weights=[1, 1])
    draws = [batch[0] for epoch in range(3) for batch in order.batches(epoch)]
    assert len(set(draws)) == len(draws) == 120
    assert {draw.turn for draw in draws if draw.sample < 4} == set(range(15))


def test_weights_that_round_to_nothing_leave_a_source_out():
    assert Order([10, 10], 1, weights=[1e-9, 1]).shares() == [0, 20]
    assert all(s >= 10 for s in _samples(Order([10, 10], 1, weights=[1e-9, 1])))


def test_a_draw_names_sample_and_turn():
    assert list(Order([2], 2, shuffle=False).batches(3)) == [[Draw(0, 3), Draw(1, 3)]]
