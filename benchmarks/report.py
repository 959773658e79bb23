"""`python -m benchmarks.report`: tables and a picture from the newest JSON files.

`--page docs/performance.md` renews that page's part, which names the files that it is made of.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks import loaders, results
from benchmarks.conditions import machine as machine_of
from benchmarks.ops import OPS
from benchmarks.targets import line, quantity, size

_RESULTS = ("loss", "d_image", "d_text", "d_scale")
# What the page shows of them.
_PAGE_ERRORS = ("loss", "d_image")
_MARK, _END_MARK = "<!-- benchmarks: ", "<!-- end of benchmarks -->"
# Ops of which the page shows no comparison but in other tables.
_NOT_SHOWN = ("clip_loss", "siglip_loss", "cyclip_loss", "retrieval_rank", "paired_ranks")
# What the picture leaves out, or it would be crowded.
_NOT_DRAWN = ("medfast torch*", "*compiled")

_DASH = "-"

Comparison = dict[str, Any]


def report(found: Sequence[dict[str, Any]]) -> str:
    """Return everything about one machine as Markdown."""
    comparisons = comparisons_of(found)
    parts = [_about(found[0]["conditions"])]
    for family in _families(comparisons):
        shown = _largest(family)
        parts += [f"### {_title(shown)}", comparison_table(shown)]
        if len(family) > 1:
            several = _title(shown, size("B", *shown["shape"][1:]))
            for key, what in (("median_s", "time"), ("peak_bytes", "peak memory")):
                parts += [f"### {several}: {what}", size_table(family, key)]
    judged = [line(target) for one in comparisons for target in one["targets"]]
    if judged:
        parts += ["### Targets", markdown(["target", "wanted", "measured", ""], judged)]
    for result in found:
        if result["name"] == "errors":
            parts += errors_tables(result)
        if result["name"] == loaders.NAME:
            parts += ["### Loaders", *loaders.summary(result)]
    return "\n\n".join(parts) + "\n"


def page_part(files: Sequence[str], folder: Path = results.FOLDER) -> str:
    """Return a page's part about the results in these files, between its two marks."""
    found = [results.load(folder / name) for name in files]
    parts = [f"{_MARK}{' '.join(files)} -->"]
    for machine, one in _by_machine(found).items():
        comparisons = comparisons_of(one)
        judged = [line(target) for c in comparisons for target in c["targets"]]
        family = _clip_family(comparisons)
        shown = _largest(family)
        parts += [
            f"On {_about(one[0]['conditions'])}",
            markdown(["comparison", "wanted", "measured", ""], judged),
            f"{_title(shown)}:",
            comparison_table(shown),
            f"{_title(family[0], size('B', *family[0]['shape'][1:]))}:",
            size_table(family, "median_s"),
            f"![time and memory against the batch size](../benchmarks/results/{_file(machine)})",
        ]
        for comparison in comparisons:
            if comparison["op"] not in _NOT_SHOWN and _has_peers(comparison):
                parts += [f"{_title(comparison)}:", comparison_table(comparison)]
        for result in one:
            if result["name"] == "errors":
                parts += errors_tables(result, "", _PAGE_ERRORS)
            if result["name"] == loaders.NAME:
                parts += loaders.summary(result)
    return "\n\n".join([*parts, _END_MARK])


def renewed(page: str, part: str) -> str:
    """Return a page with its part about the results replaced.

    Raises:
        ValueError: The page has no such part.
    """
    before, _, rest = page.partition(_MARK)
    _, mark, after = rest.partition(_END_MARK)
    if not mark:
        raise ValueError(f"the page has no part from {_MARK}... --> to {_END_MARK}")
    return before + part + after


def files_of(page: str) -> list[str]:
    """Return the files that a page's part was made of."""
    return page.partition(_MARK)[2].partition(" -->")[0].split()


def comparisons_of(found: Sequence[dict[str, Any]]) -> list[Comparison]:
    """Return all comparisons in which something was measured."""
    every = (one for result in found for one in result.get("comparisons", ()))
    return [one for one in every if _measured(one)]


