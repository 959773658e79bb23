"""Every setting of a training run: default, help text, group and cross-field rules."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from medfast.data import SOURCES, parse_source
from medfast.errors import UsageError, unknown_name
from medfast.methods import METHODS
from medfast.models import PRESETS, Preset

Impl = Literal["auto", "triton", "cuda", "cpu", "torch", "reference"]
Precision = Literal["auto", "fp32", "amp_bf16", "amp", "pure_bf16"]
OptimizerName = Literal["adamw", "lamb", "apex_lamb"]
Device = Literal["auto", "cpu", "cuda"]
LoaderName = Literal["auto", "dali", "torch"]
Comm = Literal["auto", "ring", "gather", "symmetric"]
Sharding = Literal["none", "full"]

# Settings in place of the defaults, by the name of --recipe.
RECIPES: dict[str, dict[str, Any]] = {
    # The values that the authors of the study (arXiv 2406.07450) published later, in mmlearn; they
    # are not the paper's. How many epochs it waits is ours.
    "study": {
        "model": "vit_b16_clip",
        "batch_size": 512,
        "resize_short": 512,
        "epochs": 20,
        "lr": 5e-5,
        "wd": 0.1,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-6,
        "warmup": 0,
        "early_stop": 5,
    }
}


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

    train_data: tuple[str, ...] = setting(
        ("phantom",),
        "data",
        "Sources of image-caption pairs: 'phantom' (written on first use) or NAME:FOLDER, for "
        "example roco:/data/roco pmc_oa:/data/pmc_oa. NAME is one of "
        f"{', '.join(name for name in SOURCES if name != 'phantom')}.",
    )
    train_data_weights: tuple[float, ...] = setting(
        (),
        "data",
        "Share of each source in an epoch, up to a factor; without them every pair comes once.",
    )
    csv_img_key: str = setting("filepath", "data", "Column of image paths in a csv source.")
    csv_caption_key: str = setting("title", "data", "Column of captions in a csv source.")
    csv_separator: str | None = setting(
        None, "data", "Separator of a csv source; without it a tab or a comma, as in the file."
    )
    exclude: str | None = setting(
        None,
        "data",
        "Exclusion list of `medfast data check`; without it those that lie in the sources' "
        "folders; 'none' uses none.",
    )
    phantom_pairs: int = setting(6000, "data", "Pairs that the phantom source writes.")
    cache_dir: str = setting(
        "~/.cache/medfast", "data", "Folder that keeps the phantom data.", frozen_on_resume=False
    )
    batch_size: int = setting(
        64, "data", "Pairs that pass through the towers at a time, in each process."
    )
    accum_freq: int = setting(
        1,
        "data",
        "Such batches per step: the gradient is exactly that of one batch of all their pairs, at "
        "the price of a second pass through the towers.",
    )
    resize_short: int | None = setting(
        None,
        "data",
        "Training crops are squares of the model's size from images whose short side has this many "
        "pixels; without it they keep most of the image.",
    )
    loader: LoaderName = setting(
        "auto",
        "data",
        "What decodes the images: NVIDIA DALI or, sample by sample, Pillow in processes. auto: "
        "dali where it is installed and most images are plain JPEG files.",
    )
    workers: int = setting(
        1,
        "data",
        "Processes that decode images, or DALI's threads; 0 decodes in the main process. The "
        "result does not depend on it.",
        frozen_on_resume=False,
    )
    max_bad_samples: float = setting(
        0.01,
        "data",
        "Share of unreadable samples at which the run stops.",
        frozen_on_resume=False,
    )

    model: str = setting("tiny", "model", "Preset of the two towers.", known=PRESETS)
    force_image_size: int | None = setting(
        None, "model", "Side of the input in pixels, in place of the preset's."
    )
    force_context_length: int | None = setting(
        None, "model", "Most tokens of a caption, in place of the preset's."
    )
    tokenizer: str | None = setting(
        None,
        "model",
        "Folder of a published tokenizer; without it the one of the pretrained text tower, else "
        "one that is trained on the training captions.",
    )
    pretrained: str | None = setting(
        None,
        "model",
        "Weights of both towers: a file or folder of transformers', open_clip's or timm's CLIP, a "
        "run folder or checkpoint of medfast, or a name on the Hugging Face hub.",
    )
    pretrained_image: str | None = setting(
        None, "model", "Weights of the image tower alone, such as an ImageNet ViT of timm's."
    )
    pretrained_text: str | None = setting(
        None, "model", "Weights of the text tower alone, such as a BERT of transformers'."
    )
    lock_image: bool = setting(False, "model", "Do not train the image tower.")
    lock_image_unlocked_groups: int = setting(
        0, "model", "Last groups of layers of a locked image tower that are trained all the same."
    )
    lock_text: bool = setting(False, "model", "Do not train the text tower.")
    lock_text_unlocked_layers: int = setting(
        0, "model", "Last layers of a locked text tower that are trained all the same."
    )
    grad_checkpointing: bool = setting(
        False, "model", "Compute activations again in the backward instead of keeping them."
    )
    torchcompile: bool = setting(
        False, "model", "Train the towers compiled by torch.compile, which takes minutes at first."
    )
    precision: Precision = setting(
        "auto",
        "model",
        "Number format of the towers; losses sum in fp32. amp_bf16 and amp (fp16, its loss scaled) "
        "keep the weights in fp32, pure_bf16 has them in bf16. auto: amp_bf16 where the hardware "
        "has bf16 products, else fp32.",
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
    loss_weights: tuple[str, ...] = setting(
        (), "method", "Weights of loss terms in place of the published ones, as TERM=X."
    )

    epochs: int = setting(12, "optimisation", "Passes over the training pairs.")
    lr: float = setting(1e-3, "optimisation", "Peak learning rate.")
    optimizer: OptimizerName = setting(
        "adamw", "optimisation", "LAMB is for large batches; apex_lamb is NVIDIA apex's, on a GPU."
    )
    wd: float = setting(0.1, "optimisation", "Weight decay; none on vectors.")
    beta1: float = setting(0.9, "optimisation", "First momentum of the optimiser.")
    beta2: float = setting(0.98, "optimisation", "Second momentum of the optimiser.")
    eps: float = setting(1e-6, "optimisation", "Epsilon of the optimiser.")
    warmup: int = setting(50, "optimisation", "Steps of linear warm-up before the cosine.")
    grad_clip_norm: float | None = setting(
        1.0, "optimisation", "Largest norm of the whole gradient."
    )
    early_stop: int = setting(
        0,
        "optimisation",
        "Epochs without a lower validation loss after which the run stops; the best epoch is what "
        "it evaluates. 0: trains to the end.",
    )
    seed: int = setting(0, "optimisation", "Seed of weights, data order and augmentation.")

    comm: Comm = setting(
        "auto",
        "several processes (torchrun)",
        "How features cross processes: around a ring, so that none ever holds those of all, or "
        "gathered. auto: gathered where messages are so small that latency decides. symmetric: as "
        "ring, and sums go through NVLink by a kernel, which has not run on several GPUs yet.",
    )
    sharding: Sharding = setting(
        "none",
        "several processes (torchrun)",
        "full: each process keeps a part of the towers' weights, gradients and optimiser state "
        "(FSDP2).",
    )
    timeout: float = setting(
        600.0,
        "several processes (torchrun)",
        "Seconds after which a process that does not answer is named and the run stops.",
        frozen_on_resume=False,
    )

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
        "there with the run's own settings. 'auto': latest of --name, or a new run if there is "
        "none.",
        frozen_on_resume=False,
    )
    save_frequency: int = setting(
        1, "run", "Epochs between two checkpoints.", frozen_on_resume=False
    )
    save_steps: int = setting(
        0,
        "run",
        "Steps between two checkpoints within an epoch; 0 saves at the ends of epochs alone.",
        frozen_on_resume=False,
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
    show_credentialed_images: bool = setting(
        False,
        "run",
        "Show held-out images of credentialed sets in report.html too: keep that file where the "
        "set may be kept.",
        frozen_on_resume=False,
    )
    dry_run: bool = setting(
        False,
        "run",
        "Check the settings and the data, print what would run and stop.",
        frozen_on_resume=False,
    )

    def __post_init__(self) -> None:
        for name in ("train_data", "train_data_weights", "loss_weights"):
            value = getattr(self, name)
            # A config file has a list, or a single word.
            if isinstance(value, list | str):
                value = (value,) if isinstance(value, str) else tuple(value)
                object.__setattr__(self, name, value)
        for name, annotation in get_type_hints(type(self)).items():
            value = getattr(self, name)
            _check_type(name, annotation, value)
            numbers = value if isinstance(value, tuple) else (value,)
            finite = all(math.isfinite(n) for n in numbers if isinstance(n, float))
            self._require(name, finite, "finite")
        for item in fields(self):
            known = item.metadata.get("known")
            if known is not None and getattr(self, item.name) not in known:
                raise UsageError(unknown_name(flag(item.name), getattr(self, item.name), known))
        for name in (
            *("phantom_pairs", "epochs", "accum_freq"),
            *("save_frequency", "keep_checkpoints", "log_every"),
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("seed", 0 <= self.seed < 2**63, "0 or more and below 2**63")
        for name in (
            *("workers", "warmup", "wd", "save_steps", "early_stop"),
            *("lock_image_unlocked_groups", "lock_text_unlocked_layers"),
        ):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("lr", "eps", "timeout"):
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
        self._require(
            "resume",
            self.resume != "auto" or self.name is not None,
            "with a --name, by which the run is found again",
        )
        if self.sharding == "full" and self.optimizer != "adamw":
            raise UsageError(
                f"--sharding full: --optimizer {self.optimizer} needs whole weights; use adamw."
            )
        if self.sharding == "full" and self.precision == "amp":
            # torch's scaler looks at all gradients at once, and takes no parts beside whole ones.
            raise UsageError(
                "--sharding full: --precision amp needs gradients that are all whole; use amp_bf16."
            )
        self._check_sources()
        self._check_model()

    def _check_model(self) -> None:
        for name, least in (("force_image_size", 1), ("force_context_length", 3)):
            value = getattr(self, name)
            self._require(name, value is None or value >= least, f"at least {least}")
        short = self.resize_short
        self._require(
            "resize_short",
            short is None or short >= self.preset.image_size,
            f"at least the model's image size, {self.preset.image_size}",
        )
        for whole, part in (("pretrained", "pretrained_image"), ("pretrained", "pretrained_text")):
            if getattr(self, whole) is not None and getattr(self, part) is not None:
                raise UsageError(
                    f"{flag(part)} and {flag(whole)} are both given, and both hold that tower; "
                    "leave one out."
                )
        for entry in self.loss_weights:
            self._parsed_weight(entry)

    def _parsed_weight(self, entry: str) -> tuple[str, float]:
        term, _, text = entry.partition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not term or not 0 <= weight < math.inf:
            raise UsageError(
                f"--loss-weights must be TERM=X with X of 0 or more, as in clip=1; got {entry!r}."
            )
        return term, weight

    def _check_sources(self) -> None:
        self._require("train_data", bool(self.train_data), "at least one source")
        for text in self.train_data:
            if text == "phantom":
                continue
            key, _, folder = text.partition(":")
            if key == "phantom":
                raise UsageError(
                    "--train-data phantom takes no folder: use --cache-dir for where it is kept, "
                    f"or roco:{folder} for phantom data that you wrote yourself."
                )
            try:
                parse_source(text)
            except UsageError as error:
                raise UsageError(f"--train-data: {error}") from None
        twice = [text for text in self.train_data if self.train_data.count(text) > 1]
        self._require("train_data", not twice, "sources that differ")
        weights = self.train_data_weights
        self._require(
            "train_data_weights",
            len(weights) in (0, len(self.train_data)),
            f"as many as there are sources ({len(self.train_data)})",
        )
        self._require("train_data_weights", all(w > 0 for w in weights), "above 0")
        for name in ("csv_img_key", "csv_caption_key"):
            self._require(name, bool(getattr(self, name)), "the name of a column")
        self._require(
            "csv_separator",
            self.csv_separator is None or len(self.csv_separator) == 1,
            "a single character",
        )

    @property
    def preset(self) -> Preset:
        """Shape of the towers, with the sizes that were forced."""
        own = PRESETS[self.model]
        return replace(
            own,
            image_size=self.force_image_size or own.image_size,
            context_length=self.force_context_length or own.context_length,
        )

    @property
    def term_weights(self) -> dict[str, float]:
        """The weights of single loss terms that were asked for."""
        return dict(self._parsed_weight(entry) for entry in self.loss_weights)

    @property
    def sources(self) -> list[tuple[str, str]]:
        """The key and the folder of each source; the phantom's folder is empty."""
        parts = (text.partition(":") for text in self.train_data)
        return [(key, folder) for key, _, folder in parts]

    @property
    def dataset(self) -> str:
        """Names of the sources, for result rows."""
        return "+".join(key for key, _ in self.sources)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            value = getattr(self, name)
            got = (_shown(value) or "none") if isinstance(value, tuple) else repr(value)
            raise UsageError(f"{flag(name)} must be {expected}; got {got}.")


