"""What a study runs: its budgets, its runs in their order, and the command of each."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medfast.config import TrainConfig, flag
from medfast.methods import METHODS

# pretraining: from scratch, on the general domain; frozen: from the general weights, with most of
# the image tower locked.
Init = Literal["pretraining", "scratch", "general", "frozen"]

# Settings of every run in place of the defaults, by the name of --budget.
BUDGETS: dict[str, dict[str, Any]] = {
    "quick": {"phantom_pairs": 6000, "force_image_size": 64, "epochs": 4},
}
# Settings by which the runs of a study differ, and one with which they would leave nothing.
OWN_SETTINGS = (
    *("method", "seed", "logs", "name", "resume", "dry_run"),
    *("pretrained", "pretrained_image", "pretrained_text"),
    *("lock_image", "lock_image_unlocked_groups", "lock_text", "lock_text_unlocked_layers"),
)
# Methods that answer one question beside clip; the best of each family gets more seeds.
FAMILIES = {
    "unimodal": ("slip", "declip", "cyclip"),
    "granularity": ("local", "filip", "sparc"),
}
MORE_SEEDS = (1, 2)
# How many times the budget's epochs the general weights get: what a medical run begins with has
# seen more than the run will.
PRETRAINING_LENGTH = 3
# The suite's phantoms, in the study's folder.
SUITE_DATA = "suite"
# Settings that evaluation has as well.
_OF_BOTH = ("device", "precision", "workers")
UNLOCKED_GROUPS = 2


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    method: str
    init: Init
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return f"{self.method}-{self.init}-seed{self.seed}"

    @property
    def takes_weights(self) -> bool:
        """Whether it starts from the general weights."""
        return self.init in ("general", "frozen")


PRETRAINING = Run("clip", "pretraining")


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one run on the suite."""

    run: Run

    @property
    def name(self) -> str:
        """The name of its log."""
        return f"{self.run.name}.evaluation"


@dataclass(frozen=True)
class Suite:
    """What the runs are evaluated on.

    Attributes:
        asked: The words by which the study is asked for it.
        words: Those by which `medfast evaluate` is.
        roots: Folder of each data set, in the suite's order; it need not be there.
        is_phantom: Whether the study writes them, as phantoms.
    """

    asked: tuple[str, ...]
    words: tuple[str, ...]
    roots: Mapping[str, Path]
    is_phantom: bool = False


