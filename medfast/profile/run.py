"""Runs a profile, each of its variants in a fresh process, and writes what it found."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch

from medfast import cli
from medfast.config import TrainConfig, flag
from medfast.cost import ModelFlops, model_flops
from medfast.data.processes import terminate
from medfast.device import pick_device
from medfast.distributed.processes import announced
from medfast.errors import SharedError, UsageError
from medfast.parts import data_sources, new_method, prepare, published_tokenizer, read_pairs
from medfast.profile.measure import Measurement, measure
from medfast.profile.memory import OutOfMemoryError, refuse_more_than_there_is
from medfast.profile.plan import Plan
from medfast.profile.report import Point, document, table

log = logging.getLogger(__name__)

# Why there is no measurement.
OUT_OF_MEMORY = "out of memory"
ENDED = "process ended, as by a lack of memory"


def run(plan: Plan) -> str:
    """Return the table of a profile, whose JSON and picture are written.

    Each variant runs in a fresh process, one after the other. Under torchrun each of its processes
    does so; the first one writes, and the figures are those that it sees.

    Raises:
        UsageError: something that the user can mend.
    """
    folders = {"--out": plan.out}
    if plan.trace is not None:
        folders["--trace"] = plan.trace.absolute().parent
    with contextlib.ExitStack() as stack:
        for name, folder in folders.items() if cli.rank() == 0 else ():
            stack.enter_context(_folder(name, folder))
        device = pick_device(plan.config.device)
        for config in plan.configs():
            for impl in plan.impls:
                new_method(dataclasses.replace(config, fused_loss=impl), device)
        # It writes the phantom, if need be, before any clock runs.
        _refuse_larger_than_data(plan)
        points = [_point(plan, config, number) for number, config in enumerate(plan.configs())]
        if cli.rank():
            return ""
        _write(plan, points)
    return table(plan, points)


def _refuse_larger_than_data(plan: Plan) -> None:
    """Refuse steps that would be of fewer pairs than their settings name.

    Raises:
        SharedError: the data hold fewer.
        UsageError: they cannot be read.
    """
    there = len(read_pairs(plan.config, data_sources(plan.config), "train").records)
    for config in plan.configs():
        pairs = config.batch_size * config.accum_freq * announced()
        if pairs > there:
            raise SharedError(
                f"--batch-size: a step takes {pairs:,} pairs, and the data hold {there:,} training "
                "pairs; lower it or --accum-freq, or give more data, as with --phantom-pairs."
            )


def _point(plan: Plan, config: TrainConfig, number: int) -> Point:
    """Measure both variants of some settings."""
    found: list[Measurement | str] = []
    for impl in plan.impls:
        which = "" if plan.swept is None else f", {flag(plan.swept)} {plan.values[number]}"
        log.info("%d steps with --fused-loss %s%s", plan.steps, impl, which)
        is_fused = impl != "reference"
        own = _in_fresh_process(
            dataclasses.replace(config, fused_loss=impl),
            plan.steps,
            f"{impl} {number}",
            plan.trace if is_fused else None,
            plan.swept is None,
        )
        # The processes of a run must go on together, and a single profile is about its settings.
        if isinstance(own, str) and (announced() > 1 or (is_fused and plan.swept is None)):
            raise UsageError(f"--fused-loss {impl}: {own}; lower --batch-size.")
        found.append(own)
    fused, reference = found
    measured = next((own for own in found if isinstance(own, Measurement)), None)
    flops = None
    if measured is not None and cli.rank() == 0:
        flops = _model_flops(config, round(measured.tokens), max(1, round(measured.words)))
    return Point(config, fused, reference, flops)


def _in_fresh_process(
    config: TrainConfig, steps: int, name: str, trace: Path | None, finds_largest: bool
) -> Measurement | str:
    """Return what the steps take, or why that cannot be told."""
    on_cpu = pick_device(config.device).type == "cpu"
    with ProcessPoolExecutor(
        1, get_context("spawn"), refuse_more_than_there_is if on_cpu else None
    ) as pool:
        try:
            return pool.submit(measure, config, steps, name, trace, finds_largest).result()
        except OutOfMemoryError:
            return OUT_OF_MEMORY
        except BrokenProcessPool:
            return ENDED
        except BaseException:
            # Stopped twice, the pool would leave a process that waits for work.
            terminate(pool)
            raise


@functools.cache
def _model_flops(config: TrainConfig, tokens: int, words: int) -> ModelFlops:
    """Return what a step of a run has to compute, whatever it computes twice to save memory."""
    from medfast.models.pair import ImageTextModel, build_model

    plain = dataclasses.replace(
        config, fused_loss="reference", grad_checkpointing=False, precision="fp32"
    )
    method = new_method(plain, torch.device("cpu"))
    tokenizer = published_tokenizer(plain, method)
    if tokenizer is not None:
        model = build_model(plain.preset, tokenizer, method.needs_tokens)
    else:
        model = ImageTextModel(plain.preset, plain.preset.vocab_size, {}, method.needs_tokens)
    prepare(plain, method, model)
    return model_flops(plain, model, method, tokens, words)


@contextlib.contextmanager
def _folder(name: str, path: Path) -> Iterator[None]:
    """Within the context there is a folder to write to; a failure does not leave a new one empty.

    Raises:
        UsageError: it cannot be written.
    """
    is_new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(
            f"{name}: the folder {path} cannot be written ({error.strerror}). Choose another one."
        ) from None
    try:
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _write(plan: Plan, points: Sequence[Point]) -> None:
    """Write the JSON and the picture."""
    from medfast.profile.pictures import draw_profile, draw_sweep

    results = plan.out / ("sweep.json" if plan.swept else "profile.json")
    picture = results.with_suffix(".png")
    beside = results.with_suffix(".part")
    beside.write_text(json.dumps(document(plan, points), indent=2) + "\n", encoding="utf-8")
    beside.replace(results)
    if plan.swept:
        draw_sweep(plan, points, picture)
    else:
        draw_profile(plan, points[0], picture)
    log.info("wrote %s and %s beside it", results, picture.name)
    if plan.trace is not None:
        log.info("wrote %s; chrome://tracing and ui.perfetto.dev show it", plan.trace)