def comparison_table(comparison: Comparison) -> str:
    """Return one comparison, variant by variant, and how many times faster than the first peer."""
    rows = _measured(comparison)
    base = next((row for row in rows if not row["own"]), rows[0])
    columns: dict[str, list[str]] = {"variant": [], "time": [], "p20 to p80": []}
    columns |= {f"{base['variant']} / this": [], "pairs/s": [], "TFLOP/s": [], "% of torch.mm": []}
    columns |= {"peak memory": [], "largest error": []}
    for row in rows:
        scaled = f" (on {row['share']:.0%} of the queries, scaled)" if "share" in row else ""
        cells = [
            row["variant"] + scaled,
            quantity(row["median_s"]),
            f"{quantity(row['p20_s'])} to {quantity(row['p80_s'])}",
            f"{base['median_s'] / row['median_s']:.2f}x",
            f"{row['pairs_per_s']:,.0f}" if "pairs_per_s" in row else _DASH,
            f"{row['tflops']:.3g}" if "tflops" in row else _DASH,
            f"{row['percent_of_mm']:.0f}" if "percent_of_mm" in row else _DASH,
            _text(row.get("peak_bytes"), "peak_bytes"),
            f"{max(row['errors'].values()):.1e}" if row.get("errors") else _DASH,
        ]
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    known = {title: column for title, column in columns.items() if {*column} != {_DASH}}
    return markdown(list(known), list(zip(*known.values(), strict=True)))


def size_table(family: Sequence[Comparison], key: str) -> str:
    """Return the medians or peaks of comparisons of several sizes, one column per size."""
    names = dict.fromkeys(row["variant"] for one in family for row in _measured(one))
    lines = [[name, *(_text(_value(one, name, key), key) for one in family)] for name in names]
    return markdown(["variant", *(f"B = {one['shape'][0]:,}" for one in family)], lines)


def errors_tables(
    result: dict[str, Any], level: str = "### ", names_of_results: Sequence[str] = _RESULTS
) -> list[str]:
    """Return a table for each result: scales and correlations down, variants across."""
    rows = result["rows"]
    names = list(dict.fromkeys(row["variant"] for row in rows))
    places = list(dict.fromkeys((row["scale"], row["correlation"]) for row in rows))
    errors = {(row["scale"], row["correlation"], row["variant"]): row["errors"] for row in rows}
    parts = []
    for key in names_of_results:
        colon = "" if level else ":"
        title = f"Relative error of {key} against fp64, {size(*result['shape'])}"
        parts.append(f"{level}{title}{colon}")
        lines = [
            [f"{s:g}", f"{c:g}", *(f"{errors[s, c, name][key]:.1e}" for name in names)]
            for s, c in places
        ]
        parts.append(markdown(["scale", "correlation", *names], lines))
    return parts


