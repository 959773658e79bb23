"""What the pictures of any domain show: cases, and the seeded sampling of studies of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

SPLITS = ("train", "validation", "test")
NO_FINDING = "no finding"
SIDES = ("left", "right")
SIZES = ("small", "large")
COUNTS = ("one", "two", "three")
DETAILS: dict[str, tuple[str, ...]] = {"side": SIDES, "size": SIZES, "count": COUNTS}

NORMAL_SHARE = 0.08
TWIN_SHARE = 0.5
TWO_VIEW_SHARE = 0.25

# Keep the draws of the picture, of its words and of the wrong details apart.
PICTURE, WORDS, WRONG = 0, 1, 2

F = TypeVar("F", bound="Finding")
C = TypeVar("C", bound="Case")


@dataclass(frozen=True)
class Finding:
    """One to three things of a kind, all of one size and on one side.

    `side` is the viewer's: "left" is the left half of the picture.
    """

    kind: str
    side: str
    size: str
    count: str

    def altered(self: F, detail: str, rng: np.random.Generator) -> F:
        """Return the same finding with another value of one of the `DETAILS`."""
        values = DETAILS[detail]
        step = int(rng.integers(1, len(values)))
        index = (values.index(getattr(self, detail)) + step) % len(values)
        return replace(self, **{detail: values[index]})


@dataclass(frozen=True)
class Case:
    """What a picture shows: the kind of picture, and the finding if there is one."""

    modality: str
    finding: Finding | None

    def names(self) -> dict[str, str]:
        """Return the class under every label set that applies."""
        if self.finding is None:
            return {"modality": self.modality, "finding": NO_FINDING}
        details = {detail: getattr(self.finding, detail) for detail in DETAILS}
        return {"modality": self.modality, "finding": self.finding.kind, **details}


@dataclass(frozen=True)
class Sample(Generic[C]):
    """One image with its caption: a view of a study.

    `key` seeds all that is drawn at random for it, so it is the same whoever draws it and when.
    """

    id: str
    split: str
    study: str
    case: C
    key: tuple[int, ...]

    def rng(self, stream: int) -> np.random.Generator:
        """Return the generator of the picture, of its words or of what is `WRONG`."""
        return np.random.default_rng((*self.key, stream))


# Draws a case and, for about half of them, a twin that differs in one detail.
Family = Callable[[np.random.Generator], list[C]]


def split_sizes(pairs: int) -> dict[str, int]:
    """Return the number of pairs per split: 80 % train, 10 % validation, 10 % test."""
    tenth = round(pairs / 10)
    return dict(zip(SPLITS, (pairs - 2 * tenth, tenth, tenth), strict=True))


def sample_all(
    pairs: int, seed: int, family: Family[C], salt: tuple[int, ...] = (), offset: int = 0
) -> list[Sample[C]]:
    """Return the samples of every split in the order of their ids.

    Args:
        pairs: Number of samples over all splits.
        seed: Any number that is not negative.
        family: Draws the cases.
        salt: Begins every key, so that domains share no draws.
        offset: Added to the numbers of samples and studies, so that domains share no names.
    """
    samples: list[Sample[C]] = []
    studies = offset
    for split, size in split_sizes(pairs).items():
        end = len(samples) + size
        for case, views, key in _studies(split, (*salt, seed), family):
            studies += 1
            for view in range(min(views, end - len(samples))):
                number = offset + len(samples) + 1
                samples.append(
                    Sample(f"PHANTOM_{number:05d}", split, f"S{studies:05d}", case, (*key, view))
                )
            if len(samples) == end:
                break
    return samples


def with_twin(finding: F, rng: np.random.Generator) -> list[F]:
    """Return the finding and, about every second time, one that differs in one detail."""
    if rng.random() < TWIN_SHARE:
        return [finding, finding.altered(choose(rng, tuple(DETAILS)), rng)]
    return [finding]


def choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """Return one of the options, each as likely as the others."""
    return options[rng.integers(len(options))]


def _studies(
    split: str, seeds: tuple[int, ...], family: Family[C]
) -> Iterator[tuple[C, int, tuple[int, ...]]]:
    """Yield case, number of views and key of one study after another, without end.

    Studies come in families: a case and, for about half of them, a twin that differs in one detail.
    A family depends on the seeds, the split and its number alone.
    """
    number = 0
    while True:
        key = (*seeds, SPLITS.index(split), number)
        rng = np.random.default_rng(key)
        for member, case in enumerate(family(rng)):
            views = 2 if rng.random() < TWO_VIEW_SHARE else 1
            yield case, views, (*key, member)
        number += 1
