"""Visual question answering: a small head on the towers names one of the training answers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from medfast.data.decode import ImageError, decode
from medfast.data.skipped import Skipped
from medfast.data.views import centre_box
from medfast.data.vqa.questions import Question
from medfast.device import autocast
from medfast.errors import UsageError
from medfast.evals.answers import (
    candidate_answers,
    exact,
    majority_answers,
    normalise_answer,
    score,
)
from medfast.evals.bootstrap import bootstrap_ci
from medfast.evals.encode import Encoder
from medfast.models.fusion import FusionHead, standardised

# Patch features of all images beyond it are computed again for every batch.
_MOST_KEPT = 8 * 2**30
# Images, or texts, that the towers take at once where nothing is trained.
_ROWS = 64
# Training questions, at most, spread over all, from which the head takes the scale of features.
_MEASURED = 256


@dataclass(frozen=True)
class Training:
    """The head and how it is trained: with AdamW, until the validation accuracy no longer rises.

    Attributes:
        width: Of the head's layers.
        layers: How many it has.
        epochs: The most.
        patience: Epochs without a better validation accuracy after which to stop.
        batch_size: Questions per step.
        lr: Of the head.
        tower_lr: Of the towers, where they are trained too.
        weight_decay: Of matrices.
    """

    width: int = 256
    layers: int = 2
    epochs: int = 50
    patience: int = 8
    batch_size: int = 64
    lr: float = 5e-4
    tower_lr: float = 2e-5
    weight_decay: float = 0.05


def vqa(
    encoder: Encoder,
    train: Sequence[Question],
    validation: Sequence[Question],
    test: Sequence[Question],
    size: int,
    *,
    seed: int = 0,
    finetune: bool = False,
    training: Training = Training(),
    skip: Callable[[list[Skipped]], None] | None = None,
) -> dict[str, Any]:
    """Return the accuracy on test questions, with two baselines on the same ones.

    Question and image go through the model's own towers, whose word and patch features a
    `FusionHead` joins. The head chooses among the normalised answers of the training questions, by
    cross-entropy: every training question has exactly one of them, so that they exclude one
    another. The epoch with the best validation accuracy is kept, the first of equal ones. A test
    question with another answer counts as wrong.

    The baselines are the most frequent training answer to questions of the same kind (`chance` and
    `baselines`), and a head that is trained in the same way and never sees an image.

    On one machine the row depends on its arguments alone; on a CPU bit for bit.

    Args:
        encoder: The model; it is left as it is, also if it is to be fine-tuned.
        train: Questions to train on; the only ones that give answers to choose from.
        validation: Questions to stop by.
        test: Questions to be scored on.
        size: Side of the model's square input in pixels; of an image, it is the central square.
        seed: Of the head, of the order of the questions and of the intervals.
        finetune: Train a copy of the towers too, each time.
        training: Which head, and how.
        skip: Takes the images that cannot be used.

    Returns:
        "n" and "n_by" type of question; "metrics", "chance" and "ci95" (by images), each with
        "accuracy" and, where there are such questions, "accuracy_closed" and "accuracy_open";
        "baselines", the same of "majority" and "question_only"; "gain_over_question_only", the
        difference of the accuracies; "candidates", how many answers there are to choose from;
        "not_a_candidate", the share of test questions that have none of them; "skipped", questions
        of each split whose image cannot be used; and how the heads were trained.

    Raises:
        UsageError: a split has no question, or none whose image can be used.
    """
    # An answer of which nothing is left cannot be learnt.
    train = [question for question in train if normalise_answer(question.answer)]
    splits = {"train": train, "validation": validation, "test": test}
    gallery, bad = _Gallery.load([q for own in splits.values() for q in own], size)
    if skip is not None:
        skip(bad)
    usable = {name: [q for q in own if q.origin in gallery] for name, own in splits.items()}
    for name, own in usable.items():
        if not own:
            raise UsageError(
                f"vqa: {name} must have questions about images that can be read; got "
                f"{len(splits[name])} questions and none such. Get a whole copy of the data set."
            )
    texts = [question.question for own in usable.values() for question in own]
    kept = None if finetune else _KeptFeatures(_Towers(encoder, gallery), gallery, texts)
    predicted, fits = {}, {}
    for name, looks in (("image", True), ("question_only", False)):
        features = kept or _Towers(encoder, gallery, trained=True)
        answerer = Answerer.train(
            features,
            usable["train"],
            usable["validation"],
            encoder.device,
            looks=looks,
            seed=seed,
            training=training,
            half=encoder.precision == "amp" and finetune,
        )
        predicted[name] = answerer.answers(usable["test"])
        fits[name] = answerer.fit
    asked = usable["test"]
    predicted["majority"] = majority_answers(
        [q.kind for q in usable["train"]],
        [q.answer for q in usable["train"]],
        [q.kind for q in asked],
    )
    known = frozenset(answerer.candidates)
    return {
        **_accuracies(predicted, asked, seed),
        "candidates": len(answerer.candidates),
        "not_a_candidate": float(np.mean([normalise_answer(q.answer) not in known for q in asked])),
        "skipped": {name: len(own) - len(usable[name]) for name, own in splits.items()},
        "n_train": len(usable["train"]),
        "n_validation": len(usable["validation"]),
        "seed": seed,
        "finetune": finetune,
        "head_weights": sum(p.numel() for p in answerer.head.parameters()),
        "training": asdict(training),
        "fits": fits,
    }


def _accuracies(
    predicted: dict[str, list[str]], asked: Sequence[Question], seed: int
) -> dict[str, Any]:
    """Return n, accuracies and intervals of the model and of the baselines."""
    images = [question.origin for question in asked]
    types = [question.answer_type for question in asked]
    truth = [question.answer for question in asked]
    correct = {name: exact(own, truth) for name, own in predicted.items()}
    scores = {name: score(own, types, images, seed) for name, own in correct.items()}
    gain = correct["image"] - correct["question_only"]
    return {
        "n": len(asked),
        **scores["image"],
        "chance": scores["majority"]["metrics"],
        "baselines": {
            name: {key: scores[name][key] for key in ("metrics", "ci95")}
            for name in ("majority", "question_only")
        },
        "gain_over_question_only": {
            "accuracy": float(gain.mean()),
            "ci95": bootstrap_ci(gain, images, seed=seed),
        },
    }


class _Gallery:
    """The distinct images of questions, ready for the model.

    Args:
        rows: Row of each image's origin.
        pixels: uint8 [M, 3, size, size].
    """

    def __init__(self, rows: dict[str, int], pixels: Tensor) -> None:
        self._rows = rows
        self.pixels = pixels

    @classmethod
    def load(cls, questions: Sequence[Question], size: int) -> tuple[_Gallery, list[Skipped]]:
        """Return the images that can be used, and what is wrong with the others."""
        images = {question.origin: question.image for question in questions}

        def square(origin: str) -> np.ndarray | Skipped:
            image = images[origin]
            try:
                picture = decode(image.read())
            except (OSError, ImageError) as error:
                return Skipped(image.key, image.place, str(error))
            box = centre_box(*picture.size)
            return np.array(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))

        pixels = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
        rows: dict[str, int] = {}
        bad: list[Skipped] = []
        # Pillow decodes without holding the interpreter.
        with ThreadPoolExecutor() as pool:
            found = _progress(pool.map(square, images), "images", len(images))
            for origin, item in zip(images, found, strict=True):
                if isinstance(item, Skipped):
                    bad.append(item)
                else:
                    pixels[len(rows)] = torch.from_numpy(item).permute(2, 0, 1)
                    rows[origin] = len(rows)
        return cls(rows, pixels[: len(rows)]), bad

    def __len__(self) -> int:
        return len(self.pixels)

    def __contains__(self, origin: str) -> bool:
        return origin in self._rows

    def rows(self, questions: Sequence[Question]) -> Tensor:
        """Return the row of each question's image, int64 [B]."""
        return torch.tensor([self._rows[question.origin] for question in questions])


