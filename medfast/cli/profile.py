"""The command line of `medfast profile`."""

from __future__ import annotations

from collections.abc import Sequence

from medfast.cli.settings import merged_settings, settings_parser
from medfast.config import TrainConfig, flag
from medfast.errors import UsageError


def parse_profile(argv: Sequence[str] | None = None) -> tuple[TrainConfig, int]:
    """Return the settings of the run to profile, and how many steps to time.

    Raises:
        UsageError: a value is not acceptable.
    """
    parser = settings_parser("profile", "It takes the flags of medfast train and leaves no run.")
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="Steps to time (default: 20)"
    )
    given = vars(parser.parse_args(argv))
    steps = given.pop("steps")
    if steps < 1:
        raise UsageError(f"--steps must be at least 1; got {steps}.")
    config = TrainConfig(**merged_settings(given))
    if config.fused_loss == "reference":
        raise UsageError(
            "--no-fused-loss: the reference is what the profile compares with; name another "
            "implementation with --fused-loss."
        )
    for name in ("resume", "dry_run"):
        if getattr(config, name):
            raise UsageError(f"{flag(name)} is for medfast train; leave it out.")
    return config, steps