def flag(name: str) -> str:
    """Return the command-line flag of the field `name`."""
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    """Return a setting as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


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
    if get_origin(annotation) is tuple:
        element = get_args(annotation)[0]
        if not isinstance(value, tuple):
            raise UsageError(f"{flag(name)} must be a list; got {value!r}.")
        for item in value:
            _check_type(name, element, item)
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
        elif item.name == "train_data" and own.dataset == config.dataset:
            changes[item.name] = now  # the same data set, moved to another folder
        elif was != now:
            raise UsageError(
                f"--resume: {flag(item.name)} is {_shown(was)} in this run and {_shown(now)} now; "
                "leave it out, or start a new run."
            )
    return replace(own, **changes)


def pairs_of_step(config: TrainConfig, pairs: int, world: int) -> tuple[int, int]:
    """Return what a step takes of data that may hold fewer pairs than the settings ask for.

    Args:
        config: The settings.
        pairs: Training pairs, at least one.
        world: Processes that train together.

    Returns:
        The pairs that pass through the towers of all processes at a time, and how many times.
    """
    at_a_time = min(config.batch_size * world, pairs)
    return at_a_time, min(config.accum_freq, pairs // at_a_time)


def for_processes(config: TrainConfig, was: int, now: int) -> TrainConfig:
    """Return the settings by which `now` processes take the very steps that `was` took.

    A step keeps its pairs, and no process takes more of them at a time than before.

    Raises:
        UsageError: the pairs of a step cannot be shared out evenly.
    """
    if was == now:
        return config
    pairs = was * config.batch_size * config.accum_freq
    own, rest = divmod(pairs, now)
    parts = next(
        (n for n in range(1, own + 1) if own % n == 0 and own // n <= config.batch_size), 0
    )
    if rest or own // max(1, parts) < 2:
        fit = [str(n) for n in range(1, pairs // 2 + 1) if pairs % n == 0]
        raise UsageError(
            f"--resume: the run has {pairs} pairs per step, which {now} processes cannot share out "
            f"evenly; use {' or '.join(fit[:12])}."
        )
    return replace(config, batch_size=own // parts, accum_freq=parts)
