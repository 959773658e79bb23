"""cyclip_loss: linear in B, where the published form is quadratic."""

from __future__ import annotations

import pytest

from benchmarks.conftest import Race

D = 512


@pytest.mark.parametrize("B", [1024, 2048, 4096, 8192, 16384])
def test_by_batch(race: Race, B: int) -> None:
    # B x B in several copies takes gigabytes and many seconds beyond this.
    race("cyclip_loss", (B, D), seconds=2, without=("eager*",) if B > 4096 else ())
