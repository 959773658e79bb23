"""What a profile found, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medfast.config import flag
from medfast.profile import phases
from medfast.profile.plan import Plan
from medfast.profile.report import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One hue for what belongs together, the backward darker than the forward.
_COLOURS = {
    phases.DATA: "#8c8c8c",
    phases.IMAGE_FORWARD: "#9ecae1",
    phases.IMAGE_BACKWARD: "#3182bd",
    phases.TEXT_FORWARD: "#a1d99b",
    phases.TEXT_BACKWARD: "#31a354",
    phases.LOSS_FORWARD: "#fdae6b",
    phases.LOSS_BACKWARD: "#e6550d",
    phases.COMMUNICATION: "#756bb1",
    phases.OPTIMISER: "#8c6d31",
    phases.OTHER: "#d9d9d9",
}
# Of the fused loss and of the reference.
_VARIANTS = ("#3182bd", "#e6550d")


def draw_profile(plan: Plan, point: Point, path: Path) -> None:
    """Draw how long the phases of a step take, and the peak of memory in each.

    Args:
        plan: What was asked for.
        point: What was found.
        path: The PNG to write.
    """
    figure = _figure(9, 6)
    times, peaks = figure.subplots(2, height_ratios=(2, 3))
    names = _names(plan)
    for row, own in enumerate(point.both):
        if isinstance(own, str):
            times.text(0, row, f" {own}", va="center", fontsize=8)
            continue
        begin = 0.0
        for phase, seconds in own.phase_s.items():
            # The legend names each phase once.
            label = phase if own is point.measured[0] else None
            times.barh(row, 1e3 * seconds, left=begin, color=_COLOURS[phase], label=label)
            begin += 1e3 * seconds
        places = [column + 0.4 * row - 0.2 for column in range(len(phases.PHASES))]
        heights = [own.peak_mb[phase] for phase in phases.PHASES]
        peaks.bar(places, heights, 0.4, color=_VARIANTS[row], label=names[row])
    times.set_yticks(range(len(names)), names)
    times.set_ylim(len(names) - 0.5, -0.5)
    times.set_xlabel("ms of a step")
    times.legend(ncols=5, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    peaks.set_xticks(range(len(phases.PHASES)), phases.PHASES, rotation=30, ha="right", fontsize=8)
    peaks.set_ylabel("peak memory, MB")
    peaks.legend(ncols=2, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    figure.suptitle(_title(plan, point.measured[0].device), fontsize=9)
    _save(figure, path)


def draw_sweep(plan: Plan, points: Sequence[Point], path: Path) -> None:
    """Draw speed, utilisation and memory over the values of a sweep.

    Args:
        plan: What was asked for.
        points: What was found with each value.
        path: The PNG to write.
    """
    assert plan.swept is not None
    figure = _figure(10.5, 3.4)
    rate, use, memory = figure.subplots(1, 3)
    devices = []
    for row, name in enumerate(_names(plan)):
        found = [(plan.values[i], point, point.both[row]) for i, point in enumerate(points)]
        measured = [(n, point, own) for n, point, own in found if not isinstance(own, str)]
        lacking = [n for n, _, own in found if isinstance(own, str)]
        devices += [own.device for _, _, own in measured]
        for axes, values in (
            (rate, [own.pairs_per_s for _, _, own in measured]),
            (use, [100 * point.utilisation(own) for _, point, own in measured]),
            (memory, [own.most_mb for _, _, own in measured]),
        ):
            style = {"color": _VARIANTS[row], "marker": "o", "markersize": 4}
            axes.plot([n for n, _, _ in measured], values, label=name, **style)
            if lacking:
                zeros = [0] * len(lacking)
                axes.plot(lacking, zeros, "x", color=_VARIANTS[row], label="did not run")
    for axes, label in (
        (rate, "pairs/s"),
        (use, "model FLOP utilisation, %"),
        (memory, "peak memory, MB"),
    ):
        axes.set_xlabel(flag(plan.swept))
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        if min(plan.values) > 0:
            axes.set_xscale("log", base=2)
        axes.set_xticks(plan.values, [f"{value:,}" for value in plan.values])
        axes.minorticks_off()
        axes.grid(axis="y", linewidth=0.4)
    rate.legend(fontsize=8, frameon=False)
    figure.suptitle(_title(plan, devices[0] if devices else ""), fontsize=9)
    _save(figure, path)


def _names(plan: Plan) -> tuple[str, str]:
    return f"fused: {plan.impls[0]}", "reference"


def _title(plan: Plan, device: str) -> str:
    config = plan.config
    return f"{config.method} on {config.model}, precision {config.precision}, {device}"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    # A figure of its own, without pyplot: the caller's figures and backend stay as they are.
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    beside = path.with_suffix(".part")
    figure.savefig(beside, format="png", dpi=120)
    beside.replace(path)
