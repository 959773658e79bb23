"""filip_loss against a vectorised eager form.

Shapes are B, P, T, the mean number of words of a caption, D.
"""

from __future__ import annotations

import pytest

from benchmarks.conftest import Race
from benchmarks.peers import CPU_HAS_BF16, EMULATED
from benchmarks.targets import Target

B, T, D = 48, 77, 512


@pytest.mark.parametrize(("P", "fp32", "bf16"), [(49, 2.0, 4.0), (196, 2.6, 6.0)])
def test_by_patches(race: Race, P: int, fp32: float, bf16: float) -> None:
    wanted = [Target("medfast cpu fp32", fp32, than="eager fp32")]
    if CPU_HAS_BF16:
        wanted.append(Target("medfast cpu bf16", bf16, than="eager fp32"))
    race(
        "filip_loss",
        (B, P, T, T, D),
        seconds=15,
        without=("medfast torch bf16", *EMULATED),
        wanted=tuple(wanted),
    )


def test_real_captions(race: Race) -> None:
    race("filip_loss", (B, 196, T, 30, D), seconds=8, only=("medfast cpu fp32", "eager fp32"))


@pytest.mark.slow
def test_memory_of_a_large_batch(race: Race) -> None:
    race("filip_loss", (256, 196, T, T, D), seconds=1, least=1, only=("medfast cpu fp32",))
