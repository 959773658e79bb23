"""Training steps beside open_clip's, and what the fused local loss does to the largest batch."""

from __future__ import annotations

import functools
from statistics import fmean
from typing import Any

import pytest
import torch

from benchmarks import memory
from benchmarks.compare import comparison
from benchmarks.conftest import Note
from benchmarks.measure import Run, interleave
from benchmarks.targets import Target
from benchmarks.training import Pairs, Steps, make, peak, random_pairs
from medfast.models import PRESETS
from medfast.profile.memory import free_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The published shape on a GPU, the embedded default's elsewhere.
MODEL, BATCH = ("vit_b16_clip", 256) if DEVICE.type == "cuda" else ("tiny", 64)
STEPS, STEPS_IN_TURN = 50, 5
NAMES = {"medfast": "auto", "open_clip": "open_clip"}
# Of the first loss, which the same weights give; bf16 rounds the features and open_clip's logits.
TOLERANCE = 2e-2
# Of the mean of the last losses: the paths part by rounding, but go on alike.
DRIFT = 0.1


def race(model: str, size: int, count: int, in_turn: int) -> tuple[dict[str, Any], Run]:
    """Train medfast's and open_clip's trainers on the same pairs, and time their steps in turn."""
    pairs = [one.to(DEVICE) for one in random_pairs(PRESETS[model], size, in_turn)]
    losses: dict[str, list[float]] = {name: [] for name in NAMES}

    def run(name: str, steps: Steps) -> Run:
        return Run(lambda: losses[name].extend(steps(pairs)))

    runs = {
        name: run(name, make(variant, model, "clip", DEVICE)) for name, variant in NAMES.items()
    }
    turns = count // in_turn
    # The first turn of each is its warm-up.
    timings = interleave(runs, seconds=0, device=DEVICE.type, clock="wall", least=turns)
    first, last = ({n: fmean(x[part]) for n, x in losses.items()} for part in _ENDS)
    for name in NAMES:
        assert abs(first[name] - first["open_clip"]) <= TOLERANCE * first["open_clip"], first
        assert abs(last[name] - last["open_clip"]) <= DRIFT * first["open_clip"], last
        assert last[name] < first[name]
    rows = [
        {
            "variant": name,
            "own": name != "open_clip",
            "dtype": "-",
            **timing.row(in_turn),
            "pairs_per_s": size * in_turn / timing.median,
            "peak_bytes": memory.in_fresh_process(
                peak, NAMES[name], model, "clip", size, DEVICE.type
            ),
        }
        for name, timing in timings.items()
    ]
    found = comparison(f"training step of clip, {model}", (size,), rows, DEVICE.type)
    return found, runs["medfast"]


_ENDS = (slice(0, 1), slice(-STEPS_IN_TURN, None))


@pytest.mark.slow
def test_steps_of_clip(benchmark: Any, note: Note) -> None:
    found, own = race(MODEL, BATCH, STEPS, STEPS_IN_TURN)
    note(found, (Target("medfast", 1.0, than="open_clip"),))
    benchmark.pedantic(own, rounds=1)


@pytest.mark.slow
def test_steps_of_local(benchmark: Any, note: Note) -> None:
    """Up to the largest batch whose pairs' scores the reference can keep, and twice that."""
    size, before = 64, 0
    while True:
        found = _local(size, ("auto", "reference"))
        note(found)
        needed = found["rows"][1]["peak_bytes"]
        # The scores of all pairs grow with the square of the batch.
        if needed + 4 * (needed - before) > _available():
            break
        size, before = 2 * size, needed
    note(_local(2 * size, ("auto",)))
    benchmark.pedantic(functools.partial(_one_step, "auto", size), rounds=1)


def _local(size: int, impls: tuple[str, ...]) -> dict[str, Any]:
    """Return the time and memory of steps of `local` with some implementations."""
    rows = []
    pairs = [one.to(DEVICE) for one in random_pairs(PRESETS[MODEL], size, 1)]
    runs = {impl: make(impl, MODEL, "local", DEVICE) for impl in impls}
    first = {impl: steps(pairs)[0] for impl, steps in runs.items()}
    assert max(first.values()) - min(first.values()) <= TOLERANCE * max(first.values()), first
    timings = interleave(
        {impl: Run(functools.partial(steps, pairs)) for impl, steps in runs.items()},
        seconds=0,
        device=DEVICE.type,
        clock="wall",
    )
    for impl, timing in timings.items():
        rows.append(
            {
                "variant": "reference" if impl == "reference" else "medfast",
                "own": impl != "reference",
                "dtype": "-",
                **timing.row(),
                "pairs_per_s": size / timing.median,
                "peak_bytes": memory.in_fresh_process(
                    peak, impl, MODEL, "local", size, DEVICE.type
                ),
            }
        )
    return comparison(f"training step of local, {MODEL}", (size,), rows, DEVICE.type)


def _one_step(impl: str, size: int) -> list[float]:
    pairs: list[Pairs] = [one.to(DEVICE) for one in random_pairs(PRESETS[MODEL], size, 1)]
    return make(impl, MODEL, "local", DEVICE)(pairs)


def _available() -> int:
    """Return how many bytes of memory a process can still take."""
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return free_memory()