@dataclass(frozen=True)
class Study:
    """What was asked for.

    Attributes:
        methods: Keys of `METHODS`, in its order.
        budget: Key of `BUDGETS`, or the YAML file of the settings.
        settings: The settings of every run, in place of the defaults.
        out: The study's folder.
        pretrained: General weights in place of those that the study trains.
        suite: What every run but the one that trains these is evaluated on, if anything.
    """

    methods: tuple[str, ...]
    budget: str
    settings: Mapping[str, Any]
    out: Path
    pretrained: str | None = None
    suite: Suite | None = None

    @property
    def config(self) -> TrainConfig:
        """The settings of every run, defaults included."""
        return TrainConfig(**self.settings)

    @property
    def runs(self) -> Path:
        """The folder of the run folders."""
        return self.out / "runs"

    def log(self, job: Run | Evaluation) -> Path:
        """Return the file that the output of a run, or of its evaluation, goes to."""
        return self.runs / f"{job.name}.log"

    @property
    def general_data(self) -> Path:
        """The folder of the phantom's general domain."""
        return self.out / "general"

    @property
    def suite_data(self) -> Path:
        """The folder of the suite's phantoms."""
        return self.out / SUITE_DATA

    @property
    def cache(self) -> Path:
        """The folder of the features of the suite's images."""
        return self.out / "cache"

    @property
    def weights(self) -> str:
        """The general weights."""
        if self.pretrained is not None:
            return self.pretrained
        run = self.runs / PRETRAINING.name
        # Of a folder the last epoch would be taken.
        return str(run / "checkpoints" / "best.pt" if self.config.early_stop else run)

    def family(self, name: str) -> list[str]:
        """Return the study's methods of a family of `FAMILIES`."""
        return [method for method in self.methods if method in FAMILIES[name]]

    def plan(self, best: Mapping[str, str]) -> list[Run]:
        """Return the runs in their order.

        Args:
            best: The best method of each family where that is known; the seeds that others would
                get are left out.
        """
        first = [Run(m, "general" if m == "lit" else "scratch") for m in self.methods]
        repeated = ["clip"] if "clip" in self.methods else []
        repeated += [best[name] for name in FAMILIES if name in best]
        more = [Run(method, "scratch", seed) for method in repeated for seed in MORE_SEEDS]
        inits: tuple[Init, ...] = ("general", "frozen") if "clip" in self.methods else ()
        transfer = [Run("clip", init, seed) for init in inits for seed in (0, *MORE_SEEDS)]
        runs = [*first, *more, *transfer]
        needed = self.pretrained is None and any(run.takes_weights for run in runs)
        return [PRETRAINING, *runs] if needed else runs

    def own_settings(self, run: Run) -> dict[str, Any]:
        """Return the settings by which a run differs from others."""
        own: dict[str, Any] = {"method": run.method, "seed": run.seed}
        if run == PRETRAINING:
            own["epochs"] = PRETRAINING_LENGTH * self.config.epochs
        if run.takes_weights:
            own["pretrained"] = self.weights
        if run.init == "frozen":
            own |= {"lock_image": True, "lock_image_unlocked_groups": UNLOCKED_GROUPS}
        return own

    def command(self, run: Run, resume: bool = False) -> list[str]:
        """Return the words after `python` that train a run, or go on with one that was stopped."""
        data = ["--train-data", f"roco:{self.general_data}"] if run == PRETRAINING else []
        if resume:  # it has its own settings, but the data may have moved with the study's folder
            words = ["--resume", "latest", *data]
        else:
            if data and self.config.train_data_weights:
                data += ["--train-data-weights", "1"]  # in place of those of several sources
            own = self.own_settings(run)
            settings = {key: value for key, value in self.settings.items() if key not in own}
            budget = _flags(settings) if self.budget in BUDGETS else ["--config", self.budget]
            words = [*_flags(own), *budget, *data]
        return ["-m", "medfast.train", *words, "--logs", str(self.runs), "--name", run.name]

    def evaluation_command(self, run: Run) -> list[str]:
        """Return the words after `python` that evaluate a run on what is left of the suite."""
        assert self.suite is not None
        words = ["--checkpoint", str(self.runs / run.name), *self.suite.words]
        words += _flags({k: self.settings[k] for k in _OF_BOTH if k in self.settings})
        return ["-m", "medfast.evaluate", *words, "--cache-dir", str(self.cache), "--skip-existing"]

    def whole_command(self) -> list[str]:
        """Return the words after `python` that run the study."""
        weights = [] if self.pretrained is None else ["--pretrained", self.pretrained]
        asked = ["--methods", *self.methods, "--budget", self.budget, *weights]
        if self.suite is not None:
            asked += self.suite.asked
        return ["-m", "medfast.study", *asked, "--out", str(self.out)]

    def suite_command(self) -> list[str]:
        """Return the words after `python` that write the phantoms of the suite."""
        return ["-m", "medfast.evals.suite.phantom", "--out", str(self.suite_data)]

    def data_command(self) -> list[str]:
        """Return the words after `python` that write the general domain."""
        place = ["--layout", "roco", "--out", str(self.general_data)]
        size = ["--pairs", str(self.config.phantom_pairs), "--seed", "0"]
        return ["-m", "medfast.data", "phantom", "--domain", "general", *place, *size]


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """Return settings, none of them a list, as words of the command line."""
    words = ([flag(k)] if value is True else [flag(k), str(value)] for k, value in settings.items())
    return [word for pair in words for word in pair]


def shown(command: list[str]) -> str:
    """Return a command as a user would type it."""
    return shlex.join(["python", *command])


def in_order(methods: list[str]) -> tuple[str, ...]:
    """Return methods in the order of `METHODS`, each once."""
    return tuple(key for key in METHODS if key in methods)
