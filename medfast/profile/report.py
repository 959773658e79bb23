"""What a profile found: a table for people and a document for programs."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from medfast.config import TrainConfig, flag
from medfast.cost import ModelFlops
from medfast.distributed.cost import open_clip_bytes
from medfast.evals.provenance import provenance
from medfast.profile.measure import WARM_UP, Measurement
from medfast.profile.phases import PHASES
from medfast.profile.plan import Plan

_DASH = "-"


@dataclass(frozen=True)
class Point:
    """What was found with some settings.

    Attributes:
        config: The settings.
        fused: The measurement with the fused loss, or why there is none.
        reference: That with the reference, likewise.
        flops: What a step has to compute; None without any measurement.
    """

    config: TrainConfig
    fused: Measurement | str
    reference: Measurement | str
    flops: ModelFlops | None

    @property
    def both(self) -> tuple[Measurement | str, Measurement | str]:
        """What was found with the fused loss and with the reference."""
        return self.fused, self.reference

    @property
    def measured(self) -> list[Measurement]:
        """The measurements that there are."""
        return [own for own in self.both if isinstance(own, Measurement)]

    @property
    def pairs(self) -> int:
        """Pairs of one process in a step."""
        return self.config.batch_size * self.config.accum_freq

    @property
    def product_flops(self) -> float:
        """FLOP/s that matrix products have been seen to reach."""
        return max(own.product_flops for own in self.measured)

    def step_flops(self, own: Measurement) -> float:
        """Return the FLOPs that one process has to compute in a step."""
        assert self.flops is not None
        return self.flops.of_step(own.pairs / own.world, own.pairs)

    def utilisation(self, own: Measurement) -> float:
        """Return the share of the time of a step that matrix products of its FLOPs would take."""
        return self.step_flops(own) / self.product_flops / own.mean_s


def table(plan: Plan, points: Sequence[Point]) -> str:
    """Return what is printed: one profile in full, or a line for each point of a sweep."""
    measured = [own for point in points for own in point.measured]
    if not measured:
        return f"{plan.swept}: no value could be measured ({points[0].fused})."
    config, world = plan.config, measured[0].world
    title = f"{config.method} on {config.model}, {measured[0].device}, "
    if plan.swept is None:
        pairs = points[0].pairs
        title += (
            f"{pairs} pairs per step, " if world == 1 else f"{world} x {pairs} pairs per step, "
        )
    title += f"precision {config.precision}; {plan.steps} steps after {WARM_UP} of warm-up"
    lines = _profile(plan, points[0]) if plan.swept is None else _sweep(plan, points)
    return "\n".join([title, *lines, *_notes(plan, points, measured[0])])


def _profile(plan: Plan, point: Point) -> list[str]:
    several = point.measured[0].world > 1
    rows: list[tuple[str, Callable[[Measurement], float], str]] = [
        ("pairs/s", lambda own: own.pairs_per_s, "{:,.1f}"),
        ("model FLOP utilisation", point.utilisation, "{:.1%}"),
        ("step", lambda own: 1e3 * own.mean_s, "{:,.1f} ms"),
        ("peak memory", lambda own: own.most_mb, "{:,.0f} MB"),
        ("before the first step", lambda own: own.held_mb, "{:,.0f} MB"),
    ]
    if several:
        rows.insert(1, ("pairs/s per device", lambda own: own.pairs_per_s / own.world, "{:,.1f}"))
        rows.append(("sent per step", lambda own: own.sent_mb, "{:,.2f} MB"))
    lines = [f"{'':<24}{f'fused: {plan.impls[0]}':>30}{'reference':>30}{'difference':>12}"]
    for title, value, form in rows:
        values = [None if isinstance(own, str) else value(own) for own in point.both]
        a, b = values
        cells = [_DASH if x is None else form.format(x) for x in values]
        change = f"{a / b - 1:+.0%}" if a is not None and b else _DASH
        lines.append(f"{title:<24}{cells[0]:>30}{cells[1]:>30}{change:>12}")
    for own, title in zip(point.both, ("fused", "reference"), strict=True):
        if isinstance(own, str):
            lines.append(f"{title}: {own}")
    cells = [_largest(own) for own in point.both]
    lines += [f"{'largest --batch-size':<24}{cells[0]:>30}{cells[1]:>30}", ""]
    lines.append(f"{'of a step':<24}" + 2 * f"{'time':>11}{'share':>7}{'peak':>12}")
    for phase in PHASES:
        found = "".join(
            f"{_DASH:>30}" if isinstance(own, str) else _phase(own, phase) for own in point.both
        )
        lines.append(f"  {phase:<22}{found}")
    return lines


def _phase(own: Measurement, phase: str) -> str:
    seconds, peak = own.phase_s[phase], own.peak_mb[phase]
    memory = f"{peak:,.0f} MB" if peak else _DASH
    return f"{1e3 * seconds:>8,.1f} ms{seconds / own.mean_s:>7.1%}{memory:>12}"


def _largest(own: Measurement | str) -> str:
    found = None if isinstance(own, str) else own.largest
    if found is None:
        return _DASH
    if found.pairs == 0:
        return "none fits"
    more = " or more" if found.too_many is None else ""
    return f"{'about ' if found.is_predicted else ''}{found.pairs:,}{more}"


def _sweep(plan: Plan, points: Sequence[Point]) -> list[str]:
    assert plan.swept is not None
    key = flag(plan.swept)
    head = f"{'pairs/s':>14}{'MFU':>9}{'peak memory':>15}"
    lines = [f"{'':<16}{f'fused: {plan.impls[0]}':>38}{'reference':>38}", f"{key:<16}{head}{head}"]
    for value, point in zip(plan.values, points, strict=True):
        cells = [
            f"{own:>38}"
            if isinstance(own, str)
            else f"{own.pairs_per_s:>14,.1f}{point.utilisation(own):>9.1%}{own.most_mb:>12,.0f} MB"
            for own in point.both
        ]
        lines.append(f"{value:<16}{''.join(cells)}")
    return lines


def _notes(plan: Plan, points: Sequence[Point], own: Measurement) -> list[str]:
    """Return what to know to read the figures; `own` is one of the measurements."""
    point = next(point for point in points if own in point.measured)
    memory = (
        "resident in the process, with its libraries"
        if own.device_type == "cpu"
        else "that torch allocates on the GPU"
    )
    needed = "" if plan.swept else f" ({point.step_flops(own) / 1e9:,.1f} GFLOP per device)"
    lines = [
        "",
        "model FLOP utilisation (MFU): what a step has to compute in towers, heads and losses as "
        f"they are defined{needed}, nothing counted twice, over what torch.mm would compute in its "
        f"time, at {point.product_flops / 1e9:,.1f} GFLOP/s in {own.number_format}.",
        f"memory: {memory}; in other steps than those that are timed.",
    ]
    if plan.swept is None:
        lines.append(
            "times: means, which add up to the step. other: what is between the rest, such as "
            "copying a batch to the GPU."
        )
        found = [m.largest for m in point.measured if m.largest is not None]
        if found and found[0].is_predicted:
            lines.append("largest --batch-size: predicted from the peaks of smaller batches.")
        elif found:
            lines.append("largest --batch-size: tried, to within a sixteenth.")
    if own.world > 1 and plan.swept is None:
        theirs = open_clip_bytes(point.pairs, point.config.preset.embed_dim, own.world, 4) / 1e6
        lines.append(
            f"sent per step: by each of {own.world} processes, without the gradients of weights. "
            f"open_clip's all-gather of global features in fp32, and back: {theirs:,.2f} MB"
        )
    return lines


def document(plan: Plan, points: Sequence[Point]) -> dict[str, Any]:
    """Return what is written as JSON: keys end in units, and MB are 10**6 bytes."""
    measured = [own for point in points for own in point.measured]
    return {
        **provenance(),
        "python": platform.python_version(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": measured[0].device if measured else None,
        "settings": dataclasses.asdict(plan.config),
        "warm_up_steps": WARM_UP,
        "timed_steps": plan.steps,
        "points": [_point(plan, point) for point in points],
    }


def _point(plan: Plan, point: Point) -> dict[str, Any]:
    variants = zip(plan.impls, point.both, strict=True)
    found: dict[str, Any] = {
        "batch_size_pairs": point.config.batch_size,
        "accum_freq_batches": point.config.accum_freq,
        "workers_processes": point.config.workers,
        "variants": [_variant(point, impl, own) for impl, own in variants],
    }
    if point.measured:
        own = point.measured[0]
        found |= {
            "world_processes": own.world,
            "number_format": own.number_format,
            "matrix_product_flop_per_s": point.product_flops,
            "model_flop_per_step_and_device": point.step_flops(own),
        }
    return found


def _variant(point: Point, impl: str, own: Measurement | str) -> dict[str, Any]:
    if isinstance(own, str):
        return {"fused_loss": impl, "failure": own}
    found: dict[str, Any] = {
        "fused_loss": impl,
        "pairs_per_s": own.pairs_per_s,
        "pairs_per_s_and_device": own.pairs_per_s / own.world,
        "model_flop_utilisation_share": point.utilisation(own),
        "step_mean_s": own.mean_s,
        "step_median_s": statistics.median(own.step_s),
        "steps_s": own.step_s,
        "phases_mean_s": own.phase_s,
        "memory_before_first_step_mb": own.held_mb,
        "peak_memory_mb": own.most_mb,
        "phases_peak_memory_mb": own.peak_mb,
        "sent_per_step_mb": own.sent_mb,
        "caption_mean_tokens": own.tokens,
        "caption_mean_words": own.words,
    }
    if own.largest is not None:
        found |= {
            "largest_batch_size_pairs": own.largest.pairs,
            "too_large_batch_size_pairs": own.largest.too_many,
            "largest_batch_size_is_predicted": own.largest.is_predicted,
        }
    return found
