"""`python -m medfast.profile`: what a fused loss saves in training steps, in time and memory."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING

from medfast import cli
from medfast.config import Impl, TrainConfig
from medfast.errors import UsageError

if TYPE_CHECKING:
    import torch

    from medfast.distributed.processes import Processes
    from medfast.trainer import Trainer, Work

# The first steps allocate, and choose among kernels.
WARM_UP = 3


@dataclass(frozen=True)
class Measurement:
    """What the steps of one run took.

    Attributes:
        step_s: Median seconds of a step whose batch is there: towers, loss, gradients, update.
        pairs_per_s: Pairs over the whole time, waiting for data included.
        memory_mb: Most memory above what the process held before its first step, in MB.
        sent_mb: What this process sends to others in a step but for weights' gradients, in MB.
    """

    step_s: float
    pairs_per_s: float
    memory_mb: float
    sent_mb: float = 0.0


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m medfast.profile ...`."""

    def command() -> None:
        config, steps = cli.parse_profile(argv)
        cli.log_to_console()
        table = profile(config, steps)
        if cli.rank() == 0:
            print(table)

    cli.run(command, "medfast.profile")


def profile(config: TrainConfig, steps: int) -> str:
    """Return a table of `steps` training steps with the fused loss and with the reference.

    Each variant runs in a fresh process, one after the other. Under torchrun each of its processes
    does so, and the figures are those of the first.

    Raises:
        UsageError: something that the user can mend.
    """
    from medfast.device import pick_device
    from medfast.distributed.cost import open_clip_bytes
    from medfast.distributed.processes import announced
    from medfast.parts import data_sources, new_method

    device = pick_device(config.device)
    world = announced()
    impls: tuple[Impl, Impl] = (config.fused_loss, "reference")
    for impl in impls:
        new_method(dataclasses.replace(config, fused_loss=impl), device)
    data_sources(config)  # writes the phantom, if need be, before any clock runs
    fused, reference = (
        _in_fresh_process(dataclasses.replace(config, fused_loss=impl), steps) for impl in impls
    )
    lines = [
        f"{config.method} on {config.model}, {device}, {_pairs(config, world)} pairs per step, "
        f"precision {config.precision}; {steps} steps after {WARM_UP} of warm-up",
        f"{'':<18}{f'fused: {impls[0]}':>14}{'reference':>14}{'difference':>14}",
    ]
    for title, name, form in (
        ("step time, median", "step_s", "{:,.3f} s"),
        ("pairs/s", "pairs_per_s", "{:,.1f}"),
        ("peak memory", "memory_mb", "{:,.0f} MB"),
        *([("sent per step", "sent_mb", "{:,.2f} MB")] if world > 1 else []),
    ):
        a, b = getattr(fused, name), getattr(reference, name)
        change = f"{a / b - 1:+.0%}" if b else "-"
        lines.append(f"{title:<18}{form.format(a):>14}{form.format(b):>14}{change:>14}")
    if world > 1:
        pairs = config.batch_size * config.accum_freq
        theirs = open_clip_bytes(pairs, config.preset.embed_dim, world, 4) / 1e6
        lines.append(
            f"sent per step: by each of {world} processes, without the gradients of weights. "
            f"open_clip's all-gather of global features in fp32, and back: {theirs:,.2f} MB"
        )
    return "\n".join(lines)


def _pairs(config: TrainConfig, world: int) -> str:
    own = config.batch_size * config.accum_freq
    return f"{own}" if world == 1 else f"{world} x {own}"


def measure(config: TrainConfig, steps: int, variant: str = "") -> Measurement:
    """Train `WARM_UP` + `steps` steps in this process and return what the latter took.

    Args:
        config: The settings.
        steps: How many steps to time.
        variant: By which processes find one another; others may have the same store.

    Raises:
        UsageError: something that the user can mend.
    """
    from medfast.device import forget_peak_memory, peak_memory
    from medfast.distributed.processes import join

    with tempfile.TemporaryDirectory() as logs:
        processes = join(config.timeout, config.comm, variant)
        trainer = _trainer(dataclasses.replace(config, logs=logs, name="profile"), processes)
        ring = processes.ring
        device, batches = trainer.device, _steps(trainer)
        before = forget_peak_memory(device)
        for _ in range(WARM_UP):
            trainer.train_step(next(batches).batches)
        seconds, pairs, sent = [], 0, ring.sent if ring else 0
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(steps):
            step = next(batches)
            there = time.perf_counter()
            trainer.train_step(step.batches)
            _synchronize(device)
            seconds.append(time.perf_counter() - there)
            pairs += step.pairs
        elapsed = time.perf_counter() - started
        memory = peak_memory(device) - before
        sent = (ring.sent if ring else 0) - sent
        processes.part()
    return Measurement(
        statistics.median(seconds), pairs / elapsed, memory / 1e6, sent / steps / 1e6
    )


def _in_fresh_process(config: TrainConfig, steps: int) -> Measurement:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, config, steps, config.fused_loss).result()
        except BrokenProcessPool:
            raise UsageError(
                f"--fused-loss {config.fused_loss}: its process was ended, as by a lack of "
                "memory; lower --batch-size."
            ) from None


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
    from medfast.trainer import Trainer

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


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
