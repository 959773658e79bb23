"""What the steps of one run take, as one of its processes sees them."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medfast.config import TrainConfig
from medfast.device import autocast, forget_peak_memory
from medfast.distributed.processes import Processes, join
from medfast.errors import UsageError
from medfast.profile.largest import Largest, predict_largest, try_largest
from medfast.profile.memory import naming_lack
from medfast.profile.phases import (
    OTHER,
    PHASES,
    GpuStopwatch,
    Meter,
    PeakMemory,
    Phases,
    Ranges,
    Stopwatch,
    watched,
)
from medfast.trainer import Trainer, Work

# The first steps allocate, and choose among kernels.
WARM_UP = 3
# Steps in which a phase shows its peak of memory, and that a trace holds.
MEMORY_STEPS, TRACE_STEPS = 2, 3
# Rows and columns of the products whose rate is measured.
_SIDES = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Measurement:
    """What the steps of one run took, as this process and its device see them.

    MB are 10**6 bytes: of a GPU those that torch has allocated, else those that are resident in the
    process, with all its libraries.

    Attributes:
        step_s: Seconds of each step that was timed.
        phase_s: Mean seconds of each phase of a step; together they are its mean.
        pairs: Mean number of pairs of all processes in a step.
        world: Processes.
        held_mb: In use before the first step.
        peak_mb: Most in use in each phase.
        sent_mb: What this process sends to others in a step, but for weights' gradients.
        tokens: Mean length to which the captions of a batch are padded.
        words: Mean number of words that count in a caption.
        product_flops: FLOP/s of matrix products in the number format of the run.
        number_format: Its name.
        device: The device's name.
        device_type: "cpu" or "cuda".
        largest: The largest batch that fits; None if it is not asked for or cannot be told.
    """

    step_s: list[float]
    phase_s: dict[str, float]
    pairs: float
    world: int
    held_mb: float
    peak_mb: dict[str, float]
    sent_mb: float
    tokens: float
    words: float
    product_flops: float
    number_format: str
    device: str
    device_type: str
    largest: Largest | None = None

    @property
    def mean_s(self) -> float:
        """Mean seconds of a step."""
        return statistics.fmean(self.step_s)

    @property
    def pairs_per_s(self) -> float:
        """Pairs of all processes over all the time."""
        return self.pairs / self.mean_s

    @property
    def most_mb(self) -> float:
        """Most in use in a step."""
        return max(self.peak_mb.values())


def measure(
    config: TrainConfig,
    steps: int,
    name: str = "run",
    trace: Path | None = None,
    finds_largest: bool = False,
) -> Measurement:
    """Train in this process, and return what `steps` steps take after `WARM_UP` others.

    Times, peaks of memory and the trace are of different steps, so that none disturbs another.

    Args:
        config: The settings.
        steps: How many steps to time.
        name: By which processes find one another; others may have the same store.
        trace: The Chrome trace that the first process writes.
        finds_largest: Also tell the largest batch that fits.

    Raises:
        OutOfMemoryError: there is not enough for the steps.
        UsageError: something that the user can mend.
    """
    with tempfile.TemporaryDirectory() as logs, naming_lack():
        processes = join(config.timeout, config.comm, name)
        trainer = _trainer(dataclasses.replace(config, logs=logs, name="profile"), processes)
        device, batches, ring = trainer.device, _steps(trainer), processes.ring
        number_format, product_flops = product_rate(config.precision, device)
        # Where a lack of memory of one process would leave the others waiting, nobody tries.
        is_tried = device.type == "cuda" and processes.world == 1
        held = forget_peak_memory(device)
        largest = None
        if finds_largest and not is_tried:
            largest = predict_largest(trainer, next(batches).batches[0])
        for _ in range(WARM_UP):
            trainer.train_step(next(batches).batches)
        sent = ring.sent if ring else 0
        clock: Meter = GpuStopwatch(device) if device.type == "cuda" else Stopwatch()
        timed = _take(trainer, batches, steps, clock)
        sent = (ring.sent if ring else 0) - sent
        peaks = _take(trainer, batches, MEMORY_STEPS, PeakMemory(device)).totals
        if trace is not None:
            _write_trace(trainer, batches, trace)
        if finds_largest and is_tried:
            largest = try_largest(trainer, next(batches).batches[0])
        world = processes.world
        processes.part()
    step_s = [sum(step.values()) for step in timed.totals]
    captions = sum(len(mask) for mask in timed.word_masks)
    return Measurement(
        step_s=step_s,
        phase_s={p: statistics.fmean(step[p] for step in timed.totals) for p in PHASES},
        pairs=timed.pairs / steps,
        world=world,
        held_mb=held / 1e6,
        peak_mb={p: max(step[p] for step in peaks) / 1e6 for p in PHASES},
        sent_mb=sent / steps / 1e6,
        tokens=statistics.fmean(mask.shape[1] for mask in timed.word_masks),
        words=sum(int(mask.sum()) for mask in timed.word_masks) / captions,
        product_flops=product_flops,
        number_format=number_format,
        device=_name(device),
        device_type=device.type,
        largest=largest,
    )


@dataclass(frozen=True)
class _Taken:
    """Steps that were taken: what a meter says of their phases, their pairs and captions."""

    totals: list[dict[str, float]]
    pairs: int
    word_masks: list[Tensor]


def _take(trainer: Trainer, batches: Iterator[Work], count: int, meter: Meter) -> _Taken:
    """Take steps, and have `meter` read at each change of phase."""
    phases = Phases(meter)
    pairs, word_masks = 0, []
    with watched(trainer.one_step, phases):
        for _ in range(count):
            phases.step()
            work = next(batches)
            phases.switch(OTHER)
            trainer.train_step(work.batches)
            pairs += work.pairs
            word_masks += [batch.word_mask for batch in work.batches]
        phases.stop()
    return _Taken(phases.totals(), pairs, word_masks)


def _write_trace(trainer: Trainer, batches: Iterator[Work], path: Path) -> None:
    """Write what a few steps do to a file for chrome://tracing, their phases as ranges."""
    from torch.profiler import ProfilerActivity, profile

    if not trainer.processes.is_first:
        _take(trainer, batches, TRACE_STEPS, Ranges())
        return
    kinds = [ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as profiler:
        _take(trainer, batches, TRACE_STEPS, Ranges())
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
    profiler.export_chrome_trace(str(path))


def product_rate(precision: str, device: torch.device, seconds: float = 0.5) -> tuple[str, float]:
    """Return the number format of the towers' matrix products and the FLOP/s of `torch.mm` in it.

    Args:
        precision: A value of --precision.
        device: Where to multiply.
        seconds: How long to go on, at least; the rate is that of the median product.
    """
    weights = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    side = _SIDES[device.type]
    with autocast(precision, device):
        one = torch.ones(1, 1, device=device, dtype=weights)
        dtype = torch.mm(one, one).dtype
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    clock: Meter = GpuStopwatch(device) if device.type == "cuda" else Stopwatch()
    torch.mm(a, b)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        begin = clock.read(None)
        torch.mm(a, b)
        times.append(clock.total([(begin, clock.read(None))]))
    return str(dtype).removeprefix("torch."), 2 * side**3 / statistics.median(times)


def _trainer(config: TrainConfig, processes: Processes) -> Trainer:
    """Return the trainer that `medfast train` would make for these settings."""
    from medfast.data.skipped import SkippedSamples
    from medfast.device import pick_device
    from medfast.parts import (
        data_sources,
        load_tokenizer,
        new_method,
        new_model,
        read_pairs,
        spread,
        training_loader,
    )
    from medfast.run_folder import RunFolder

    device = pick_device(config.device, None if processes.ring is None else processes.local_rank)
    method = new_method(config, device)
    run = RunFolder.create(config)
    pairs = read_pairs(config, data_sources(config), "train")
    tokenizer = load_tokenizer(config, method, pairs.records, run)
    model = new_model(config, method, tokenizer, device).train()
    spread(config, method, model, processes)
    return Trainer(
        config=config,
        model=model,
        method=method,
        loader=training_loader(config, pairs, tokenizer, method, device, processes),
        run=run,
        skipped=SkippedSamples(run.skipped, len(pairs.records), config.max_bad_samples),
        device=device,
        validate=dict,
        processes=processes,
    )


def _steps(trainer: Trainer) -> Iterator[Work]:
    """Yield what steps with something to contrast take, epoch after epoch.

    Raises:
        UsageError: an epoch has none.
    """
    usable = True
    while usable:
        usable = False
        for step in trainer.steps():
            usable = True
            yield step
        trainer.epoch, trainer.epoch_step = trainer.epoch + 1, 0
    raise UsageError("no batch holds two usable training pairs, so there is nothing to time.")


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    name = names[0] if names else platform.machine()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"
