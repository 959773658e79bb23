"""The study's folder: what it was made with, what is done in it, and who works on it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from medfast import cli
from medfast.config import TrainConfig, flag
from medfast.errors import UsageError
from medfast.evals.suite import cells
from medfast.run_folder import RunFolder
from medfast.study.plan import FAMILIES, MORE_SEEDS, PRETRAINING, SUITE_DATA, Run, Study, shown

OURS = (
    *("study.json", "study.lock", "study.md", "study.html", "results.csv"),
    *("runs", "general", SUITE_DATA, "cache"),
)
# Settings that may be written in two ways for one thing, as a path from here or from elsewhere;
# and what goes with them.
_PATHS = ("train_data", "train_data_weights", "exclude", "tokenizer", "pretrained")


class Record:
    """`study.json`: what the study was made with, and the time of its runs.

    Args:
        path: The file, which need not exist.
        content: What it holds.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content

    @property
    def seconds(self) -> dict[str, float]:
        """The time that each run took, what was stopped included."""
        return self.content["seconds"]

    @property
    def jobs(self) -> int:
        """The most runs that shared the machine."""
        return self.content["jobs"]

    def add(self, name: str, seconds: float) -> None:
        """Count `seconds` more for a run."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.save()

    def save(self) -> None:
        """Write the file, beside and renamed."""
        beside = self.path.with_suffix(".part")
        text = json.dumps(self.content, indent=1, ensure_ascii=False)
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(self.path)


def check(study: Study) -> Record:
    """Return the record of the study's folder, or a new one; write nothing.

    Raises:
        UsageError: the folder is something else or another study, or holds runs of another one.
    """
    out = study.out
    path = out / "study.json"
    try:
        held = {item.name for item in out.iterdir()} if out.exists() else set()
        text = path.read_text(encoding="utf-8") if path.name in held else None
    except NotADirectoryError:
        raise UsageError(f"--out {out} must be a folder; it is a file. Name another.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--out {out} cannot be read ({error}). Name another folder.") from None
    made_with = json.loads(
        json.dumps(
            {
                "methods": study.methods,
                "settings": study.settings,
                "pretrained": study.pretrained,
            }
        )
    )
    if text is None:
        if held - set(OURS):
            raise UsageError(
                f"--out {out} must be a study's folder, or new or empty; it has other files in "
                "it. Name another folder."
            )
        content = {"budget": study.budget, **made_with, "jobs": 0, "seconds": {}}
    else:
        try:
            content = json.loads(text)
            differing = [name for name, value in made_with.items() if content[name] != value]
            kinds = {"budget": str, "jobs": int, "seconds": dict}
            if any(not isinstance(content[name], kind) for name, kind in kinds.items()):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                f"--out {out}: study.json is damaged. Move it away, and the study's runs are "
                "taken up by their own settings."
            ) from None
        if differing:
            name = "budget" if differing[0] == "settings" else differing[0]
            was = content["budget"] if name == "budget" else content[name]
            raise UsageError(
                f"--out {out} is a study with another --{name} ({_words(was)}). Give it the "
                "same, or name another folder."
            )
    was = content.get("phantom_suite")
    if study.suite is not None and was not in (None, study.suite.is_phantom):
        before, now = ("phantoms", "data sets") if was else ("data sets", "phantoms")
        raise UsageError(
            f"--out {out} is a study that was evaluated on {before}, and results on {now} would "
            "mix with those. Name another folder."
        )
    for run in study.plan(best(study)):
        _check_run(study, run)
    return Record(path, content)


def _words(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value or "none")


def _check_run(study: Study, run: Run) -> None:
    """Refuse a run folder that was made with other settings, as by hand or by another study."""
    params = RunFolder(study.runs / run.name).params
    if not params.is_file():
        return
    wanted = dataclasses.replace(study.config, **study.own_settings(run))
    try:
        found = TrainConfig(**cli.read_config(params))
    except UsageError as error:
        raise UsageError(
            f"--out {study.out}: the settings of its run {run.name} cannot be read ({error}). "
            "Remove that run's folder, or name another --out."
        ) from None
    for item in dataclasses.fields(TrainConfig):
        if not item.metadata["frozen_on_resume"] or item.name in _PATHS:
            continue
        was, now = getattr(found, item.name), getattr(wanted, item.name)
        if was != now:
            raise UsageError(
                f"--out {study.out}: its run {run.name} has {flag(item.name)} {was}, this study "
                f"{now}. Remove that run's folder, or name another --out."
            )


@contextlib.contextmanager
def locked(study: Study) -> Iterator[IO[str]]:
    """Hold the study's folder, which is made; the file is for its runs to inherit.

    A run that outlives its study, as after a kill, holds the folder on until it ends.

    Raises:
        UsageError: another study or such a run holds it, or it cannot be written.
    """
    try:
        study.runs.mkdir(parents=True, exist_ok=True)
        lock = (study.out / "study.lock").open("a")
    except OSError as error:
        raise UsageError(
            f"--out {study.out} cannot be written ({error.strerror}). Name another folder."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"--out {study.out}: another study, or a run of a killed one, is at work there. "
                "Wait for it or end it."
            ) from None
        yield lock


def is_done(study: Study, run: Run) -> bool:
    """Return whether a run has its results."""
    results = RunFolder(study.runs / run.name).results
    return results.is_file() and results.stat().st_size > 0


def evaluation(study: Study, run: Run, key: str, task: str) -> Path:
    """Return where the result of a run on a data set and task of the suite is."""
    return _evaluations(study, run) / f"{key}.{task}.json"


def is_evaluated(study: Study, run: Run) -> bool:
    """Return whether a run has the results of all data sets that are asked for and there."""
    assert study.suite is not None
    suite = study.suite
    there = [key for key, root in suite.roots.items() if suite.is_phantom or root.exists()]
    return all(evaluation(study, run, *cell).is_file() for cell in cells(there))


def failures(study: Study, run: Run) -> dict[str, str]:
    """Return the data sets on which the evaluation of a run failed, and why."""
    paths = sorted(_evaluations(study, run).glob("*.error.txt"))
    ours = f"{UsageError.__module__}.{UsageError.__name__}: "
    return {path.name.partition(".")[0]: last_line(path).removeprefix(ours) for path in paths}


def last_line(path: Path) -> str:
    """Return the last line of a text that is not empty."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


