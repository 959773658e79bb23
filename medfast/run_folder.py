"""The run folder: one place for everything that a run writes."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from medfast import json_lines
from medfast.config import TrainConfig
from medfast.errors import SharedError, StoppedError, UsageError


class RunFolder:
    """`params.yaml out.log metrics.jsonl checkpoints/ results.jsonl report.html` of one run.

    Args:
        path: The folder, which exists.
        rank: The process. The first one writes; each of the others writes what goes wrong, into a
            log of its own.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path = path
        self.rank = rank
        self.params = path / "params.yaml"
        self.log = path / (f"rank_{rank}.log" if rank else "out.log")
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.jsonl"
        self.skipped = path / "skipped.jsonl"
        self.report = path / "report.html"
        self.checkpoints = path / "checkpoints"
        self.tokenizer = path / "tokenizer"

    @classmethod
    def create(cls, config: TrainConfig, again: bool = False) -> RunFolder:
        """Make the new run folder of the named run `config` and write its `params.yaml`.

        Args:
            config: The settings.
            again: In place of a run of this name that ended before its first checkpoint.

        Raises:
            UsageError: it exists already or cannot be written.
        """
        path = Path(config.logs).expanduser() / str(config.name)
        run = cls(path)
        if not (again and run.params.is_file()):
            cls.check_free(path)
        try:
            if path.exists():
                run.remove()
            path.mkdir(parents=True)
            params = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
            run.params.write_text(params, encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"--logs: the run folder {path} cannot be written ({error.strerror}). Choose "
                "another folder with --logs."
            ) from None
        return run

    @staticmethod
    def check_free(path: Path) -> None:
        """Refuse a run folder that exists already.

        Raises:
            UsageError: it does.
        """
        if os.path.lexists(path):
            raise UsageError(
                f"--name: the run folder {path} exists already. Choose another --name, or go on "
                "with it by --resume latest."
            )

    def remove(self) -> None:
        """Delete the folder of a run that never began."""
        shutil.rmtree(self.path)

    @property
    def is_untouched(self) -> bool:
        """Whether no step was logged and no sample listed yet."""
        return not (self.metrics.exists() or self.skipped.exists())

    @contextlib.contextmanager
    def logged(self) -> Iterator[None]:
        """Within the context, everything that medfast logs also goes to `out.log`."""
        logger = logging.getLogger("medfast")
        # Paths need not be UTF-8.
        handler = logging.FileHandler(
            self.log, encoding="utf-8", errors="backslashreplace", delay=self.rank > 0
        )
        handler.setLevel(logging.WARNING if self.rank else logging.INFO)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
        try:
            yield
        except BaseException as error:
            is_told = self.rank and isinstance(error, SharedError | StoppedError)
            if is_told or not self.path.is_dir():
                raise
            # To the file alone: the command reports the error on the console.
            record = logger.makeRecord(
                "medfast",
                logging.ERROR,
                "",
                0,
                "stopped by %s: %s",
                (type(error).__name__, error),
                None,
            )
            handler.handle(record)
            raise
        finally:
            logger.removeHandler(handler)
            # On a full disk what it still holds cannot be written: no reason to hide another error.
            with contextlib.suppress(OSError):
                handler.close()

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one row to `metrics.jsonl`."""
        if self.rank == 0:
            json_lines.append(self.metrics, [row])

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of `metrics.jsonl`."""
        return json_lines.read(self.metrics)

    def forget_metrics_after(self, step: int) -> None:
        """Drop the rows of steps after `step`, from which a run goes on."""
        if self.rank:
            return
        json_lines.mend(self.metrics)
        rows = self.read_metrics()
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            _write_anew(self.metrics, kept)

    def write_results(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write `results.jsonl` anew."""
        if self.rank == 0:
            _write_anew(self.results, rows)


def _write_anew(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of rows, beside and renamed: it is there as a whole or not at all."""
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    json_lines.append(part, rows)
    part.replace(path)
