"""What the medical pictures show: body sections and findings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medfast.data.phantom.cases import (
    COUNTS,
    DETAILS,
    NO_FINDING,
    NORMAL_SHARE,
    SIDES,
    SIZES,
    Case,
    Finding,
    choose,
    with_twin,
)

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
CLASSES: dict[str, tuple[str, ...]] = {
    "modality": MODALITIES,
    "organ": ORGANS,
    "finding": (*FINDINGS, NO_FINDING),
    **DETAILS,
}


@dataclass(frozen=True)
class MedicalCase(Case):
    """A body section, normal or with a finding."""

    organ: str

    def names(self) -> dict[str, str]:
        """Return the class under every label set that applies."""
        return {**super().names(), "organ": self.organ}


def family(rng: np.random.Generator) -> list[MedicalCase]:
    """Draw a case and, for about half of them, its twin."""
    modality = choose(rng, MODALITIES)
    organ = choose(rng, SECTIONS[modality])
    if rng.random() < NORMAL_SHARE:
        return [MedicalCase(modality, None, organ)]
    finding = Finding(
        choose(rng, FINDINGS), choose(rng, SIDES), choose(rng, SIZES), choose(rng, COUNTS)
    )
    return [MedicalCase(modality, member, organ) for member in with_twin(finding, rng)]