def picture(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw time and peak memory of clip_loss against B, both axes logarithmic."""
    import matplotlib
    from matplotlib.figure import Figure

    family = _clip_family(comparisons)
    if not family:
        return
    sizes = [one["shape"][0] for one in family]
    names = sorted({row["variant"] for one in family for row in _measured(one)})
    names = [n for n in names if not any(fnmatchcase(n, pattern) for pattern in _NOT_DRAWN)]
    panels = {"median_s": "time [s]", "peak_bytes": "peak memory above the inputs [bytes]"}
    # With a fixed salt and no date the file changes only when the numbers do.
    with matplotlib.rc_context({"svg.hashsalt": "medfast", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9.0, 4.0), layout="constrained")
        for axes, (key, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for name in names:
                points = [(one["shape"][0], _value(one, name, key)) for one in family]
                known = [(x, y) for x, y in points if y is not None]
                axes.loglog(
                    [x for x, _ in known],
                    [y for _, y in known],
                    "o-" if name.startswith("medfast") else "s--",
                    markersize=4,
                    label=name,
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [f"{B:,}" for B in sizes], rotation=45)
            axes.set_xlabel("B [pairs]")
            axes.set_ylabel(label)
            axes.grid(True, alpha=0.3)
            axes.legend(fontsize="small")
        figure.suptitle(f"{_title(family[0], size('B', *family[0]['shape'][1:]))}")
        figure.savefig(path, metadata={"Date": None})


def _families(comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
    """Return the comparisons in groups that differ in the first size alone, smallest first.

    Of two of one size, the one with more variants counts.
    """
    found: dict[tuple[Any, ...], dict[int, Comparison]] = {}
    for one in comparisons:
        rows, *others = one["shape"]
        key = (*(one[name] for name in ("op", "device", "passes", "clock", "allocator")), *others)
        known = found.setdefault(key, {}).get(rows)
        if known is None or len(_measured(known)) < len(_measured(one)):
            found[key][rows] = one
    return [[family[rows] for rows in sorted(family)] for family in found.values()]


def _clip_family(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons of clip_loss at most sizes."""
    families = [f for f in _families(comparisons) if f[0]["op"] == "clip_loss"]
    return max(families, key=len, default=[])


def _largest(family: Sequence[Comparison]) -> Comparison:
    """Return the comparison at the largest size that has peers; if none has, at the largest."""
    return next((one for one in reversed(family) if _has_peers(one)), family[-1])


def _has_peers(comparison: Comparison) -> bool:
    return any(not row["own"] for row in _measured(comparison))


def _by_machine(found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in found:
        groups.setdefault(machine_of(result["conditions"]), []).append(result)
    return groups


def _file(machine: str) -> str:
    return f"clip_loss_{machine}.svg"


def _about(conditions: dict[str, Any]) -> str:
    """Return the conditions in a sentence."""
    versions = {name: number for name, number in conditions["versions"].items() if number}
    where = f"{conditions['cpu']}, {conditions['cores']} cores, {conditions['threads']} threads"
    if "gpu" in conditions:
        where = f"{conditions['gpu']} (CUDA {conditions['cuda']}), {where}"
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    revision = (conditions["revision"] or "unknown")[:12]
    return f"{where}; {listed}; revision {revision}; {conditions['date'][:10]}."


def _title(comparison: Comparison, sizes: str | None = None) -> str:
    passes = comparison["passes"]
    parts = [f"{comparison['op']} {sizes or size(*comparison['shape'])}"]
    op = OPS.get(comparison["op"])
    if op is not None and op.has_gradient:
        parts.append("forward and backward" if passes == "both" else passes)
    if comparison["device"] == "cuda":
        parts.append(f"{comparison['clock']} clock")
    else:
        parts.append(comparison["allocator"])
    return ", ".join(parts)


def _measured(comparison: Comparison) -> list[dict[str, Any]]:
    return [row for row in comparison["rows"] if "median_s" in row]


def _value(comparison: Comparison, name: str, key: str) -> float | None:
    return next((row.get(key) for row in _measured(comparison) if row["variant"] == name), None)


def _text(value: float | None, key: str) -> str:
    return _DASH if value is None else quantity(value, key)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Print the tables of every machine, and draw its picture beside the results."""
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the JSON")
    parser.add_argument("--page", type=Path, help="a page whose part is to be renewed")
    given = parser.parse_args()
    newest = sorted(results.newest(given.results).items())
    found = [result for (name, _), result in newest if not name.startswith("gpu_small")]
    if not found:
        print(
            f"benchmarks.report: error: {given.results} holds no results; run "
            "pytest --benchmark-only.",
            file=sys.stderr,
        )
        sys.exit(2)
    for machine, one in _by_machine(found).items():
        print(f"## {machine}\n\n{report(one)}")
        picture(comparisons_of(one), given.results / _file(machine))
    if given.page is not None:
        files = [results.file_name(result["name"], result["conditions"]) for result in found]
        text = given.page.read_text(encoding="utf-8")
        given.page.write_text(renewed(text, page_part(files, given.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
