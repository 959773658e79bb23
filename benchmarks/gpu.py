"""`python -m benchmarks.gpu`: is every op right on the GPU at hand, and how fast is it?

Correctness first, then speed beside the peers, within a budget of time; the last thing printed is a
short table of the targets, and one JSON holds everything. All runs in a process aside, so that a
kernel that hangs or spoils the GPU costs its own measurements alone. `--device cpu --small` does
what a machine without a GPU can, in seconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import results, targets
from benchmarks.checks import CHECKS, Check, Subject
from benchmarks.compare import compare, failures
from benchmarks.conditions import conditions
from benchmarks.ops import OPS, Shape
from benchmarks.peers import installed
from benchmarks.targets import Target
from benchmarks.worker import CallError, LostError, Worker
from medfast.ops import dispatch

BUDGET_S = 460.0
# Of it, what the checks may take before the rest of them is left out.
CHECKS_S = 150.0
# After so long a check hangs; a comparison after so many times its cost, and what compilers take.
CHECK_S = 60.0
COST_FACTOR, COMPILERS_S = 2.0, 30.0

# Implementations of a table's op that lost a process, and how.
Losses = dict[tuple[str, str], str]


@dataclass(frozen=True)
class Case:
    """One comparison: its size, about what it costs in seconds, and what it should reach."""

    op: str
    shape: Shape
    cost_s: float
    wanted: tuple[Target, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def _small_batches() -> Iterator[Case]:
    # A step this short is felt by the caller, whose time counts too.
    only = (
        "medfast triton *[26]",
        "medfast cuda *[26]",
        "open_clip fp32",
        "open_clip autocast bf16",
    )
    for B in (256, 512, 1024, 2048, 4096):
        for clock in ("device", "wall"):
            wanted = (
                Target("medfast * fp32", 1.0, than="open_clip fp32"),
                Target("medfast * bf16", 1.0, than="open_clip autocast bf16"),
            )
            options = {"only": only, "seconds": 1, "clock": clock}
            yield Case("clip_loss", (B, 512), 4, wanted, options)


_BF16 = ("medfast * bf16*", "open_clip autocast bf16", "inf-cl fp32", "*-* bf16")
_OWN = ("medfast triton bf16", "medfast cuda bf16")
# Written for one H200; the table says what the GPU at hand is.
CASES = (
    Case(
        "clip_loss",
        (65536, 512),
        80,
        (
            Target("medfast * bf16", 33e-3),
            Target("medfast cuda bf16", 28e-3),
            Target("medfast * bf16", 3.0, than="open_clip autocast bf16"),
            Target("medfast * bf16*", 0.3e9, key="peak_bytes"),
            Target("medfast * bf16*", 50.0, than="open_clip autocast bf16", key="peak_bytes"),
        ),
        {"without": ("open_clip fp32, compiled",)},
    ),
    Case("clip_loss", (65536, 768), 30, (Target("medfast * bf16", 42e-3),), {"only": _BF16}),
    Case(
        "siglip_loss",
        (65536, 768),
        40,
        (
            Target("medfast * bf16", 31e-3),
            Target("medfast * bf16", 1.0, than="siglip-kernel bf16"),
        ),
        {"only": _BF16},
    ),
    *_small_batches(),
    Case("clip_loss", (262144, 512), 40, (Target("medfast * bf16", 0.55),), {"only": _OWN}),
    # 700 TFLOP/s for four products.
    Case("clip_loss", (32768, 2048), 25, (Target("medfast * bf16", 25.1e-3),), {"only": _BF16}),
    Case("clip_loss", (65536, 512), 10, (), {"only": _OWN, "passes": "forward"}),
    Case("clip_loss", (65536, 512), 10, (), {"only": _OWN, "passes": "backward"}),
    Case(
        "retrieval_rank",
        (4096, 50000, 512),
        10,
        (Target("medfast *", 1.8, "chunked topk(200) fp32"),),
    ),
    Case(
        "paired_ranks",
        (50000, 512),
        15,
        (Target("medfast *", 3.0, "chunked topk(200) fp32, twice"),),
    ),
    Case("cyclip_loss", (16384, 512), 10),
    # B, P, T, mean number of words, D.
    Case(
        "local_alignment_loss",
        (256, 196, 77, 77, 512),
        15,
        (Target("medfast * bf16", 12e-3),),
        {"only": ("medfast * bf16",)},
    ),
    Case("local_alignment_loss", (256, 196, 77, 30, 512), 10, (), {"only": _OWN}),
    Case(
        "local_alignment_loss",
        (1024, 196, 77, 77, 512),
        40,
        (Target("medfast * bf16", 170e-3), Target("medfast * bf16", 2e9, key="peak_bytes")),
        {"only": _OWN},
    ),
    Case(
        "filip_loss",
        (1024, 196, 77, 77, 512),
        40,
        (Target("medfast * bf16", 100e-3), Target("medfast * bf16", 1e9, key="peak_bytes")),
        {"only": (*_OWN, "late-interaction-kernels bf16")},
    ),
    Case(
        "filip_loss",
        (128, 1024, 1024, 1024, 512),
        30,
        (
            Target("medfast * bf16", 35e-3),
            Target("medfast * bf16", 1.0, than="flash-maxsim bf16"),
            Target("medfast * bf16", 1.0, than="late-interaction-kernels bf16"),
        ),
        {"only": (*_OWN, "*-* bf16"), "passes": "forward"},
    ),
    Case(
        "sparc_loss",
        (256, 196, 77, 77, 512),
        10,
        (Target("medfast * bf16", 2.0, than="eager autocast bf16"),),
        {"only": (*_OWN, "eager*"), "without": ("*compiled",)},
    ),
)
_SMALL_B, _SMALL_D = 96, 64


class Budget:
    """The seconds of the whole run."""

    def __init__(self, seconds: float) -> None:
        self._begin, self._seconds = time.monotonic(), seconds

    def spent(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._begin

    def why_not(self, cost_s: float, within: float | None = None) -> str | None:
        """Return why something of this cost is left out, or None."""
        limit = self._seconds if within is None else within
        if self.spent() + cost_s <= limit:
            return None
        return f"about {cost_s:.0f} s would burst the budget of {limit:.0f} s"


def run_checks(
    device: str, budget: Budget, small: bool, worker: Worker, losses: Losses
) -> Iterator[dict[str, Any]]:
    """Yield one row per check: "passed" is None where it was left out for the "reason".

    An implementation that loses the process is noted among the losses, and asked no more.
    """
    for check in CHECKS:
        # The sizes outside: what the budget cuts off is the largest, of all ops alike.
        for shape in check.shapes:
            for subject in _subjects(check, device):
                yield _answer(check, shape, subject, budget, small, worker, losses)


def _subjects(check: Check, device: str) -> Iterator[Subject]:
    for name, op in OPS.items():
        if check.needs_gradient and not op.has_gradient:
            continue
        if check.needs_pairs and not op.scores_pairs:
            continue
        for impl in dispatch.IMPLEMENTATIONS[op.table]:
            for dtype in check.dtypes if impl != "reference" else ():
                yield Subject(name, impl, dtype, device)


def _answer(
    check: Check,
    shape: Shape,
    subject: Subject,
    budget: Budget,
    small: bool,
    worker: Worker,
    losses: Losses,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "check": check.ask.__name__,
        "op": subject.name,
        "impl": subject.impl,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "shape": list(shape),
        "passed": None,
    }
    probe = torch.empty(1, 1, dtype=subject.dtype, device=subject.device)
    reason = dispatch.why_not(subject.op.table, subject.impl, probe)
    if reason is None and check.needs_cuda and subject.device != "cuda":
        reason = "needs a GPU"
    if reason is None and small and shape[0] > _SMALL_B * 2:
        reason = "not in a small run"
    key = (subject.op.table, subject.impl)
    reason = reason or losses.get(key) or budget.why_not(0, within=CHECKS_S)
    if reason is None:
        try:
            worker.call(CHECK_S, check.ask, subject, shape)
        except CallError as error:  # whatever one kernel does, the others are still asked
            row |= {"passed": False, "reason": str(error)}
            if isinstance(error, LostError):
                losses[key] = f"not asked after {_title(row)}: {error}"
        else:
            row["passed"] = True
    else:
        row["reason"] = reason
    return row


def run_cases(
    device: str, budget: Budget, small: bool, worker: Worker, losses: Losses
) -> Iterator[dict[str, Any]]:
    """Yield one comparison per case, with its targets; one left out has the reason instead.

    Implementations among the losses take no part.
    """
    for case in CASES:
        shape, options = case.shape, {"seconds": 4.0, **case.options}
        lost = [f"medfast {i} *" for table, i in losses if table == OPS[case.op].table]
        options["without"] = (*options.get("without", ()), *lost)
        reason = budget.why_not(0 if small else case.cost_s)
        comparison: dict[str, Any] = {
            "op": case.op,
            "shape": list(shape),
            "device": device,
            "passes": options.get("passes", "both"),
            "clock": options.get("clock", "device"),
            "allocator": None,
            "rows": [],
        }
        if reason is None:
            if small:
                few = min(_SMALL_B, OPS[case.op].few)
                shape = (min(shape[0], few), *(min(x, _SMALL_B) for x in shape[1:-1]), _SMALL_D)
                options |= {"seconds": 0.1, "with_memory": False}
                options["without"] = (*options["without"], "*compiled")
            limit = COST_FACTOR * case.cost_s + COMPILERS_S
            try:
                comparison = worker.call(limit, compare, case.op, shape, device=device, **options)
            except CallError as error:  # a speed that is missing does not cost the others
                reason = str(error)
        if reason is not None:
            comparison["reason"] = reason
        judged = [targets.judge(target, comparison) for target in case.wanted]
        if small:
            # Times at this size say nothing about the targets.
            judged = [
                {
                    **found,
                    "shape": list(case.shape),
                    "variant": target.variant,
                    "measured": None,
                    "why": "small run",
                }
                for target, found in zip(case.wanted, judged, strict=True)
            ]
        elif reason is not None:
            judged = [{**found, "why": reason} for found in judged]
        yield {**comparison, "targets": judged}


def run(device: str, small: bool, save: Callable[..., Path]) -> int:
    """Run everything, saving after each part; return the exit code."""
    budget, losses = Budget(BUDGET_S), Losses()
    found: dict[str, Any] = {"peers": installed(), "checks": [], "comparisons": []}
    with Worker() as worker:
        for row in run_checks(device, budget, small, worker, losses):
            found["checks"].append(row)
            if row["passed"] is False:
                _say(budget, f"WRONG {_title(row)}: {row['reason']}")
        save(**found)
        _say(budget, f"{len(found['checks'])} checks done")
        for comparison in run_cases(device, budget, small, worker, losses):
            found["comparisons"].append(comparison)
            path = save(**found)
            for line in _rows(comparison):
                _say(budget, line)
    print(summary(found, device, budget))
    print(f"wrote {path}")
    wrong = any(row["passed"] is False for row in found["checks"])
    return int(wrong or any(failures(comparison) for comparison in found["comparisons"]))


def summary(found: dict[str, Any], device: str, budget: Budget) -> str:
    """Return the short table: what is wrong, what was left out, and each target."""
    checks = found["checks"]
    passed, wrong, left_out = (
        [row for row in checks if row["passed"] is verdict] for verdict in (True, False, None)
    )
    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    lines = [
        "",
        f"{name}, {budget.spent():.0f} s: {len(passed)} checks passed, {len(wrong)} failed, "
        f"{len(left_out)} left out (the JSON says why)",
        *(f"  WRONG {_title(row)}: {row['reason']}" for row in wrong),
    ]
    for comparison in found["comparisons"]:
        lines += [f"  WRONG {sentence}" for sentence in failures(comparison)]
    left = {
        (row["variant"], row["skipped"])
        for comparison in found["comparisons"]
        for row in comparison["rows"]
        if "skipped" in row
    }
    lines += [f"  left out {variant}: {reason}" for variant, reason in sorted(left)]
    judged = [targets.line(t) for comparison in found["comparisons"] for t in comparison["targets"]]
    return "\n".join([*lines, "", targets.table(judged)])


def _rows(comparison: dict[str, Any]) -> Iterator[str]:
    size = targets.size(*comparison["shape"])
    title = f"{comparison['op']} {size}, {comparison['passes']}"
    if "reason" in comparison:
        yield f"{title}: left out, {comparison['reason']}"
    for row in comparison["rows"]:
        text = row.get("failed")
        if "median_s" in row:
            text = (
                f"{targets.quantity(row['median_s'])}, {row['tflops']:.1f} TFLOP/s, "
                f"{row['percent_of_mm']:.0f} % of torch.mm"
            )
        if text is not None:
            yield f"{title}, {row['variant']}: {text}"


def _title(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['impl']} {row['dtype']} {row['check']} {row['shape']}"


def _say(budget: Budget, text: str) -> None:
    print(f"{budget.spent():6.1f} s  {text}", flush=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to run")
    parser.add_argument("--small", action="store_true", help="small sizes: whether it all runs")
    parser.add_argument("--out", type=Path, help="the JSON (default: in benchmarks/results)")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: error: there is no GPU that torch can use; on this machine run "
            "--device cpu --small.",
            file=sys.stderr,
        )
        sys.exit(2)
    name, where = "gpu_small" if given.small else "gpu", conditions(given.device)

    def save(**content: Any) -> Path:
        if given.out is None:
            return results.write(name, where, **content)
        results.save(given.out, name, where, **content)
        return given.out

    sys.exit(run(given.device, given.small, save))


if __name__ == "__main__":
    main()
