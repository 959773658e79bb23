"""What is exported: the weights of a run, its settings, and what it reached."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medfast import checkpoint, json_lines
from medfast.config import TrainConfig
from medfast.data.tokens import Tokenizer
from medfast.errors import UsageError
from medfast.evals.cache import weights_hash
from medfast.evals.models import load_encoder
from medfast.methods import method_class
from medfast.models.pair import ImageTextModel

# The terms, of all methods, that contrast global features.
_GLOBAL = frozenset({"clip", "multi_view", "nearest"})


@dataclass(frozen=True)
class Trained:
    """One checkpoint of a run.

    Attributes:
        folder: The run's.
        name: The run's.
        config: Its settings.
        model: The weights, in fp32.
        tokenizer: Their tokenizer.
        epoch: Whole epochs that were trained.
        step: Steps that were trained.
        pairs: Training pairs.
        world: Processes that trained together.
        left_out: Names of what was trained or kept beside towers and global projections.
        is_best: It is the best epoch of a run that stops early.
        is_final: These are the weights that the run ended with and evaluated, if it ended.
    """

    folder: Path
    name: str
    config: TrainConfig
    model: ImageTextModel
    tokenizer: Tokenizer
    epoch: int
    step: int
    pairs: int
    world: int
    left_out: tuple[str, ...]
    is_best: bool
    is_final: bool

    def results(self) -> list[dict[str, Any]]:
        """Return the result rows of these very weights, those that the run ended with first.

        Raises:
            UsageError: a file of them is damaged.
        """
        rows = json_lines.read(self.folder / "results.jsonl") if self.is_final else []
        evaluations = sorted((self.folder / "evaluations").glob("*.json"))
        own = weights_hash(self.model) if evaluations else ""
        for path in evaluations:
            rows += [row for row in json_lines.read(path) if row.get("model_sha256") == own]
        return [row for row in rows if row.get("metrics")]

    @property
    def terms(self) -> dict[str, float]:
        """The weight of each term of the loss."""
        return _terms(self.config)


def read_run(source: Path) -> Trained:
    """Return the best epoch of a run that stops early, else its newest checkpoint, or one named.

    Args:
        source: A run folder, or one of its checkpoints. Nothing in it is unpickled but tensors.

    Raises:
        UsageError: it is no run, damaged, or of a method that does not train global features.
    """
    folder = source if source.is_dir() else source.absolute().parent.parent
    kept = _kept(folder)
    path = source if source.is_file() else kept
    if path is None:
        raise UsageError(
            f"RUN {source} holds no checkpoint (checkpoints/epoch_N.pt): it must be a folder that "
            "medfast train wrote, or a checkpoint in one; train it to the end of an epoch."
        )
    try:
        state = checkpoint.load(path)
    except UsageError as error:
        raise UsageError("RUN" + str(error).removeprefix("--resume")) from None
    encoder = load_encoder(str(path), torch.device("cpu"), "fp32", flag="RUN")
    config, model = TrainConfig(**state["config"]), encoder.model
    assert isinstance(model, ImageTextModel)  # as checkpoints of medfast hold no other
    terms = [term for term, weight in _terms(config).items() if weight]
    if not _GLOBAL.intersection(terms):
        raise UsageError(
            f"RUN {source} was trained by {config.method} with the loss {' + '.join(terms)}, which "
            "is not of global features: these, all that open_clip and transformers have, were "
            "never trained. Evaluate it with medfast evaluate --checkpoint, or train another way."
        )
    parts = [n for n in ("patch_projection", "token_projection") if getattr(model, n) is not None]
    heads = dict.fromkeys(name.partition(".")[0] for name in state["method"])
    return Trained(
        folder=folder,
        name=state.get("name", folder.absolute().name),
        config=config,
        model=model,
        tokenizer=encoder.tokenizer,
        epoch=state["epoch"],
        step=state["step"],
        pairs=state["data"]["pairs"],
        world=state["world"],
        left_out=(*parts, *heads),
        is_best=path.name == checkpoint.best(folder).name,
        is_final=kept is not None and path.absolute() == kept.absolute(),
    )


def _terms(config: TrainConfig) -> dict[str, float]:
    return {**method_class(config.method).terms, **config.term_weights}


def _kept(folder: Path) -> Path | None:
    """Return the checkpoint that stands for a run."""
    best = checkpoint.best(folder / "checkpoints")
    return best if best.is_file() else next(iter(checkpoint.listing(best.parent)[-1:]), None)
