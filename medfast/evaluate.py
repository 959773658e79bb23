"""`python -m medfast.evaluate`: a model and the data sets that are there to a table of results."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfast import cli, json_lines
from medfast.errors import UsageError
from medfast.evals.suite import EVALUATIONS, TASKS, about, cells
from medfast.evals.suite.plan import Plan

if TYPE_CHECKING:
    from medfast.evals.encode import Encoder
    from medfast.evals.suite.tasks import Using

# By name: run as a command, this module is called __main__.
log = logging.getLogger("medfast.evaluate")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m medfast.evaluate ...`."""

    def command() -> None:
        plan = cli.parse_evaluate(argv)
        cli.log_to_console()
        failed = evaluate(plan)
        if failed:
            # As a text it goes to stderr, and the exit code is 1.
            sys.exit(
                "\n".join(
                    [
                        *(f"{key} failed: {reason}" for key, reason in failed.items()),
                        f"medfast.evaluate: error: {len(failed)} of the data sets failed: "
                        f"{', '.join(failed)}; the tracebacks are in {plan.out}.",
                    ]
                )
            )

    cli.run(command, "medfast.evaluate")


def evaluate(plan: Plan) -> dict[str, str]:
    """Evaluate what is there, and write every result as soon as it is known.

    Returns:
        The data sets that failed, and why.

    Raises:
        UsageError: something that the user can mend before anything is evaluated.
    """
    from medfast.data.sources import AbsentError
    from medfast.device import pick_device
    from medfast.evals.models import load_encoder

    missing = {key: _how_to_get(key, root) for key, root in plan.roots.items() if not root.exists()}
    failed: dict[str, str] = {}
    encoder = load_encoder(plan.source, pick_device(plan.device), plan.precision, flag=plan.flag)
    results = Results(plan, encoder)
    using = _using(plan, encoder, results)
    there = len(plan.roots) - len(missing)
    log.info("%s: %d of %d data sets have a folder", encoder.name, there, len(plan.roots))
    for key, root in plan.roots.items():
        if key in missing:
            continue
        try:
            _evaluate_one(key, root, using, results)
        except AbsentError as error:
            missing[key] = str(error)
        # Nor could the results of the others be kept.
        except UnwritableError:
            raise
        # Whatever it is, the other data sets are not to suffer from it.
        except Exception as error:
            mended = isinstance(error, UsageError)
            reason = f"{error}" if mended else f"{type(error).__name__}: {error}"
            failed[key] = " ".join(reason.split())
            _replace(results.traceback(key), traceback.format_exc())
            log.error("%s failed: %s", key, failed[key])
        else:
            results.traceback(key).unlink(missing_ok=True)
        results.write_tables(missing, failed)
    for how in missing.values():
        log.info("not there: %s", how)
    results.write_heat_map()
    log.info("the results are in %s", results.folder)
    return failed


class UnwritableError(UsageError):
    """A file of the results cannot be written."""