class _Features(Protocol):
    """Gives the features of questions and of their images."""

    def modules(self) -> list[nn.Module]:
        """Return what is trained with the head."""

    def patches(self, questions: Sequence[Question]) -> Tensor:
        """Return the patch features [B, P, C] of the questions' images."""

    def words(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the token features [B, T, C] of questions, and their mask, bool [B, T]."""


class _Towers:
    """Features straight from the towers.

    Args:
        encoder: The model.
        gallery: The images.
        trained: Let a copy of the towers be trained; otherwise they are as in evaluation.
    """

    def __init__(self, encoder: Encoder, gallery: _Gallery, trained: bool = False) -> None:
        self._encoder = encoder
        self._gallery = gallery
        towers: list[nn.Module] = [encoder.model.image_tower, encoder.model.text_tower]
        self._trained = copy.deepcopy(towers) if trained else []
        self._image, self._text = self._trained or towers
        for tower in self._trained:
            tower.requires_grad_(True)
        self._image.eval()
        self._text.eval()

    def modules(self) -> list[nn.Module]:
        return self._trained

    def patches(self, questions: Sequence[Question]) -> Tensor:
        return self.patches_of(self._gallery.pixels[self._gallery.rows(questions)])

    def patches_of(self, images: Tensor) -> Tensor:
        """Return the patch features [B, P, C] of images, uint8 [B, 3, H, W]."""
        encoder = self._encoder
        with autocast(encoder.precision, encoder.device):
            return self._image(images.to(encoder.device))[1]

    def words(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoder = self._encoder
        tokens = encoder.tokenizer(texts)
        mask = tokens.mask.to(encoder.device)
        with autocast(encoder.precision, encoder.device):
            return self._text(tokens.ids.to(encoder.device), mask)[1], mask


class _KeptFeatures:
    """Features of frozen towers, each computed once and kept in fp16 on the CPU.

    They are standardised, as the head would do first, so that none is too large for fp16. Patches
    that need too much memory are computed again each time.

    Args:
        towers: What computes them.
        gallery: The images.
        texts: The questions.
        most: Bytes of patches to keep at most.
    """

    @torch.no_grad()
    def __init__(
        self, towers: _Towers, gallery: _Gallery, texts: Sequence[str], most: int = _MOST_KEPT
    ) -> None:
        self._towers = towers
        self._gallery = gallery
        one = towers.patches_of(gallery.pixels[:1])
        self._device = one.device
        self._patches: Tensor | None = None
        if 2 * one.numel() * len(gallery) <= most:
            starts = _progress(range(0, len(gallery), _ROWS), "image features")
            parts = (towers.patches_of(gallery.pixels[i : i + _ROWS]) for i in starts)
            self._patches = torch.cat([standardised(part).half().cpu() for part in parts])
        self._words: dict[str, Tensor] = {}
        distinct = list(dict.fromkeys(texts))
        for start in _progress(range(0, len(distinct), _ROWS), "question features"):
            some = distinct[start : start + _ROWS]
            features, mask = towers.words(some)
            for text, own, valid in zip(some, standardised(features), mask, strict=True):
                self._words[text] = own[valid].half().cpu()

    def modules(self) -> list[nn.Module]:
        return []

    @torch.no_grad()
    def patches(self, questions: Sequence[Question]) -> Tensor:
        if self._patches is None:
            return self._towers.patches(questions)
        return self._patches[self._gallery.rows(questions)].to(self._device)

    def words(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        own = [self._words[text] for text in texts]
        mask = pad_sequence([x.new_ones(len(x), dtype=torch.bool) for x in own], batch_first=True)
        return pad_sequence(own, batch_first=True).to(self._device), mask.to(self._device)


class Answerer:
    """Answers questions with one of the training answers.

    Args:
        head: Scores the candidates.
        features: What it is given.
        candidates: The answers, as the head counts them.
        looks: It is given the images too.
    """

    def __init__(
        self, head: FusionHead, features: _Features, candidates: Sequence[str], looks: bool
    ) -> None:
        self.head = head
        self.candidates = candidates
        self.fit: dict[str, Any] = {}
        self._features = features
        self._looks = looks
        self._all = nn.ModuleList([head, *features.modules()])

    @classmethod
    def train(
        cls,
        features: _Features,
        train: Sequence[Question],
        validation: Sequence[Question],
        device: torch.device,
        *,
        looks: bool,
        seed: int,
        training: Training,
        half: bool = False,
    ) -> Answerer:
        """Return an answerer that was trained on `train` and stopped by `validation`.

        Its `fit` tells the epoch that was kept, the number of epochs and the validation accuracy.
        The state of torch's random numbers is left as it was.

        Args:
            features: Of the questions and their images.
            train: Questions to train on, whose normalised answers are not empty.
            validation: Questions to stop by.
            device: Where.
            looks: Give it the images.
            seed: Of the head's weights, its dropout and the order of the questions.
            training: Which head, and how.
            half: The towers are trained in fp16, which needs the loss scaled.
        """
        candidates = candidate_answers([question.answer for question in train])
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            some = train[:: -(-len(train) // _MEASURED)]
            with torch.no_grad():
                patches = features.patches(some)
                words, mask = features.words([question.question for question in some])
            head = FusionHead(
                *(patches.shape[2], patches.shape[1], words.shape[2], len(candidates)),
                width=training.width,
                layers=training.layers,
            )
            head.to(device).measure(patches, words, mask)
            answerer = cls(head, features, candidates, looks)
            answerer._fit(train, validation, seed, training, half)
        return answerer

    @torch.no_grad()
    def answers(self, questions: Sequence[Question]) -> list[str]:
        """Return the answer to each question."""
        self._all.eval()
        found: list[str] = []
        for start in range(0, len(questions), _ROWS):
            best = self._logits(questions[start : start + _ROWS]).argmax(1)
            found += [self.candidates[index] for index in best.tolist()]
        return found

    def _logits(self, questions: Sequence[Question]) -> Tensor:
        words, mask = self._features.words([question.question for question in questions])
        patches = self._features.patches(questions) if self._looks else None
        return self.head(patches, words, mask)

    def _fit(
        self,
        train: Sequence[Question],
        validation: Sequence[Question],
        seed: int,
        training: Training,
        half: bool,
    ) -> None:
        """Train, and go back to the epoch with the best validation accuracy."""
        number = {answer: index for index, answer in enumerate(self.candidates)}
        targets = torch.tensor([number[normalise_answer(question.answer)] for question in train])
        optimizer = self._optimizer(training)
        device = next(self.head.parameters()).device
        scaler = torch.amp.GradScaler(device.type, enabled=half)
        order = torch.Generator().manual_seed(seed)
        truth = [question.answer for question in validation]
        best, kept, epoch = -1.0, 0, 0
        state: dict[str, Tensor] = {}
        for epoch in _progress(range(1, training.epochs + 1), "epochs"):
            self._all.train()
            for rows in torch.randperm(len(train), generator=order).split(training.batch_size):
                logits = self._logits([train[row] for row in rows.tolist()])
                loss = F.cross_entropy(logits, targets[rows].to(device))
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(self._all.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
            accuracy = float(exact(self.answers(validation), truth).mean())
            if accuracy > best:
                best, kept = accuracy, epoch
                state = {name: x.clone() for name, x in self._all.state_dict().items()}
            elif epoch - kept >= training.patience:
                break
        self._all.load_state_dict(state)
        self.fit = {"epoch": kept, "epochs": epoch, "validation_accuracy": best}

    def _optimizer(self, training: Training) -> torch.optim.Optimizer:
        towers = [p for module in self._features.modules() for p in module.parameters()]
        groups = [
            {
                "params": [p for p in parameters if (p.ndim >= 2) == matrices],
                "lr": lr,
                "weight_decay": training.weight_decay if matrices else 0.0,
            }
            for parameters, lr in (
                (list(self.head.parameters()), training.lr),
                (towers, training.tower_lr),
            )
            for matrices in (True, False)
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


def _progress(items: Any, what: str, total: int | None = None) -> Iterator[Any]:
    return iter(
        tqdm(items, desc=f"vqa: {what}", total=total, disable=not sys.stderr.isatty(), leave=False)
    )
