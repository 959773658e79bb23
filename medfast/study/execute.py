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
from medfast.evals.suite.phantom import write_suite
from medfast.study.folder import (
    Record,
    best,
    has_checkpoint,
    has_general_data,
    is_done,
    is_evaluated,
    last_line,
    undecided,
)
from medfast.study.plan import MORE_SEEDS, PRETRAINING, Evaluation, Run, Study
from medfast.study.results import read_outcome

log = logging.getLogger(__name__)

Job = Run | Evaluation
# Processes and when they were started.
Running = dict[Job, tuple[subprocess.Popen[bytes], float]]

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


def execute(study: Study, record: Record, jobs: int, lock: IO[str]) -> dict[str, str]:
    """Run and evaluate what is not done yet, `jobs` processes at a time.

    However it ends, its processes end with it; what they were at goes on from its last checkpoint,
    or its last result.

    Args:
        study: What to run.
        record: Takes the times of runs and evaluations.
        jobs: Most processes at a time, which share the threads.
        lock: The file that holds the study's folder.

    Returns:
        The runs whose evaluation failed, on some data sets or as a whole, and why.

    Raises:
        UsageError: a run failed.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    running: Running = {}
    evaluated: set[Evaluation] = set()
    failed: dict[str, str] = {}
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        if _waiting(study) or _to_evaluate(study):
            write_data(study)
            record.content["jobs"] = max(jobs, record.jobs)
        while True:
            waiting: list[Job] = [*_waiting(study), *_to_evaluate(study)]
            ready = [job for job in waiting if job not in running and job not in evaluated]
            for job in ready[: jobs - len(running)]:
                running[job] = (_begin(study, job, threads, lock), time.monotonic())
            if not running:
                return failed
            job = _first_to_end(running)
            process, started = running.pop(job)
            record.add(job.name, time.monotonic() - started)
            if isinstance(job, Run):
                _check_end(study, job, process.returncode)
                log.info("%s", _line(study, record, job))
                continue
            evaluated.add(job)
            if process.returncode:
                failed[job.run.name] = last_line(study.log(job))
                log.error("%s: %s", job.name, failed[job.run.name])
            else:
                log.info("%s: %.0f s", job.name, record.seconds[job.name])
    finally:
        for job, (process, started) in running.items():
            process.terminate()
            record.add(job.name, time.monotonic() - started)
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
    suite = study.suite
    if suite is not None and suite.is_phantom and not study.suite_data.exists():
        log.info("writing phantoms of the suite's data sets")
        write_suite(study.suite_data)


def _leave(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def _waiting(study: Study) -> list[Run]:
    """Return the runs that are not done and may start now."""
    runs = study.plan(best(study))
    weights = PRETRAINING not in runs or is_done(study, PRETRAINING)
    return [r for r in runs if not is_done(study, r) and (weights or not r.takes_weights)]


def _to_evaluate(study: Study) -> list[Evaluation]:
    """Return the evaluations that lack results and whose runs are done."""
    if study.suite is None:
        return []
    runs = [run for run in study.plan(best(study)) if run != PRETRAINING and is_done(study, run)]
    return [Evaluation(run) for run in runs if not is_evaluated(study, run)]


def _begin(study: Study, job: Job, threads: int, lock: IO[str]) -> subprocess.Popen[bytes]:
    """Start a run or an evaluation, or take it up."""
    if isinstance(job, Evaluation):
        return start(study.evaluation_command(job.run), study.log(job), threads, lock)
    resume = has_checkpoint(study, job)
    folder = study.runs / job.name
    if not resume and folder.exists():
        shutil.rmtree(folder)  # nothing of it is of use
    if resume:
        log.info("%s goes on from its last checkpoint", job.name)
    return start(study.command(job, resume), study.log(job), threads, lock)


def _first_to_end(running: Running) -> Job:
    while True:
        for job, (process, _) in running.items():
            if process.poll() is not None:
                return job
        time.sleep(_LOOK)


def _check_end(study: Study, run: Run, code: int) -> None:
    """Refuse to go on after a run that failed.

    Raises:
        UsageError: it did.
    """
    if code == 0 and is_done(study, run):
        return
    path = study.log(run)
    raise UsageError(
        f"the run {run.name} failed with exit code {code}; its output is in {path} and ends with: "
        f"{last_line(path)[:400]}"
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
