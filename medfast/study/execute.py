"""Runs as processes: some at a time, each taken up where it is."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NoReturn

import torch

from medfast import parts
from medfast.data.phantom import write_phantom
from medfast.device import pick_device
from medfast.errors import UsageError
from medfast.study.folder import (
    Record,
    best,
    has_checkpoint,
    has_general_data,
    is_done,
    undecided,
)
from medfast.study.plan import MORE_SEEDS, PRETRAINING, Run, Study
from medfast.study.results import read_outcome

log = logging.getLogger(__name__)

# Seconds between two looks at the running processes, and what they get to end in.
_LOOK = 0.1
_END = 10.0


def check_runnable(study: Study) -> None:
    """Refuse, before any work, what one of the runs would be refused for.

    Raises:
        UsageError: a method cannot run here with these settings, or there are no such weights.
    """
    device = pick_device(study.config.device)
    for run in study.plan(best(study)):  # other seeds are refused for nothing else
        parts.new_method(dataclasses.replace(study.config, **study.own_settings(run)), device)
    if study.pretrained is not None:
        from medfast.models.pretrained import pretrained_tokenizer

        pretrained_tokenizer(study.pretrained)


def execute(study: Study, record: Record, jobs: int, lock: IO[str]) -> None:
    """Run what is not done yet, `jobs` runs at a time.

    However it ends, its processes end with it; what they were at goes on from its last checkpoint.

    Args:
        study: What to run.
        record: Takes the runs' times.
        jobs: Most processes at a time, which share the threads.
        lock: The file that holds the study's folder.

    Raises:
        UsageError: a run failed.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    running: dict[Run, tuple[subprocess.Popen[bytes], float]] = {}
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        if _waiting(study):
            write_data(study)
            record.content["jobs"] = max(jobs, record.jobs)
        while True:
            ready = [run for run in _waiting(study) if run not in running]
            for run in ready[: jobs - len(running)]:
                running[run] = (_begin(study, run, threads, lock), time.monotonic())
            if not running:
                return
            run = _first_to_end(running)
            process, started = running.pop(run)
            record.add(run.name, time.monotonic() - started)
            _check_end(study, run, process.returncode)
            log.info("%s", _line(study, record, run))
    finally:
        for run, (process, started) in running.items():
            process.terminate()
            record.add(run.name, time.monotonic() - started)
        for process, _ in running.values():
            try:
                process.wait(_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        signal.signal(signal.SIGTERM, before)


def start(
    command: Sequence[str], output: Path, threads: int, lock: IO[str]
) -> subprocess.Popen[bytes]:
    """Start a command of medfast's; its output is added to a file."""
    with output.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            pass_fds=(lock.fileno(),),
        )


def write_data(study: Study) -> None:
    """Write the phantom that the runs which are left read, once and not by each of them."""
    waiting = _waiting(study)
    if "phantom" in study.config.train_data and any(run != PRETRAINING for run in waiting):
        parts.phantom_root(study.config)
    if PRETRAINING in waiting and not has_general_data(study):
        if study.general_data.exists():
            shutil.rmtree(study.general_data)  # it was stopped in the middle
        pairs = study.config.phantom_pairs
        log.info("writing %d images of the general domain", pairs)
        write_phantom(study.general_data, pairs=pairs, domain="general")


def _leave(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def _waiting(study: Study) -> list[Run]:
    """Return the runs that are not done and may start now."""
    runs = study.plan(best(study))
    weights = PRETRAINING not in runs or is_done(study, PRETRAINING)
    return [r for r in runs if not is_done(study, r) and (weights or not r.takes_weights)]


def _begin(study: Study, run: Run, threads: int, lock: IO[str]) -> subprocess.Popen[bytes]:
    """Start a run, or take it up."""
    resume = has_checkpoint(study, run)
    folder = study.runs / run.name
    if not resume and folder.exists():
        shutil.rmtree(folder)  # nothing of it is of use
    if resume:
        log.info("%s goes on from its last checkpoint", run.name)
    return start(study.command(run, resume), study.log(run), threads, lock)


def _first_to_end(running: dict[Run, tuple[subprocess.Popen[bytes], float]]) -> Run:
    while True:
        for run, (process, _) in running.items():
            if process.poll() is not None:
                return run
        time.sleep(_LOOK)


def _check_end(study: Study, run: Run, code: int) -> None:
    """Refuse to go on after a run that failed.

    Raises:
        UsageError: it did.
    """
    if code == 0 and is_done(study, run):
        return
    path = study.log(run)
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    raise UsageError(
        f"the run {run.name} failed with exit code {code}; its output is in {path} and ends with: "
        f"{said[:400]}"
    )


def _line(study: Study, record: Record, run: Run) -> str:
    """Return the line of a run that is done."""
    runs = study.plan(best(study))
    done = sum(is_done(study, run) for run in runs)
    total = len(runs) + len(MORE_SEEDS) * len(undecided(study))
    values = read_outcome(study, run).values
    return (
        f"{run.name}: {record.seconds[run.name]:.0f} s, R@1 {values['image to text R@1']:.1%} "
        f"image to text, {values['text to image R@1']:.1%} text to image ({done} of {total} runs)"
    )
