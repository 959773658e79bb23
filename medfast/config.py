"""Every setting of a training run: default, help text, group and cross-field rules."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from medfast.data import SOURCES
from medfast.errors import UsageError, unknown_name
from medfast.methods import METHODS
from medfast.models import PRESETS

Impl = Literal["auto", "triton", "cuda", "cpu", "torch", "reference"]
Precision = Literal["auto", "fp32", "amp_bf16"]
Device = Literal["auto", "cpu", "cuda"]


def setting(default: Any, group: str, help: str, **extra: Any) -> Any:
    """Return a dataclass field that also carries its help text and its group.

    `frozen_on_resume=False` in `extra` marks a setting that a resumed run may change, because it
    does not touch the numbers; `known` is the table that the value must be a key of.
    """
    metadata = {"group": group, "help": help, "frozen_on_resume": True, **extra}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one run. Field names are the flags' names and the keys of params.yaml."""

    train_data: str = setting(
        "phantom",
        "data",
        "Source of image-caption pairs: 'phantom' (written on first use) or NAME:FOLDER, "
        "for example roco:/data/roco.",
    )
    phantom_pairs: int = setting(6000, "data", "Pairs that the phantom source writes.")
    cache_dir: str = setting(
        "~/.cache/medfast", "data", "Folder that keeps the phantom data.", frozen_on_resume=False
    )
    batch_size: int = setting(64, "data", "Pairs per step.")
    workers: int = setting(
        1,
        "data",
        "Processes that decode images; 0 decodes in the main one. The result does not depend on "
        "it.",
        frozen_on_resume=False,
    )
    max_bad_samples: float = setting(
        0.01,
        "data",
        "Share of unreadable samples at which the run stops.",
        frozen_on_resume=False,
    )

    model: str = setting("tiny", "model", "Preset of the two towers.", known=PRESETS)
    tokenizer: str | None = setting(
        None,
        "model",
        "Folder of a published tokenizer; without it one is trained on the training captions.",
    )
    precision: Precision = setting(
        "auto",
        "model",
        "Number format of the towers; losses sum in fp32. auto: amp_bf16 where the hardware has "
        "bf16 products, else fp32.",
    )

    method: str = setting("local", "method", "Contrastive method.", known=METHODS)
    fused_loss: Impl = setting(
        "auto",
        "method",
        "Implementation of the losses; --fused-loss alone means auto, --no-fused-loss means "
        "reference.",
    )
    group_positives: bool = setting(
        False,
        "method",
        "Count images and captions of one study as positives of one another in the global loss.",
    )

    epochs: int = setting(12, "optimisation", "Passes over the training pairs.")
    lr: float = setting(1e-3, "optimisation", "Peak learning rate.")
    wd: float = setting(0.1, "optimisation", "Weight decay of AdamW; none on vectors.")
    beta1: float = setting(0.9, "optimisation", "First momentum of AdamW.")
    beta2: float = setting(0.98, "optimisation", "Second momentum of AdamW.")
    eps: float = setting(1e-6, "optimisation", "Epsilon of AdamW.")
    warmup: int = setting(50, "optimisation", "Steps of linear warm-up before the cosine.")
    grad_clip_norm: float | None = setting(
        1.0, "optimisation", "Largest norm of the whole gradient."
    )
    seed: int = setting(0, "optimisation", "Seed of weights, data order and augmentation.")

    logs: str = setting("logs", "run", "Folder that holds the run folders.", frozen_on_resume=False)
    name: str | None = setting(
        None,
        "run",
        "Name of the run folder; without it method, model and time.",
        frozen_on_resume=False,
    )
    resume: str | None = setting(
        None,
        "run",
        "'latest' (of --name, else of the newest run in --logs) or a checkpoint file: go on from "
        "there with the run's own settings.",
        frozen_on_resume=False,
    )
    save_frequency: int = setting(
        1, "run", "Epochs between two checkpoints.", frozen_on_resume=False
    )
    keep_checkpoints: int = setting(
        2, "run", "Newest checkpoints that are kept.", frozen_on_resume=False
    )
    log_every: int = setting(
        20, "run", "Steps between two lines of the log.", frozen_on_resume=False
    )
    device: Device = setting(
        "auto", "run", "Where to train; auto takes a GPU when there is one.", frozen_on_resume=False
    )
    dry_run: bool = setting(
        False,
        "run",
        "Check the settings and the data, print what would run and stop.",
        frozen_on_resume=False,
    )

    def __post_init__(self) -> None:
        for name, annotation in get_type_hints(type(self)).items():
            value = getattr(self, name)
            _check_type(name, annotation, value)
            self._require(name, not isinstance(value, float) or math.isfinite(value), "finite")
        for item in fields(self):
            known = item.metadata.get("known")
            if known is not None and getattr(self, item.name) not in known:
                raise UsageError(unknown_name(flag(item.name), getattr(self, item.name), known))
        for name in (
            *("phantom_pairs", "epochs"),
            *("save_frequency", "keep_checkpoints", "log_every"),
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("seed", 0 <= self.seed < 2**63, "0 or more and below 2**63")
        for name in ("workers", "warmup", "wd"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("lr", "eps"):
            self._require(name, getattr(self, name) > 0, "above 0")
        for name in ("beta1", "beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("batch_size", self.batch_size >= 2, "at least 2: one pair has no negatives")
        self._require("max_bad_samples", 0 <= self.max_bad_samples <= 1, "a share in [0, 1]")
        self._require(
            "grad_clip_norm",
            self.grad_clip_norm is None or self.grad_clip_norm > 0,
            "above 0; grad_clip_norm: null in a config file turns clipping off",
        )
        for name in ("logs", "cache_dir"):
            self._require(name, bool(getattr(self, name).strip()), "a folder")
        self._require(
            "name",
            self.name is None or _is_folder_name(self.name),
            "a plain folder name: printable, no slash, no space at its ends, 200 letters at most",
        )
        source, folder = self.source, self.source_folder
        if source not in SOURCES and ("/" in source or Path(source).exists()):
            raise UsageError(
                f"--train-data must be NAME:FOLDER; got {self.train_data}. Say which data set the "
                f"folder holds, such as roco:{self.train_data}."
            )
        if source not in SOURCES:
            raise UsageError(unknown_name("--train-data", source, SOURCES))
        if source == "phantom" and folder:
            raise UsageError(
                "--train-data phantom takes no folder: use --cache-dir for where it is kept, or "
                f"roco:{folder} for phantom data that you wrote yourself."
            )
        if source != "phantom" and not folder:
            raise UsageError(f"--train-data {source} needs a folder: --train-data {source}:FOLDER.")

    @property
    def source(self) -> str:
        """Name of the data set that `train_data` names."""
        return self.train_data.partition(":")[0]

    @property
    def source_folder(self) -> str:
        """Folder that `train_data` names, or nothing."""
        return self.train_data.partition(":")[2]

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UsageError(f"{flag(name)} must be {expected}; got {getattr(self, name)!r}.")


def flag(name: str) -> str:
    """Return the command-line flag of the field `name`."""
    return "--" + name.replace("_", "-")


def _is_folder_name(name: str) -> bool:
    return (
        name.isprintable()
        and name == name.strip()
        and 0 < len(name) <= 200
        and name not in (".", "..")
        and not set(name) & set("/\\")
    )


def _check_type(name: str, annotation: Any, value: Any) -> None:
    """Refuse a value of another type, which only a config file can bring in."""
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            raise UsageError(unknown_name(flag(name), str(value), get_args(annotation)))
        return
    accepted = get_args(annotation) or (annotation,)
    # YAML reads 1 as an integer where 1.0 is meant, and True is an int to Python.
    fits = type(value) in accepted or (type(value) is int and float in accepted)
    if not fits:
        names = " or ".join("null" if t is type(None) else t.__name__ for t in accepted)
        raise UsageError(f"{flag(name)} must be {names}; got {value!r}.")


def resumed(config: TrainConfig, given: Collection[str], saved: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a run that goes on: its own, but for those that may change.

    Args:
        config: The settings asked for now.
        given: Names of those that were asked for rather than left at their defaults.
        saved: The settings in the checkpoint.

    Raises:
        UsageError: a setting that changes the numbers was given another value.
    """
    try:
        own = TrainConfig(**saved)
    except (TypeError, UsageError) as error:
        raise UsageError(
            f"--resume: the run's settings do not fit this version of medfast ({error})."
        ) from None
    changes: dict[str, Any] = {}
    for item in fields(config):
        if item.name not in given:
            continue
        was, now = getattr(own, item.name), getattr(config, item.name)
        if not item.metadata["frozen_on_resume"]:
            changes[item.name] = now
        elif item.name == "train_data" and own.source == config.source:
            changes[item.name] = now  # the same data set, moved to another folder
        elif was != now:
            raise UsageError(
                f"--resume: {flag(item.name)} is {was} in this run and {now} now; leave it out, or "
                "start a new run."
            )
    return replace(own, **changes)
