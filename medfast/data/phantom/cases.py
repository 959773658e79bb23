"""What the phantom images show: the label sets and the seeded sampling of cases and studies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

SPLITS = ("train", "validation", "test")
# Which body sections each modality shows; the order fixes the class indices.
SECTIONS: dict[str, tuple[str, ...]] = {
    "radiograph": ("chest", "pelvis", "hand"),
    "ct": ("chest", "abdomen", "brain"),
    "mr": ("brain", "breast", "pelvis"),
    "ultrasound": ("thyroid", "kidney", "uterus"),
    "histology": ("colon", "skin", "breast"),
}
MODALITIES = tuple(SECTIONS)
ORGANS = tuple(dict.fromkeys(organ for organs in SECTIONS.values() for organ in organs))
FINDINGS = ("nodule", "cyst", "spiculated mass", "wedge", "calcifications", "crescent")
NO_FINDING = "no finding"
SIDES = ("left", "right")
SIZES = ("small", "large")
COUNTS = ("one", "two", "three")
DETAILS: dict[str, tuple[str, ...]] = {"side": SIDES, "size": SIZES, "count": COUNTS}
CLASSES: dict[str, tuple[str, ...]] = {
    "modality": MODALITIES,
    "organ": ORGANS,
    "finding": (*FINDINGS, NO_FINDING),
    **DETAILS,
}

NORMAL_SHARE = 0.08
TWIN_SHARE = 0.5
TWO_VIEW_SHARE = 0.25


@dataclass(frozen=True)
class Finding:
    """One to three lesions of a kind, all of one size and on one side.

    `side` is the viewer's: "left" is the left half of the picture.
    """

    kind: str
    side: str
    size: str
    count: str

    def altered(self, detail: str, rng: np.random.Generator) -> Finding:
        """Return the same finding with another value of one of the `DETAILS`."""
        values = DETAILS[detail]
        step = int(rng.integers(1, len(values)))
        index = (values.index(getattr(self, detail)) + step) % len(values)
        return replace(self, **{detail: values[index]})


@dataclass(frozen=True)
class Case:
    """What a picture shows; a normal case has no finding."""

    modality: str
    organ: str
    finding: Finding | None

    def labels(self) -> dict[str, int | None]:
        """Return the class index under every label set, None where it does not apply."""
        kind = NO_FINDING if self.finding is None else self.finding.kind
        names = {"modality": self.modality, "organ": self.organ, "finding": kind}
        if self.finding is not None:
            names |= {detail: getattr(self.finding, detail) for detail in DETAILS}
        return {
            label: classes.index(names[label]) if label in names else None
            for label, classes in CLASSES.items()
        }


@dataclass(frozen=True)
class Sample:
    """One image with its caption: a view of a study.

    `key` seeds all that is drawn at random for it, so it is the same whoever draws it and when.
    """

    id: str
    split: str
    study: str
    case: Case
    key: tuple[int, ...]


def split_sizes(pairs: int) -> dict[str, int]:
    """Return the number of pairs per split: 80 % train, 10 % validation, 10 % test."""
    tenth = round(pairs / 10)
    return dict(zip(SPLITS, (pairs - 2 * tenth, tenth, tenth), strict=True))


def sample_all(pairs: int, seed: int) -> list[Sample]:
    """Return the samples of every split in the order of their ids."""
    samples: list[Sample] = []
    studies = 0
    for split, size in split_sizes(pairs).items():
        end = len(samples) + size
        for case, views, key in _studies(split, seed):
            studies += 1
            for view in range(min(views, end - len(samples))):
                number = len(samples) + 1
                samples.append(
                    Sample(f"PHANTOM_{number:05d}", split, f"S{studies:05d}", case, (*key, view))
                )
            if len(samples) == end:
                break
    return samples


def _studies(split: str, seed: int) -> Iterator[tuple[Case, int, tuple[int, ...]]]:
    """Yield case, number of views and key of one study after another, without end.

    Studies come in families: a case and, for about half of them, a twin that differs in one detail.
    A family depends on the seed, the split and its number alone.
    """
    split_index = SPLITS.index(split)
    family = 0
    while True:
        rng = np.random.default_rng((seed, split_index, family))
        for member, case in enumerate(_family(rng)):
            views = 2 if rng.random() < TWO_VIEW_SHARE else 1
            yield case, views, (seed, split_index, family, member)
        family += 1


def _family(rng: np.random.Generator) -> list[Case]:
    modality = _choose(rng, MODALITIES)
    organ = _choose(rng, SECTIONS[modality])
    if rng.random() < NORMAL_SHARE:
        return [Case(modality, organ, None)]
    finding = Finding(
        _choose(rng, FINDINGS), _choose(rng, SIDES), _choose(rng, SIZES), _choose(rng, COUNTS)
    )
    members = [finding]
    if rng.random() < TWIN_SHARE:
        members.append(finding.altered(_choose(rng, tuple(DETAILS)), rng))
    return [Case(modality, organ, member) for member in members]


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]
