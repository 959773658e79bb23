"""A model and a data set of the suite to results, one for each task."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from medfast.data import read_split
from medfast.data.classification import facts, read, read_splits
from medfast.data.classification.labelled import LabelledSplit
from medfast.data.loader import Batch, Loader
from medfast.data.records import Record, group_ids, study_or_key
from medfast.data.skipped import Skipped, SkippedSamples
from medfast.data.vqa import read_questions
from medfast.errors import UsageError
from medfast.evals.cache import FeatureCache, Frozen
from medfast.evals.encode import Encoder
from medfast.evals.features import GlobalFeatures, LocalFeatures, Matchable
from medfast.evals.linear_probe import Split, linear_probe
from medfast.evals.metrics import mean_classification_metrics
from medfast.evals.prompts import prompt_hash, prompts
from medfast.evals.retrieval import retrieval_figures
from medfast.evals.suite import EVALUATIONS, overlaps
from medfast.evals.vqa import vqa
from medfast.evals.zero_shot import class_texts, zero_shot_metrics

# Of each run of the probe; the rest is the same for all, or only told of the last.
_OF_A_RUN = (
    *("fraction", "seed", "n_train", "C", "validation_accuracy", "metrics", "ci95"),
    *("gradient_norm", "iterations", "converged"),
)
_PROBE_SEEDS = 3


@dataclass(frozen=True)
class Using:
    """What all evaluations of a suite share.

    Attributes:
        encoder: The model.
        cache: Keeps the features of its images.
        skipped: Lists the samples that cannot be used.
        prompts: Which prompts ask zero-shot, of `medfast.evals.prompts.CHOICES`.
        batch_size: Images, or pairs, that the towers take at once.
        workers: Processes that decode.
        seed: Of intervals, of the draws of labels and of the VQA head.
        finetune: Train the towers for VQA too.
    """

    encoder: Encoder
    cache: FeatureCache
    skipped: SkippedSamples
    prompts: str = "default"
    batch_size: int = 128
    workers: int = 0
    seed: int = 0
    finetune: bool = False


def evaluate(key: str, root: Path, tasks: Sequence[str], using: Using) -> Iterator[dict[str, Any]]:
    """Yield the result of each task on a data set, as soon as it is there.

    Args:
        key: Of `EVALUATIONS`.
        root: The data set's folder.
        tasks: Which, of `TASKS` for its kind.
        using: The model, and how.

    Yields:
        "dataset", "task", "split", "seed", "n", "metrics", "chance", "ci95", "ci95_by" (what is
        drawn for the intervals), "skipped" (samples of each split that could not be used),
        "overlaps", "notes", and what the task says beyond that.

    Raises:
        AbsentError: the data set, or a split of it, is not there.
        UsageError: a file is damaged, or no image can be read.
    """
    found = {"classification": _classification, "retrieval": _retrieval, "vqa": _vqa}
    for result in found[EVALUATIONS[key]](key, root, tasks, using):
        yield {
            "dataset": key,
            "name": "",
            "seed": using.seed,
            "overlaps": list(overlaps(key)),
            **result,
        }


def _classification(
    key: str, root: Path, tasks: Sequence[str], using: Using
) -> Iterator[dict[str, Any]]:
    # Each reads what it needs: who has the test images alone gets zero-shot figures.
    if "zero_shot" in tasks:
        yield _zero_shot(key, read(key, root, facts(key).zero_shot), using)
    if "linear_probe" in tasks:
        yield _linear_probe(key, read_splits(key, root), using)


def _zero_shot(key: str, split: LabelledSplit, using: Using) -> dict[str, Any]:
    of, encoder = facts(key), using.encoder
    what = f"{key}, {of.zero_shot} images"
    using.skipped.add(split.skipped)
    asked = prompts(key, using.prompts)
    classes = class_texts(encoder, asked)
    if encoder.late_interaction:
        # Patches of a whole split may not fit into memory; the scores do.
        scores, index = _late_scores(split.samples, classes, using, what)
    else:
        frozen = _frozen(split.samples, using, what)
        images: Matchable = GlobalFeatures(frozen.features)
        scores, index = images.class_scores(classes), frozen.index
    found = zero_shot_metrics(
        scores,
        encoder.model.logit_scale.exp().item(),
        split.labels[index.numpy()].tolist(),
        _groups(split.samples, index),
        graded=of.graded,
        seed=using.seed,
    )
    return {
        "task": "zero_shot",
        "split": of.zero_shot,
        **_named(found, split),
        "ci95_by": _origin(split.samples),
        "prompts": using.prompts,
        "prompts_sha256": prompt_hash(asked),
        "skipped": {of.zero_shot: _unusable(split, index)},
        "notes": list(split.notes),
    }


def _linear_probe(key: str, splits: dict[str, LabelledSplit], using: Using) -> dict[str, Any]:
    parts: dict[str, Split] = {}
    unusable: dict[str, int] = {}
    for name, split in splits.items():
        using.skipped.add(split.skipped)
        frozen = _frozen(split.samples, using, f"{key}, {name} images")
        labels = torch.from_numpy(split.labels)[frozen.index]
        parts[name] = Split(frozen.features, labels, _groups(split.samples, frozen.index))
        unusable[name] = _unusable(split, frozen.index)
    test = splits["test"]
    fits = linear_probe(
        *(parts["train"], parts["validation"], parts["test"], len(test.classes)),
        seeds=range(using.seed, using.seed + _PROBE_SEEDS),
        graded=facts(key).graded,
    )
    runs = list(_progress(fits, f"{key}, linear probe"))
    shares: dict[float, list[dict[str, Any]]] = {}
    for run in runs:
        shares.setdefault(run["fraction"], []).append(run)
    whole = runs[-1]
    means = {
        f"{fraction:g}": _mean_of_draws(own, parts["test"], facts(key).graded)
        for fraction, own in shares.items()
    }
    told = (*_OF_A_RUN, "probabilities")
    mean_patch = using.encoder.late_interaction
    return {
        "task": "linear_probe",
        "split": "test",
        **_named({name: x for name, x in whole.items() if name not in told}, test),
        "metrics": whole["metrics"],
        "ci95": whole["ci95"],
        "ci95_by": _origin(test.samples),
        "features": "mean of unit patch features" if mean_patch else "unit image features",
        "runs": [{name: run[name] for name in _OF_A_RUN} for run in runs],
        "by_fraction": {share: mean["metrics"] for share, mean in means.items()},
        "by_fraction_ci95": {share: mean["ci95"] for share, mean in means.items()},
        "skipped": unusable,
        "notes": list(dict.fromkeys(note for split in splits.values() for note in split.notes)),
    }


def _mean_of_draws(runs: Sequence[dict[str, Any]], test: Split, graded: bool) -> dict[str, Any]:
    """Return the mean over draws of the labels, and its intervals."""
    if len(runs) == 1:
        return runs[0]
    return mean_classification_metrics(
        *([run["probabilities"] for run in runs], test.labels.numpy(), test.groups),
        graded=graded,
        seed=runs[0]["seed"],
    )


def _retrieval(
    key: str, root: Path, tasks: Sequence[str], using: Using
) -> Iterator[dict[str, Any]]:
    found = read_split(key, root, "test")
    using.skipped.add(found.skipped)
    loader = _ShownLoader(found.records, using, f"{key}, pairs")
    embeddings = using.encoder.pairs(loader, using.skipped)
    pairs = [found.records[at] for at in embeddings.index.tolist()]
    # Studies of one patient, or figures of one article, are not independent either.
    groups = [pair.origin or study_or_key(pair) for pair in pairs]
    result = retrieval_figures(
        embeddings,
        [pair.caption for pair in pairs],
        [pair.place for pair in pairs],
        groups,
        seed=using.seed,
    )
    kinds = {group.partition(" ")[0] for group in groups}
    unusable = len(found.skipped) + len(found.records) - len(embeddings.index)
    for task in tasks:
        yield {
            "task": task,
            "split": "test",
            **_direction(result, task),
            "ci95_by": " or ".join(sorted("pair" if kind == "key" else kind for kind in kinds)),
            "skipped": {"test": unusable},
            "notes": ["the split is the one that upstream calls val"] if key == "quilt" else [],
        }


def _vqa(key: str, root: Path, tasks: Sequence[str], using: Using) -> Iterator[dict[str, Any]]:
    found = read_questions(key, root)
    using.skipped.add(found.skipped)
    splits = (found.train, found.validation, found.test)
    result = vqa(
        using.encoder,
        *splits,
        using.encoder.image_size,
        seed=using.seed,
        finetune=using.finetune,
        skip=using.skipped.add,
    )
    for task in tasks:
        yield {"task": task, "split": "test", **result, "ci95_by": "image", "notes": found.notes}


class _ShownLoader(Loader):
    """A loader of held-out samples that shows how far it is, on a terminal."""

    def __init__(self, records: Sequence[Record], using: Using, what: str) -> None:
        encoder = using.encoder
        super().__init__(
            *(records, encoder.tokenizer, encoder.image_size, using.batch_size),
            workers=using.workers,
        )
        self._what = what

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        yield from _progress(super().epoch(epoch, start), self._what, len(self))


def _frozen(records: Sequence[Record], using: Using, what: str) -> Frozen:
    """Return one vector for each image, from the cache if it has them."""
    found = using.cache.get(records, lambda: _computed(records, using, what))
    using.skipped.add(found.skipped)
    return found


def _computed(records: Sequence[Record], using: Using, what: str) -> Frozen:
    vectors, index = [], []
    skipped: list[Skipped] = []
    for batch in _ShownLoader(records, using, what).epoch(0):
        skipped += batch.skipped
        if len(batch):
            vectors.append(_vectors(using.encoder.images(batch.images)))
            index.append(batch.index)
    if not vectors:
        raise _unreadable(records, what)
    return Frozen(torch.cat(vectors), torch.cat(index), tuple(skipped))


def _vectors(features: Matchable) -> Tensor:
    """Return the features of N images, or of each the mean of its patches' features, [N, D]."""
    if isinstance(features, LocalFeatures):
        return features.unit.mean(1).cpu()
    assert isinstance(features, GlobalFeatures)
    return features.unit


