"""`python -m docs.tables`: make the tables of README.md and docs/ anew from the code.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from benchmarks import report, results
from benchmarks.targets import size
from medfast.data import SOURCES
from medfast.evals.suite import EVALUATIONS, about
from medfast.methods import METHODS, method_class
from medfast.ops.dispatch import IMPLEMENTATIONS, NAMES

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))

_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def main() -> None:
    """Write the pages whose tables have changed."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if renewed(text) != text:
            page.write_text(renewed(text), encoding="utf-8")
            print(f"wrote {page}")


def renewed(page: str) -> str:
    """Return the text of a page with its tables made anew."""
    return _TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page)


def methods() -> str:
    """Return a method a line, from the first sentence of its module."""
    rows = []
    for key in METHODS:
        cls = method_class(key)
        documented = re.match(r"`\w+`: (.*?) \((.*?)\)\.", _sentence(cls.__module__))
        assert documented, f"{key} does not say what it is and where it is from"
        terms = " + ".join(f"{weight:g} {term}" for term, weight in cls.terms.items())
        rows.append([f"`{key}`", *documented.groups(), terms])
    return report.markdown(["`--method`", "what", "source", "loss terms"], rows)


def sources() -> str:
    """Return a source of training data a line."""
    rows = []
    for key, module in SOURCES.items():
        facts = importlib.import_module(module).ABOUT
        if key == facts.key:  # the phantom is read as ROCO is
            rows.append([f"`{key}`", facts.title, facts.licence, facts.access])
    return report.markdown(["`--train-data`", "data set", "licence", "how to get it"], rows)


def evaluations() -> str:
    """Return an evaluation a line."""
    rows = []
    for key, kind in EVALUATIONS.items():
        facts = about(key)
        rows.append([f"`{key}`", kind, facts.title, facts.licence, facts.access])
    return report.markdown(["evaluation", "kind", "data set", "licence", "how to get it"], rows)


def implementations() -> str:
    """Return an op a line, and which implementations it has."""
    names = [name for name in NAMES if any(name in own for own in IMPLEMENTATIONS.values())]
    rows = [
        [f"`{op}`", *("yes" if name in own else "" for name in names)]
        for op, own in IMPLEMENTATIONS.items()
    ]
    return report.markdown(["function", *(f"`{name}`" for name in names)], rows)


def speed() -> str:
    """Return how much faster and smaller each op is than its peer, on each machine measured."""
    files = report.files_of((ROOT / "docs/performance.md").read_text(encoding="utf-8"))
    machines: dict[str, None] = {}
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for one in (results.load(results.FOLDER / name) for name in files):
        conditions = one["conditions"]
        machine = f"{conditions['cpu'].replace('(R)', '')}, {conditions['cores']} cores"
        machines[machine] = None
        for comparison in _largest_with_peer(one):
            rows = [row for row in comparison["rows"] if "median_s" in row]
            peer = next(row for row in rows if not row["own"])
            own = [row for row in rows if row["own"]]
            alike = [row for row in own if row["dtype"] == peer["dtype"]]
            best = min(alike or own, key=lambda row: row["median_s"])
            cell = f"{peer['median_s'] / best['median_s']:.1f}x"
            if "peak_bytes" in peer:
                cell += f", {best['peak_bytes'] / peer['peak_bytes']:.0%} of the memory"
            key = (comparison["op"], size(*comparison["shape"]), peer["variant"])
            found.setdefault(key, {})[machine] = cell
    rows = [[*key, *(cells.get(m, "-") for m in machines)] for key, cells in found.items()]
    return report.markdown(["what", "size", "times faster than", *machines], rows)


def _largest_with_peer(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, of each thing that was compared with a peer, the comparison of the largest size."""
    largest: dict[str, dict[str, Any]] = {}
    for one in report.comparisons_of([result]):
        has_peer = any("median_s" in row and not row["own"] for row in one["rows"])
        is_plain = one["allocator"].count("glibc") < 2 and (
            one["passes"] == "both" or "rank" in one["op"]
        )
        known = largest.get(one["op"])
        if has_peer and is_plain and (known is None or known["shape"] <= one["shape"]):
            largest[one["op"]] = one
    return list(largest.values())


TABLES = {
    "speed": speed,
    "methods": methods,
    "sources": sources,
    "evaluations": evaluations,
    "implementations": implementations,
}


def _sentence(module: str) -> str:
    return " ".join((importlib.import_module(module).__doc__ or "").split())


if __name__ == "__main__":
    main()
