"""The largest batch that fits into memory: found by trying, or predicted from smaller ones."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from medfast.data.loader import Batch
from medfast.device import forget_peak_memory, peak_memory
from medfast.profile.memory import OutOfMemoryError, memory_for_steps, naming_lack
from medfast.trainer import Trainer

# Pairs beyond which nobody looks.
MOST = 2**16
# How many times the pairs that were measured a parabola is trusted: with few pairs the square,
# which decides in the end, is lost in what allocators and libraries do.
_FURTHEST = 16
# Bytes between two peaks below which allocators and libraries decide, not the pairs.
_LEAST_GROWTH = 2**24


@dataclass(frozen=True)
class Largest:
    """The largest value of --batch-size, all other settings as they are.

    Attributes:
        pairs: That fit; 0 if none do.
        too_many: The fewest that were found not to fit, at most a sixteenth more; None if all fit
            that were looked at.
        is_predicted: Whether it follows from peaks of memory at smaller sizes, and was not tried.
    """

    pairs: int
    too_many: int | None
    is_predicted: bool


def try_largest(trainer: Trainer, batch: Batch) -> Largest:
    """Return the largest batch of which two steps succeed on this process's GPU.

    Args:
        trainer: Its weights change.
        batch: Whose pairs come again and again.
    """

    def fits(pairs: int) -> bool:
        try:
            with naming_lack():
                own = resized(batch, pairs)
                for _ in range(2):
                    trainer.train_step([own] * trainer.parts)
                torch.cuda.synchronize(trainer.device)
            has_succeeded = True
        except OutOfMemoryError:
            has_succeeded = False
        # Only now are the frames gone that the error held, with all their activations.
        trainer.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        return has_succeeded

    return Largest(*search(fits, trainer.config.batch_size), is_predicted=False)


def predict_largest(trainer: Trainer, batch: Batch) -> Largest | None:
    """Return the largest batch that fits by the peaks of a quarter, a half and all of one.

    They are the first steps of a process: later ones find memory that larger steps have left. The
    peak is a straight line in the pairs, as it is with the fused losses beyond their workspace;
    with the reference, which keeps a value for each two pairs, a parabola.

    Args:
        trainer: Before its first step.
        batch: Whose pairs come again and again.

    Returns:
        None if the peaks hardly grow, as with a few small pairs.
    """
    full = trainer.config.batch_size
    sizes = sorted({max(2, full // part) for part in (4, 2, 1)})
    most = memory_for_steps(trainer.device)
    # The first step makes the optimiser's state.
    peaks = [_peak(trainer, batch, size) for size in (sizes[0], *sizes)][1:]
    has_square = trainer.config.fused_loss == "reference"
    peak = extrapolated(sizes, peaks, has_square)
    if peak is None or peaks[-1] - peaks[0] < _LEAST_GROWTH:
        return None
    until = min(MOST, _FURTHEST * full) if has_square else MOST
    return Largest(*search(lambda pairs: peak(pairs) <= most, full, until), is_predicted=True)


def _peak(trainer: Trainer, batch: Batch, pairs: int) -> int:
    own = resized(batch, pairs)
    forget_peak_memory(trainer.device)
    trainer.train_step([own] * trainer.parts)
    return peak_memory(trainer.device)


def extrapolated(
    sizes: Sequence[int], peaks: Sequence[float], has_square: bool
) -> Callable[[int], float] | None:
    """Return the curve through the last peaks.

    Args:
        sizes: Pairs, from few to many; one or more.
        peaks: Bytes of each.
        has_square: Through the last three, by a parabola if they bend upwards; else the last two.

    Returns:
        Bytes by the pairs; None if the peaks do not grow.
    """
    slopes = [(peaks[i + 1] - peaks[i]) / (sizes[i + 1] - sizes[i]) for i in range(len(sizes) - 1)]
    if not slopes or slopes[-1] <= 0:
        return None
    bend = 0.0
    if has_square and len(slopes) > 1:
        bend = max(0.0, (slopes[-1] - slopes[-2]) / (sizes[-1] - sizes[-3]))

    # Newton's form.
    def peak(pairs: int) -> float:
        beyond = pairs - sizes[-1]
        return peaks[-1] + beyond * (slopes[-1] + bend * (pairs - sizes[-2]))

    return peak


def search(fits: Callable[[int], bool], start: int, most: int = MOST) -> tuple[int, int | None]:
    """Return the most pairs that fit, and the fewest known not to, at most a sixteenth more.

    It doubles, then halves what is between.

    Args:
        fits: Whether so many do.
        start: Where to begin.
        most: Pairs beyond which it does not look.

    Returns:
        Both; 0 where none fit, None where `most` do.
    """
    good, bad, size = 0, None, min(start, most)
    while bad is None and good < most:
        if fits(size):
            good, size = size, min(2 * size, most)
        else:
            bad = size
    # A single pair is no batch.
    while bad is not None and bad > 2 and bad - good > max(1, good // 16):
        middle = max(2, (good + bad) // 2)
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good, bad


def resized(batch: Batch, pairs: int) -> Batch:
    """Return a batch of so many pairs, those of `batch` over and over."""
    rows = torch.arange(pairs) % len(batch)
    found: Batch = _rows(replace(batch, skipped=()), rows)
    return found


def _rows(part: Any, rows: Tensor) -> Any:
    """Return these rows of a batch, or of a part of one."""
    if isinstance(part, Tensor):
        return part[rows.to(part.device)]
    if is_dataclass(part) and not isinstance(part, type):
        return replace(
            part, **{own.name: _rows(getattr(part, own.name), rows) for own in fields(part)}
        )
    return tuple(_rows(own, rows) for own in part) if isinstance(part, tuple) else part