def _evaluations(study: Study, run: Run) -> Path:
    return study.runs / run.name / "evaluations"


def has_checkpoint(study: Study, run: Run) -> bool:
    """Return whether a run can go on from where it was stopped."""
    return any(RunFolder(study.runs / run.name).checkpoints.glob("epoch_*.pt"))


def has_general_data(study: Study) -> bool:
    """Return whether the general domain is written, whole."""
    return (study.general_data / "phantom.json").is_file()


def validation_recall(study: Study, run: Run) -> float:
    """Return the mean R@1 of both directions at the last validation of a run that is done.

    Raises:
        UsageError: its metrics are damaged.
    """
    try:
        rows = RunFolder(study.runs / run.name).read_metrics()
        last = [row for row in rows if row["kind"] == "validation"][-1]
        return mean_recall(last["metrics"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise damaged(study, run, error) from None


def damaged(study: Study, run: Run, error: Exception) -> UsageError:
    """Return the sentence on a run that is done, but whose files cannot be read."""
    return UsageError(
        f"--out {study.out}: the results of its run {run.name} cannot be read "
        f"({type(error).__name__}: {error}). Remove that run's folder, and it is run again."
    )


def mean_recall(metrics: Mapping[str, float]) -> float:
    """Return the mean R@1 of both directions."""
    return (metrics["image_to_text_R@1"] + metrics["text_to_image_R@1"]) / 2


def best(study: Study) -> dict[str, str]:
    """Return the best method of each family, by the validation of seed 0 and never by the test.

    A family is left out until its runs with seed 0 are done, unless it has a single method.
    """
    found = {}
    for name in FAMILIES:
        runs = [Run(method, "scratch") for method in study.family(name)]
        if len(runs) == 1:
            found[name] = runs[0].method
        elif runs and all(is_done(study, run) for run in runs):
            found[name] = max(runs, key=lambda run: validation_recall(study, run)).method
    return found


def undecided(study: Study) -> list[list[str]]:
    """Return the methods of each family whose best one is not known yet."""
    known = best(study)
    families = (study.family(name) for name in FAMILIES if name not in known)
    return [methods for methods in families if methods]


def listing(study: Study) -> str:
    """Return the commands that are left, one per line, with comments on what waits for what."""
    runs = study.plan(best(study))
    left = [run for run in runs if not is_done(study, run)]
    lines = []
    if len(left) < len(runs):
        lines.append(f"# {len(runs) - len(left)} runs are done and left out")
    if study.suite is not None and study.suite.is_phantom and not study.suite_data.exists():
        lines.append(shown(study.suite_command()))
    for run in left:
        if run == PRETRAINING:
            if not has_general_data(study):
                lines.append(shown(study.data_command()))
            lines.append(shown(study.command(run, resume=has_checkpoint(study, run))))
            lines.append(f"# what has --pretrained {study.weights} waits for the line above")
        else:
            lines.append(shown(study.command(run, resume=has_checkpoint(study, run))))
    if study.suite is not None:
        evaluated = [run for run in runs if run != PRETRAINING and not is_evaluated(study, run)]
        if any(run in left for run in evaluated):
            lines.append("# each evaluation waits for the run that it names")
        lines += [shown(study.evaluation_command(run)) for run in evaluated]
    seeds = " and ".join(map(str, MORE_SEEDS))
    for methods in undecided(study):
        lines.append(
            f"# seeds {seeds} of the best of {', '.join(methods)} follow: their validation with "
            "seed 0 decides, so list again when those are done"
        )
    return "\n".join(lines)