def _late_scores(
    records: Sequence[Record], classes: Sequence[Matchable], using: Using, what: str
) -> tuple[Tensor, Tensor]:
    """Return the scores of readable images and classes, [N, K], and the images' positions, [N]."""
    scores, index = [], []
    for batch in _ShownLoader(records, using, what).epoch(0):
        using.skipped.add(batch.skipped)
        if len(batch):
            scores.append(using.encoder.images(batch.images).class_scores(classes))
            index.append(batch.index)
    if not scores:
        raise _unreadable(records, what)
    return torch.cat(scores), torch.cat(index)


def _unreadable(records: Sequence[Record], what: str) -> UsageError:
    return UsageError(
        f"{what}: none of the {len(records)} can be read. Get a whole copy of the data set."
    )


def _groups(records: Sequence[Record], index: Tensor) -> list[int]:
    """Return the patient, lesion or slide of each image at `index`, as numbers."""
    groups = group_ids(records)
    return [groups[at] for at in index.tolist()]


def _origin(records: Sequence[Record]) -> str:
    """Return what is known to tell images that belong together, as "patient" or "lesion"."""
    kinds = {record.origin.partition(" ")[0] for record in records if record.origin is not None}
    return " or ".join(sorted(kinds)) or "image"


def _unusable(split: LabelledSplit, index: Tensor) -> int:
    return len(split.skipped) + len(split) - len(index)


def _named(found: dict[str, Any], split: LabelledSplit) -> dict[str, Any]:
    """Return the numbers of a classification, with the names of the classes."""
    rows = zip(split.classes, found["per_class"], strict=True)
    return {**found, "per_class": [{"class": name, **row} for name, row in rows]}


def _direction(result: dict[str, Any], task: str) -> dict[str, Any]:
    """Return the numbers of one direction of retrieval, by their names without it."""

    def own(part: dict[str, Any]) -> dict[str, Any]:
        lead = f"{task}_"
        return {n.removeprefix(lead): x for n, x in part.items() if n.startswith(lead)}

    of_both = {name: own(result[name]) for name in ("metrics", "chance", "ci95")}
    return {**result, **of_both, "positives": result["positives"][task]}


def _progress(items: Any, what: str, total: int | None = None) -> Iterator[Any]:
    return iter(tqdm(items, desc=what, total=total, disable=not sys.stderr.isatty(), leave=False))
