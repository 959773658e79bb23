"""clip_loss against open_clip and against plain PyTorch in tiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.conftest import Note, Race
from benchmarks.peers import CPU_HAS_BF16, EMULATED
from benchmarks.targets import Target

D = 512
# What plain PyTorch in tiles takes; it recomputes, so it never keeps B x B.
CHUNKED = "medfast torch fp32, recomputing"
# At the default settings a part of open_clip's time goes into fresh pages for its large buffers. An
# allocator that keeps its memory is the fairer, if rarer, setting.
TUNED = "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=8589934592"


def _if_bf16(factor: float) -> list[Target]:
    """Return the target of bf16 features where the processor multiplies them in hardware."""
    return [Target("medfast cpu bf16", factor, than="open_clip fp32")] if CPU_HAS_BF16 else []


@pytest.mark.parametrize("B", [256, 512, 1024, 2048, 4096])
def test_small_batches(race: Race, B: int) -> None:
    race("clip_loss", (B, D), seconds=4, without=("*compiled",))


def test_large_batch(race: Race) -> None:
    race(
        "clip_loss",
        (8192, D),
        without=("*compiled", "medfast torch bf16", *EMULATED),
        wanted=(
            Target("medfast cpu fp32*", 3.0, than="open_clip fp32"),
            Target("medfast cpu fp32, recomputing", 1.15, than=CHUNKED),
            Target("medfast cpu fp32", 1.4, than=CHUNKED),
            *_if_bf16(10.0),
        ),
    )


def test_forward_alone(race: Race) -> None:
    only = ("medfast cpu fp32*", "open_clip fp32")
    race("clip_loss", (8192, D), passes="forward", only=only, with_memory=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the settings are glibc's")
def test_large_batch_with_a_tuned_allocator(benchmark: Any, note: Note) -> None:
    variants = ("medfast cpu*", "open_clip fp32")
    command = [sys.executable, "-m", "benchmarks.compare", "clip_loss", "8192", str(D)]
    command += ["--no-memory", "--only", *variants]

    def run() -> dict[str, Any]:
        done = subprocess.run(
            command,
            env={**os.environ, "GLIBC_TUNABLES": TUNED},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            check=True,
        )
        return json.loads(done.stdout)

    # The settings are read at a process's start, so the whole comparison runs in another one.
    comparison = benchmark.pedantic(run, rounds=1)
    note(
        comparison,
        (Target("medfast cpu fp32*", 1.5, than="open_clip fp32"), *_if_bf16(5.0)),
    )


@pytest.mark.slow
def test_against_the_compiler(race: Race) -> None:
    race("clip_loss", (8192, D), only=("medfast cpu *", "open_clip fp32*"), with_memory=False)


@pytest.mark.slow
def test_memory_of_a_very_large_batch(race: Race) -> None:
    race(
        "clip_loss",
        (65536, D),
        seconds=1,
        least=1,
        only=("medfast cpu*", "medfast torch fp32"),
        wanted=(
            Target("medfast cpu fp32", 700e6, key="peak_bytes"),
            Target("medfast cpu bf16", 700e6, key="peak_bytes"),
            Target("medfast cpu bf16", 3.5, than="medfast torch fp32"),
        ),
    )
