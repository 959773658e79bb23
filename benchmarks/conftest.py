"""Fixtures of the benchmarks; they run under `pytest --benchmark-only` alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results, targets
from benchmarks.compare import compare, failures, fastest
from benchmarks.conditions import conditions
from benchmarks.targets import Target

_HERE = Path(__file__).parent
_records: dict[str, list[dict[str, Any]]] = defaultdict(list)
_written: list[Path] = []

Note = Callable[..., None]
Race = Callable[..., dict[str, Any]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select either the tests or, with --benchmark-only, the benchmarks.

    The slow ones among these run only if `-m` asks for them.
    """
    benchmarks = config.getoption("benchmark_only", default=False)

    def is_wanted(item: pytest.Item) -> bool:
        if item.path.parent != _HERE:
            return not benchmarks
        is_slow = item.get_closest_marker("slow") is not None
        return benchmarks and (not is_slow or bool(config.option.markexpr))

    left_out = [item for item in items if not is_wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if is_wanted(item)]


@pytest.fixture
def note(request: pytest.FixtureRequest, benchmark: Any) -> Note:
    """Keep a comparison for the JSON, with its targets, and fail if medfast was wrong in it."""
    slow = "_slow" if request.node.get_closest_marker("slow") else ""
    name = request.module.__name__.rpartition("bench_")[2] + slow

    def keep(comparison: dict[str, Any], wanted: tuple[Target, ...] = ()) -> None:
        assert not failures(comparison)
        comparison["targets"] = [targets.judge(target, comparison) for target in wanted]
        benchmark.extra_info[comparison["allocator"]] = {
            row["variant"]: row["median_s"] for row in comparison["rows"] if "median_s" in row
        }
        _records[name].append(comparison)

    return keep


@pytest.fixture
def race(benchmark: Any, note: Note) -> Race:
    """Compare and keep; then let pytest-benchmark, which cannot interleave, time the fastest."""

    def run(*arguments: Any, wanted: tuple[Target, ...] = (), **options: Any) -> dict[str, Any]:
        comparison = compare(*arguments, **options)
        note(comparison, wanted)
        best = fastest(comparison)
        if best is None:
            pytest.skip("no implementation of medfast's can run here")
        # A repetition of what is known: three rounds, or one where those before were as few.
        rounds = min(row["rounds"] for row in comparison["rows"] if "rounds" in row)
        benchmark.pedantic(best, rounds=3 if rounds > 3 else 1)
        return comparison

    return run


def pytest_sessionfinish() -> None:
    """Write one JSON per module."""
    for name, comparisons in _records.items():
        _written.append(results.write(name, conditions(), comparisons=comparisons))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print each target beside what was measured."""
    judged = [
        targets.line(found)
        for comparisons in _records.values()
        for comparison in comparisons
        for found in comparison["targets"]
    ]
    if judged:
        terminalreporter.section("targets")
        terminalreporter.write_line(targets.table(judged))
    for path in _written:
        terminalreporter.write_line(f"wrote {path}")
