"""sparc_loss against its definition, run as it stands.

Shapes are B, P, T, the mean number of words of a caption, D.
"""

from __future__ import annotations

import pytest

from benchmarks.conftest import Race
from benchmarks.peers import EMULATED
from benchmarks.targets import Target

B, P, T, D = 256, 196, 77, 512


@pytest.mark.parametrize("mean", [T, 30])
def test_by_words(race: Race, mean: int) -> None:
    race(
        "sparc_loss",
        (B, P, T, mean, D),
        seconds=12,
        without=("medfast torch bf16", *EMULATED),
        wanted=(Target("medfast cpu fp32", 2.0, than="eager fp32"),),
    )
