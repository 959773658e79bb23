"""What a comparison should reach, and how far it came."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class Target:
    """One target: `variant` is to take at most `wanted`, or `wanted` times less than a peer.

    Attributes:
        variant: Pattern of names; the best of medfast's variants that match counts.
        wanted: Seconds or bytes at most; with `than`, the factor at least.
        than: The variant to be better than; None for an absolute target.
        key: "median_s" or "peak_bytes".
    """

    variant: str
    wanted: float
    than: str | None = None
    key: str = "median_s"


def judge(target: Target, comparison: dict[str, Any]) -> dict[str, Any]:
    """Return a target beside what was measured, as the tables and the JSON take it.

    "measured" and "met" are None where there is no measurement; "why" then says why not.

    Raises:
        ValueError: The comparison has no row of the variant to be better than.
    """
    about = ("op", "shape", "device", "passes", "clock", "allocator")
    found: dict[str, Any] = {
        **{name: comparison[name] for name in about},
        **asdict(target),
        "measured": None,
        "met": None,
    }
    rows = comparison["rows"]
    asked = [row for row in rows if row["own"] and fnmatchcase(row["variant"], target.variant)]
    other = [row for row in rows if row["variant"] == target.than]
    if rows and target.than and not other:
        raise ValueError(f"{comparison['op']} is not compared with {target.than!r}")
    own, peer = (
        [row for row in group if row.get(target.key) is not None] for group in (asked, other)
    )
    if not own or (target.than and not peer):
        reasons = [row.get("failed") or row.get("skipped") for row in (other if own else asked)]
        return {**found, "why": next(filter(None, reasons), "not measured")}
    best = min(own, key=lambda row: row[target.key])
    value = best[target.key]
    if target.than:
        value = peer[0][target.key] / value
    met = value >= target.wanted if target.than else value <= target.wanted
    return {**found, "variant": best["variant"], "measured": value, "met": met}


def line(found: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return a judged target in words: what, wanted, measured, verdict."""
    about = [f"{found['op']} {size(*found['shape'])}"]
    if found["passes"] != "both":
        about.append(found["passes"])
    if found["device"] == "cuda" and found["clock"] == "wall":
        about.append("wall clock")
    if found["allocator"] and found["allocator"].count("glibc") > 1:
        about.append("tuned allocator")
    what = f"{', '.join(about)}: {found['variant']}"
    kind = "memory of " if found["key"] == "peak_bytes" else ""
    if found["than"]:
        wanted, unit = f">= {found['wanted']:g}x {kind}{found['than']}", "{:.2f}x"
        measured = unit.format(found["measured"] or 0)
    else:
        wanted = f"<= {quantity(found['wanted'], found['key'])}"
        measured = quantity(found["measured"] or 0, found["key"])
    if found["measured"] is None:
        return what, wanted, "-", found["why"]
    return what, wanted, measured, "met" if found["met"] else "NOT MET"


def size(*shape: int | str) -> str:
    """Return a shape as text."""
    return " x ".join(x if isinstance(x, str) else f"{x:,}" for x in shape)


def quantity(value: float, key: str = "median_s") -> str:
    """Return seconds or bytes to three digits, with their unit."""
    if key == "peak_bytes":
        units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")]
    else:
        units = [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs")]
    least, unit = next((pair for pair in units if value >= pair[0] * 0.9995), units[-1])
    number = value / least
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{digits}f} {unit}"


def table(lines: list[tuple[str, str, str, str]]) -> str:
    """Return what `line` gave for several targets, in columns."""
    rows = [("target", "wanted", "measured", ""), *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{what:<{widths[0]}}  {wanted:<{widths[1]}}  {measured:>{widths[2]}}  {verdict}".rstrip()
        for what, wanted, measured, verdict in rows
    )
