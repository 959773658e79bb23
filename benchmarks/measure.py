"""The one clock of the benchmarks: variants in turn, medians, and what `torch.mm` reaches."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_MOST_ROUNDS = 50


@dataclass(frozen=True)
class Run:
    """Something to time.

    Attributes:
        timed: What the clock runs for.
        setup: What is done before, outside the time; returns the arguments of `timed`.
    """

    timed: Callable[..., Any]
    setup: Callable[[], Sequence[Any]] = tuple

    def __call__(self) -> Any:
        """Run both parts and return the result."""
        return self.timed(*self.setup())


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and what a fifth and four fifths of the calls stay below."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Return the summary of single calls."""
        levels = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        values = torch.tensor(seconds, dtype=torch.float64).quantile(levels)
        median, p20, p80 = values.tolist()
        return cls(median, p20, p80, len(seconds))

    def row(self, parts: float = 1) -> dict[str, float]:
        """Return the timing as rows of a comparison hold it, of one of so many parts of a call."""
        seconds = {"median_s": self.median, "p20_s": self.p20, "p80_s": self.p80}
        return {**{name: x / parts for name, x in seconds.items()}, "rounds": self.rounds}


def interleave(
    runs: Mapping[str, Run],
    *,
    seconds: float,
    device: str = "cpu",
    clock: str = "device",
    least: int = 3,
) -> dict[str, Timing]:
    """Time variants in turn, so that a slow spell of the machine strikes all of them.

    Each runs once to warm up. Every round then runs all, beginning with another one each time.

    Args:
        runs: What to time, by name.
        seconds: About how long to go on.
        device: "cpu" or "cuda".
        clock: On a GPU, "device" takes the events' time, the L2 cache emptied before each call;
            "wall" takes the caller's, from an idle GPU to an idle GPU.
        least: The least rounds, however long they take.

    Returns:
        The timing of each.
    """
    stopwatch = _events(device) if device == "cuda" and clock == "device" else _wall(device)
    begin = time.perf_counter()
    for run in runs.values():
        stopwatch(run)
    once = time.perf_counter() - begin
    rounds = min(max(least, int(seconds / once)), _MOST_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(stopwatch(runs[name]))
    return {name: Timing.of(sample) for name, sample in samples.items()}


def mm_rates(
    products: Iterable[tuple[int, int, int]],
    dtype: torch.dtype,
    device: str,
    seconds: float = 0.5,
) -> dict[tuple[int, int, int], float]:
    """Return the FLOP/s of `torch.mm` for [m, k] x [k, n], on random numbers, by (m, k, n)."""
    runs = {}
    shapes = {str(shape): shape for shape in dict.fromkeys(products)}
    for name, (m, k, n) in shapes.items():
        a, b = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (k, n)))
        runs[name] = Run(functools.partial(torch.mm, a, b))
    timings = interleave(runs, seconds=seconds, device=device)
    return {(m, k, n): 2 * m * k * n / timings[name].median for name, (m, k, n) in shapes.items()}


def _wall(device: str) -> Callable[[Run], float]:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def stopwatch(run: Run) -> float:
        arguments = run.setup()
        wait()
        begin = time.perf_counter()
        # Held, so that freeing the result is not part of the time.
        result = run.timed(*arguments)
        wait()
        elapsed = time.perf_counter() - begin
        del result
        return elapsed

    return stopwatch


def _events(device: str) -> Callable[[Run], float]:
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(4 * l2, dtype=torch.int8, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def stopwatch(run: Run) -> float:
        arguments = run.setup()
        flush.zero_()
        begin.record()
        result = run.timed(*arguments)
        end.record()
        end.synchronize()
        del result
        return begin.elapsed_time(end) / 1e3

    return stopwatch
