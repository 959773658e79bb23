"""siglip_loss against open_clip and against plain PyTorch in tiles."""

from __future__ import annotations

import pytest

from benchmarks.conftest import Race
from benchmarks.peers import EMULATED

D = 512
LEFT_OUT = ("*compiled", "medfast torch bf16", *EMULATED)


@pytest.mark.parametrize("B", [512, 2048])
def test_small_batches(race: Race, B: int) -> None:
    race("siglip_loss", (B, D), seconds=3, without=LEFT_OUT)


def test_large_batch(race: Race) -> None:
    race("siglip_loss", (8192, D), without=LEFT_OUT)
