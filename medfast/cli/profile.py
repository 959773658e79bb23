"""The command line of `medfast profile`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from medfast.cli.settings import merged_settings, settings_parser
from medfast.config import TrainConfig, flag
from medfast.errors import SharedError, UsageError, unknown_name
from medfast.profile.plan import SWEPT, Plan

EPILOG = """\
It takes the flags of medfast train, and leaves no run. Each variant is measured in a fresh process,
one after the other."""


def parse_profile(argv: Sequence[str] | None = None) -> Plan:
    """Return what to profile, and where the results go.

    Raises:
        UsageError: a value is not acceptable.
    """
    parser = settings_parser("profile", EPILOG)
    group = parser.add_argument_group("profile")
    group.add_argument(
        "--steps", type=int, default=10, metavar="N", help="Steps to time. (default: 10)"
    )
    keys = ", ".join(flag(name).removeprefix("--") for name in SWEPT)
    group.add_argument(
        "--sweep",
        metavar="KEY=N,N,...",
        help=f"Measure with several values of one setting, as in batch-size=64,128. KEY is one of: "
        f"{keys}.",
    )
    group.add_argument(
        "--out",
        metavar="DIR",
        help="Folder of the JSON and the picture. (default: profiles/ and method, model and time)",
    )
    group.add_argument(
        "--trace",
        metavar="FILE",
        help="Also write a Chrome trace of a few steps, as .json or .json.gz.",
    )
    given = vars(parser.parse_args(argv))
    own = {name: given.pop(name, None) for name in ("steps", "sweep", "out", "trace")}
    try:
        return _plan(TrainConfig(**merged_settings(given)), **own)
    except UsageError as error:
        # Every process has the same command line.
        raise SharedError(str(error)) from None


def _plan(
    config: TrainConfig, steps: int, sweep: str | None, out: str | None, trace: str | None
) -> Plan:
    if steps < 1:
        raise UsageError(f"--steps must be at least 1; got {steps}.")
    if config.fused_loss == "reference":
        raise UsageError(
            "--no-fused-loss: the reference is what the profile compares with; name another "
            "implementation with --fused-loss."
        )
    for name in ("resume", "dry_run"):
        if getattr(config, name):
            raise UsageError(f"{flag(name)} is for medfast train; leave it out.")
    if trace is not None and sweep is not None:
        raise UsageError("--trace is of one profile; leave out --sweep.")
    if trace is not None and not trace.endswith((".json", ".json.gz")):
        raise UsageError(f"--trace must be a file that ends in .json or .json.gz; got {trace!r}.")
    name = time.strftime(f"{config.method}-{config.model}-%Y%m%d-%H%M%S")
    plan = Plan(
        config=config,
        steps=steps,
        out=Path("profiles", name) if out is None else Path(out).expanduser(),
        trace=None if trace is None else Path(trace).expanduser(),
    )
    return plan if sweep is None else _with_sweep(plan, sweep)


def _with_sweep(plan: Plan, sweep: str) -> Plan:
    """Return the plan with the values of --sweep."""
    known = {flag(name).removeprefix("--"): name for name in SWEPT}
    key, is_there, text = sweep.partition("=")
    if not is_there or not text:
        raise UsageError(f"--sweep must be KEY=N,N,..., as in batch-size=64,128; got {sweep!r}.")
    if key not in known:
        raise UsageError(unknown_name("--sweep", key, known))
    try:
        values = tuple(dict.fromkeys(int(value) for value in text.split(",")))
    except ValueError:
        raise UsageError(
            f"--sweep {key} must be whole numbers with commas between; got {text!r}."
        ) from None
    found = dataclasses.replace(plan, swept=known[key], values=values)
    try:
        found.configs()
    except UsageError as error:
        raise UsageError(f"--sweep: {error}") from None
    return found
