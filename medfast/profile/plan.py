"""What a profile is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medfast.config import Impl, TrainConfig

# The settings that a sweep may vary.
SWEPT = ("batch_size", "accum_freq", "workers")


@dataclass(frozen=True)
class Plan:
    """What to profile, and where the results go.

    Attributes:
        config: The settings of the run.
        steps: How many steps to time.
        out: The folder of the results.
        trace: The Chrome trace to write.
        swept: The setting that a sweep varies; None without one.
        values: Those that it takes.
    """

    config: TrainConfig
    steps: int
    out: Path
    trace: Path | None = None
    swept: str | None = None
    values: tuple[int, ...] = ()

    @property
    def impls(self) -> tuple[Impl, Impl]:
        """The implementations of the losses that are compared, the reference last."""
        return self.config.fused_loss, "reference"

    def configs(self) -> list[TrainConfig]:
        """Return the settings of each point of a sweep, or those of the run alone.

        Raises:
            UsageError: a value of the sweep is not acceptable.
        """
        if self.swept is None:
            return [self.config]
        changes: list[dict[str, Any]] = [{self.swept: value} for value in self.values]
        return [replace(self.config, **change) for change in changes]
