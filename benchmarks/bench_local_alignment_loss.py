"""local_alignment_loss against the published loop over captions.

Shapes are B, P, T, the mean number of words of a caption, D.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.compare import compare
from benchmarks.conftest import Note, Race
from benchmarks.peers import CPU_HAS_BF16, EMULATED
from benchmarks.targets import Target

B, T, D = 48, 77, 512
LOOP = "published loop fp32"
LEFT_OUT = ("medfast torch bf16", *EMULATED)


def test_49_patches(race: Race) -> None:
    wanted = Target("medfast cpu fp32", 6.5, than=LOOP)
    race("local_alignment_loss", (B, 49, T, T, D), without=LEFT_OUT, wanted=(wanted,))


def test_196_patches(race: Race) -> None:
    wanted = [Target("medfast cpu fp32", 2.7, than=LOOP)]
    if CPU_HAS_BF16:
        wanted.append(Target("medfast cpu bf16", 7.0, than=LOOP))
    race(
        "local_alignment_loss",
        (B, 196, T, T, D),
        seconds=30,
        without=LEFT_OUT,
        wanted=tuple(wanted),
    )


def test_cost_follows_the_words(note: Note, race: Race) -> None:
    options: dict[str, Any] = {"only": ("medfast cpu fp32",), "with_memory": False}
    full = compare("local_alignment_loss", (B, 196, T, T, D), seconds=6, **options)
    note(full)
    real = race("local_alignment_loss", (B, 196, T, 30, D), seconds=6, **options)
    assert real["rows"][0]["median_s"] < 0.6 * full["rows"][0]["median_s"]


@pytest.mark.slow
def test_memory_of_a_large_batch(race: Race) -> None:
    race(
        "local_alignment_loss",
        (256, 196, T, T, D),
        seconds=1,
        least=1,
        only=("medfast cpu *",),
        wanted=tuple(
            Target(f"medfast cpu {dtype}", 800e6, key="peak_bytes") for dtype in ("fp32", "bf16")
        ),
    )