class Results:
    """The folder of results.

    It gets one JSON for each data set and task, a picture of the confusions of each classification,
    `results.csv`, `classes.csv`, `results.md` and `results.png`, `skipped.jsonl`, and, for a data
    set that fails, its traceback.

    Args:
        plan: Where, and what is asked.
        encoder: The model.

    Raises:
        UsageError: the folder cannot be written.
    """

    def __init__(self, plan: Plan, encoder: Encoder) -> None:
        from medfast.evals.cache import weights_hash
        from medfast.evals.provenance import provenance

        self.folder = plan.out
        self._plan = plan
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Known before anything is computed.
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "it is read-only")
        except OSError as error:
            raise UsageError(
                f"--out {self.folder} cannot be written ({error.strerror}); name another folder."
            ) from None
        self.model_sha256 = weights_hash(encoder.model)
        # What every row says of the model, and of the code and the command.
        self._origin = {
            "model": encoder.name,
            "pretrained": plan.source,
            "model_sha256": self.model_sha256,
            "library": encoder.library,
            # Of the prompts, the captions and the questions.
            "language": "en",
            "suite": plan.suite,
            "preprocessing": encoder.preprocessing,
            "precision": encoder.precision,
            "device": encoder.device.type,
            **provenance(),
        }

    def path(self, key: str, task: str) -> Path:
        """Return where the result of a data set and task is."""
        return self.folder / f"{key}.{task}.json"

    def traceback(self, key: str) -> Path:
        """Return where the traceback of a data set that fails goes."""
        return self.folder / f"{key}.error.txt"

    def add(self, found: Mapping[str, Any], seconds: float) -> None:
        """Write one result, as a whole or not at all."""
        from medfast.evals.suite.clip_benchmark import with_names
        from medfast.evals.suite.pictures import confusion_picture

        row = {**found, **self._origin, "seconds": seconds}
        path = self.path(row["dataset"], row["task"])
        # The result last: what --skip-existing keeps has its picture.
        if "confusion" in row:
            with _beside(path.with_suffix(".confusion.png")) as beside:
                confusion_picture(row, beside)
        with _beside(path) as beside:
            json_lines.append(beside, [with_names(row)])

    def read(self, key: str, task: str) -> dict[str, Any] | None:
        """Return the result of this model that is there, if it is whole."""
        from medfast.evals.suite.clip_benchmark import without_names

        try:
            rows = json_lines.read(self.path(key, task))
        except UsageError:
            return None
        row = rows[0] if rows else {}
        return without_names(row) if row.get("model_sha256") == self.model_sha256 else None

    def is_kept(self, key: str, task: str) -> bool:
        """Return whether --skip-existing finds the result of a task as it is asked for now."""
        from medfast.evals.prompts import prompt_hash, prompts

        row = self.read(key, task) if self._plan.skip_existing else None
        if row is None:
            return False
        asked = {
            "seed": self._plan.seed,
            "precision": self._origin["precision"],
            "finetune": self._plan.vqa_finetune,
        }
        if task == "zero_shot":
            # Names of prompts stay when their words are mended.
            asked["prompts_sha256"] = prompt_hash(prompts(key, self._plan.prompts))
        return all(row.get(name, value) == value for name, value in asked.items())

    def rows(self) -> list[dict[str, Any]]:
        """Return all results of this model, in the order of the suite."""
        found = (self.read(key, task) for key, task in cells())
        return [row for row in found if row is not None]

    def write_tables(self, missing: Mapping[str, str], failed: Mapping[str, str]) -> None:
        """Write `results.csv`, `classes.csv` and `results.md` anew."""
        from medfast.evals.suite.tables import classes_csv, results_csv, results_markdown

        rows = self.rows()
        _replace(self.folder / "results.csv", results_csv(rows))
        _replace(self.folder / "classes.csv", classes_csv(rows))
        _replace(self.folder / "results.md", results_markdown(rows, missing, failed))

    def write_heat_map(self) -> None:
        """Write `results.png` anew, if there is a result."""
        from medfast.evals.suite.pictures import heat_map

        if rows := self.rows():
            with _beside(self.folder / "results.png") as beside:
                heat_map(rows, beside)


def _using(plan: Plan, encoder: Encoder, results: Results) -> Using:
    from medfast.data.skipped import SkippedSamples
    from medfast.evals.cache import FeatureCache
    from medfast.evals.suite.tasks import Using

    depends = {
        "model": results.model_sha256,
        "preprocessing": encoder.preprocessing,
        "precision": encoder.precision,
        "device": encoder.device.type,
        "late_interaction": encoder.late_interaction,
    }
    return Using(
        encoder=encoder,
        cache=FeatureCache(plan.cache / "features", depends),
        # Listed and counted, however many they are.
        skipped=SkippedSamples(results.folder / "skipped.jsonl", 1, float("inf")),
        prompts=plan.prompts,
        batch_size=plan.batch_size,
        workers=plan.workers,
        seed=plan.seed,
        finetune=plan.vqa_finetune,
    )


def _evaluate_one(key: str, root: Path, using: Using, results: Results) -> None:
    """Write the results of a data set that are asked for."""
    from medfast.evals.suite.tasks import evaluate

    tasks = [task for task in TASKS[EVALUATIONS[key]] if not results.is_kept(key, task)]
    asked = time.perf_counter()
    for found in evaluate(key, root, tasks, using) if tasks else ():
        seconds = time.perf_counter() - asked
        results.add(found, seconds)
        log.info("%s", _line(found, seconds))
        asked = time.perf_counter()


def _line(found: Mapping[str, Any], seconds: float) -> str:
    """Return a result as a line of the log: its first metric."""
    name, value = next(iter(found["metrics"].items()))
    low, high = found["ci95"][name]
    return (
        f"{found['dataset']} {found['task']}: {name} {value:.1%} ({low:.1%} to {high:.1%}), "
        f"n {found['n']}, chance {found['chance'][name]:.1%}, {seconds:.0f} s"
    )


def _how_to_get(key: str, root: Path) -> str:
    of = about(key)
    return f"{key}: there is no {root}. {of.access} ({of.licence}) and put it there."


def _replace(path: Path, words: str) -> None:
    # Paths need not be UTF-8.
    with _beside(path) as beside:
        beside.write_text(words, encoding="utf-8", errors="backslashreplace", newline="")


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Give a file to write, which then takes the place of `path`: as a whole or not at all.

    No other process has it: two may evaluate into one folder.

    Raises:
        UnwritableError: the file cannot be written.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        # One of a process that was killed.
        beside.unlink(missing_ok=True)
        yield beside
        beside.replace(path)
    except OSError as error:
        raise UnwritableError(
            f"{path} cannot be written ({error.strerror or error}); what is whole stays: make room "
            "there, and go on with --skip-existing."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
