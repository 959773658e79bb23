"""The cost model and its page in the docs; measurements that it must agree with are elsewhere."""

from pathlib import Path

import pytest

import medfast
from medfast.distributed import cost

PAGE = Path(medfast.__file__).parents[1] / "docs" / "scaling.md"


def test_the_table_in_the_docs_is_what_the_model_says():
    assert PAGE.read_text().endswith("\n\n" + cost.table())


def test_the_page_says_that_it_is_a_prediction():
    assert "a prediction" in PAGE.read_text().splitlines()[0]


def test_one_rank_exchanges_nothing():
    for comm in ("ring", "gather"):
        found = cost.predict(cost.H100, 1024, 512, 1, comm=comm)
        assert (found.sent, found.exposed) == (0, 0)
        assert found.seconds == pytest.approx(4 * 2 * 1024**2 * 512 / cost.H100.flops)


def test_large_batches_hide_the_ring_but_not_a_gather():
    ring, gather = (
        cost.predict(cost.H100, 16384, 512, 512, comm=comm) for comm in ("ring", "gather")
    )
    assert ring.exposed < 0.01 * ring.seconds
    assert gather.exposed > 0.1 * gather.seconds


def test_towers_hide_their_gradients_where_they_compute_for_long_enough():
    sizes = (cost.A100, 64, 512, 64)
    loss = cost.predict(*sizes).seconds
    towers = cost.predict(*sizes, tower_flops=3e11).seconds - loss
    assert towers == pytest.approx(64 * 3e11 / cost.A100.flops)
    hidden, not_hidden = (
        cost.predict(*sizes, parameters=parameters, tower_flops=3e11).seconds - loss - towers
        for parameters in (10**8, 10**9)
    )
    assert hidden == pytest.approx(0, abs=1e-12)
    # 126/64 of 4 GB at 25 GB/s and 6 latencies, less two thirds of the towers' time.
    expected = 6 * 20e-6 + 4e9 * 126 / 64 / 25e9 - 2 / 3 * towers
    assert not_hidden == pytest.approx(expected)
