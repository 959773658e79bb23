"""retrieval_rank and both directions in one pass, against the best 200 of each chunk of queries."""

from __future__ import annotations

import pytest

from benchmarks.conftest import Race
from benchmarks.targets import Target

N, GALLERY, D = 4096, 50_000, 512
# Its scores alone would be 40 GB.
LARGE = 100_000


def test_one_direction(race: Race) -> None:
    race(
        "retrieval_rank",
        (N, GALLERY, D),
        seconds=8,
        without=("medfast torch bf16",),
        wanted=(Target("medfast *", 1.8, than="chunked topk(200) fp32"),),
    )


def test_both_directions_in_one_pass(race: Race) -> None:
    # The peer ranks 4,096 queries each way and its time is scaled to all of them. A round takes
    # half a minute, so medfast's fastest stands for all.
    race(
        "paired_ranks",
        (GALLERY, D),
        seconds=1,
        least=2,
        only=("medfast cpu fp32", "chunked*"),
        with_memory=False,
        wanted=(Target("medfast *", 3.0, than="chunked topk(200) fp32, twice"),),
    )


@pytest.mark.slow
def test_both_directions_of_a_large_gallery(race: Race) -> None:
    race(
        "paired_ranks",
        (LARGE, D),
        seconds=1,
        least=2,
        only=("medfast cpu fp32", "chunked*"),
        wanted=(
            Target("medfast *", 3.0, than="chunked topk(200) fp32, twice"),
            Target("medfast *", 24 * 2**30, key="peak_bytes"),
        ),
    )
