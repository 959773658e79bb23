"""The words: captions and the zero-shot prompts."""

from __future__ import annotations

import numpy as np

from medfast.data.phantom.cases import COUNTS, NO_FINDING, SIDES, SIZES, WORDS, Finding, Sample
from medfast.data.phantom.medical.cases import CLASSES, FINDINGS, SECTIONS, MedicalCase
from medfast.data.phantom.wording import capitalised, pick

# The options under one key are interchangeable; the first is the plainest and serves the prompts.
_MODALITY_NOUNS = {
    "radiograph": ("radiograph", "x-ray", "plain film"),
    "ct": ("CT scan", "computed tomography scan", "CT image"),
    "mr": ("MRI scan", "magnetic resonance image", "MR image"),
    "ultrasound": ("ultrasound", "sonogram", "ultrasound image"),
    "histology": ("histology section", "photomicrograph", "histological section"),
}
_PLANES = {
    "radiograph": "frontal",
    "ct": "axial",
    "mr": "axial",
    "ultrasound": "transverse",
    "histology": "stained",
}
_ORGAN_ADJECTIVES = {
    "chest": ("chest", "thoracic"),
    "pelvis": ("pelvic", "pelvis"),
    "hand": ("hand", "bilateral hand"),
    "abdomen": ("abdominal", "abdomen"),
    "brain": ("brain", "cerebral"),
    "breast": ("breast", "mammary"),
    "thyroid": ("thyroid", "thyroid gland"),
    "kidney": ("kidney", "renal"),
    "uterus": ("uterine", "uterus"),
    "colon": ("colon", "colonic"),
    "skin": ("skin", "cutaneous"),
}
_ORGAN_NOUNS = {
    "chest": ("the chest", "the thorax"),
    "pelvis": ("the pelvis", "the bony pelvis"),
    "hand": ("the hands", "both hands"),
    "abdomen": ("the abdomen", "the upper abdomen"),
    "brain": ("the brain", "the head"),
    "breast": ("the breast", "breast tissue"),
    "thyroid": ("the thyroid", "the thyroid gland"),
    "kidney": ("the kidneys", "both kidneys"),
    "uterus": ("the uterus", "the womb"),
    "colon": ("the colon", "the colon wall"),
    "skin": ("the skin", "skin tissue"),
}
# What lies on either side of a section; a microscope field has halves.
_PARTS = {
    "chest": ("lung", "hemithorax"),
    "pelvis": ("hemipelvis", "half of the pelvis"),
    "hand": ("hand", "hand"),
    "abdomen": ("half of the abdomen", "flank"),
    "brain": ("hemisphere", "cerebral hemisphere"),
    "breast": ("breast", "breast"),
    "thyroid": ("lobe", "thyroid lobe"),
    "kidney": ("kidney", "kidney"),
    "uterus": ("half of the uterus", "half of the womb"),
}
_FIELD_PARTS = ("half of the field", "half of the section")
_FINDING_NOUNS = {
    "nodule": (
        ("round nodule", "round nodules"),
        ("smooth nodule", "smooth nodules"),
        ("solid round nodule", "solid round nodules"),
    ),
    "cyst": (
        ("thin-walled cyst", "thin-walled cysts"),
        ("ring-shaped cyst", "ring-shaped cysts"),
        ("thin-walled cavity", "thin-walled cavities"),
    ),
    "spiculated mass": (
        ("spiculated mass", "spiculated masses"),
        ("stellate mass", "stellate masses"),
        ("mass with spiculated margins", "masses with spiculated margins"),
    ),
    "wedge": (
        ("wedge-shaped lesion", "wedge-shaped lesions"),
        ("triangular lesion", "triangular lesions"),
        ("wedge-shaped focus", "wedge-shaped foci"),
    ),
    "calcifications": (
        ("cluster of calcifications", "clusters of calcifications"),
        ("group of microcalcifications", "groups of microcalcifications"),
        ("cluster of calcified specks", "clusters of calcified specks"),
    ),
    "crescent": (
        ("crescent-shaped lesion", "crescent-shaped lesions"),
        ("crescentic collection", "crescentic collections"),
        ("crescent-shaped collection", "crescent-shaped collections"),
    ),
}
_SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big", "bulky")}
# Before a noun with a verb only numerals, so that "a pair" never has to choose its verb.
_NUMERALS = {
    "one": ("a single", "one", "a solitary"),
    "two": ("two", "two", "two separate"),
    "three": ("three", "three", "three separate"),
}
_QUANTITIES = {
    "one": ("a single", "one", "a solitary", "just one"),
    "two": ("two", "a pair of", "two separate", "a total of two"),
    "three": ("three", "a trio of", "three separate", "a total of three"),
}
_NUMBERS = {
    "one": ("solitary", "single"),
    "two": ("two in number", "paired"),
    "three": ("three in number", "three in total"),
}

_TEMPLATES = (
    "{study} showing {lesions} {place}.",
    "{study} with {lesions} {place}.",
    "{study}: {lesions} {place}.",
    "{study} demonstrates {lesions} {place}.",
    "{study} in a patient with {lesions} {place}.",
    "{study} reveals {sided_lesions}.",
    "{study}. The {side} {part} contains {lesions}.",
    "{study}. {counted_lesions} {verb} seen {place}.",
    "{study}. There {verb} {counted_lesions} {place}.",
    "{study}. Finding: {sided} {finding}, {size}, {number}.",
    "{lesions} {place} on {study}.",
    "{sided_lesions} on {study}.",
    "{place}, the {study} shows {lesions}.",
    "on this {study}, {counted_lesions} {verb} visible {place}.",
    "note {lesions} {place} on this {study}.",
    "findings: {lesions} {place}. Examination: {study}.",
)
_NORMAL_TEMPLATES = (
    "{study} without focal abnormality.",
    "{study} with no focal abnormality.",
    "{study}: no focal lesion, normal appearances.",
    "{study}. No abnormality is seen.",
    "normal {study} without any focal lesion.",
    "unremarkable {study}, no abnormality.",
    "no focal abnormality on this normal {study}.",
)
_FILLERS = (
    "The image quality is adequate.",
    "No earlier images are available for comparison.",
    "Clinical correlation is advised.",
)
_FINDING_FILLERS = (
    "The rest of the image is unremarkable.",
    "The remaining structures appear normal.",
    "Follow-up is suggested.",
)
_FILLER_SHARE = 0.25
_OMIT_SHARE = 0.03
_PLANE_SHARE = 0.25


def caption(sample: Sample[MedicalCase]) -> str:
    """Return the caption of a sample, 8 to about 25 words that name all that it shows."""
    return _worded(sample.case, sample.rng(WORDS))


def prompts(label: str) -> list[list[str]]:
    """Return the zero-shot prompts of a label set: an ensemble of phrases per class.

    The prompts of a class differ in everything but the class, evenly, so that their mean says
    nothing else.
    """
    return [_PROMPTS[label](name) for name in CLASSES[label]]


def _modality_prompts(modality: str) -> list[str]:
    nouns = _MODALITY_NOUNS[modality]
    return [
        f"{noun} of {_ORGAN_NOUNS[organ][0]} showing {lesion} on the {side}"
        for noun, organ in zip(nouns, SECTIONS[modality], strict=True)
        for side in SIDES
        for lesion in _lesions()
    ]


def _organ_prompts(organ: str) -> list[str]:
    return [
        phrase
        for modality in SECTIONS
        if organ in SECTIONS[modality]
        for adjective, name, noun in zip(
            _ORGAN_ADJECTIVES[organ], _ORGAN_NOUNS[organ], _MODALITY_NOUNS[modality], strict=False
        )
        for phrase in (f"{adjective} {noun} showing a lesion", f"{noun} of {name}")
    ]


def _finding_prompts(finding: str) -> list[str]:
    if finding == NO_FINDING:
        return [template.format(study="image") for template in _NORMAL_TEMPLATES]
    return [
        phrase
        for singular, plural in _FINDING_NOUNS[finding]
        for phrase in (f"image showing a single small {singular}", f"two large {plural}")
    ]


def _lesions() -> list[str]:
    """Return every finding, each in a size and a count that take turns."""
    return [
        f"{_NUMERALS[count][0]} {size} {_FINDING_NOUNS[finding][0][count != 'one']}"
        for finding, size, count in zip(FINDINGS, SIZES * 3, COUNTS * 2, strict=True)
    ]


def _side_prompts(side: str) -> list[str]:
    return [f"a single {size} {noun} on the {side}" for size, noun in _one_of_each()]


def _size_prompts(size: str) -> list[str]:
    words = _SIZE_WORDS[size]
    return [
        f"a single {words[index % len(words)]} {noun}"
        for index, (_, noun) in enumerate(_one_of_each())
    ]


def _count_prompts(count: str) -> list[str]:
    numerals = _NUMERALS[count]
    return [
        f"{numerals[index % len(numerals)]} {size} {_FINDING_NOUNS[finding][0][count != 'one']}"
        for index, (finding, (size, _)) in enumerate(zip(FINDINGS, _one_of_each(), strict=True))
    ]


def _one_of_each() -> list[tuple[str, str]]:
    """Return a size word and the plainest noun of every finding, the sizes in turn."""
    return [
        (("small", "large")[index % 2], _FINDING_NOUNS[finding][0][0])
        for index, finding in enumerate(FINDINGS)
    ]


_PROMPTS = {
    "modality": _modality_prompts,
    "organ": _organ_prompts,
    "finding": _finding_prompts,
    "side": _side_prompts,
    "size": _size_prompts,
    "count": _count_prompts,
}


def _worded(case: MedicalCase, rng: np.random.Generator) -> str:
    """Return a caption whose template and synonyms depend on `rng` alone, never on the details.

    So with the same `rng` another detail changes only its own words, and plurals and verbs with it.
    """
    study = _study(case, rng)
    fillers: tuple[str, ...] = _FILLERS
    if case.finding is None:
        text = pick(rng, _NORMAL_TEMPLATES).format(study=study)
    else:
        template = pick(rng, _TEMPLATES)
        text = template.format(study=study, **_finding_words(case, case.finding, rng))
        fillers += _FINDING_FILLERS
    # The captions that may be short always get one.
    if rng.random() < _FILLER_SHARE or case.finding is None or " " not in study:
        text = f"{text} {pick(rng, fillers)}"
    return capitalised(text)


def _study(case: MedicalCase, rng: np.random.Generator) -> str:
    noun = pick(rng, _MODALITY_NOUNS[case.modality])
    adjective = pick(rng, _ORGAN_ADJECTIVES[case.organ])
    organ = pick(rng, _ORGAN_NOUNS[case.organ])
    adjective_first, with_plane, omission = rng.random(3)
    if omission < _OMIT_SHARE:
        return f"image of {organ}"
    if omission < 2 * _OMIT_SHARE:
        return noun
    phrase = f"{adjective} {noun}" if adjective_first < 0.5 else f"{noun} of {organ}"
    return f"{_PLANES[case.modality]} {phrase}" if with_plane < _PLANE_SHARE else phrase


def _finding_words(case: MedicalCase, finding: Finding, rng: np.random.Generator) -> dict[str, str]:
    single = finding.count == "one"
    singular, plural = pick(rng, _FINDING_NOUNS[finding.kind])
    noun = singular if single else plural
    size = pick(rng, _SIZE_WORDS[finding.size])
    numeral = pick(rng, _NUMERALS[finding.count])
    quantity = pick(rng, _QUANTITIES[finding.count])
    part = pick(rng, _FIELD_PARTS if case.modality == "histology" else _PARTS[case.organ])
    places = (
        f"in the {finding.side} {part}",
        f"on the {finding.side} side",
        f"on the {finding.side}",
        f"in the {finding.side} half of the image",
    )
    return {
        "side": finding.side,
        "sided": f"{finding.side}-sided",
        "size": size,
        "finding": noun,
        "part": part,
        "place": pick(rng, places),
        "number": pick(rng, _NUMBERS[finding.count]),
        "verb": "is" if single else "are",
        "lesions": f"{quantity} {size} {noun}",
        "sided_lesions": f"{quantity} {size} {finding.side}-sided {noun}",
        "counted_lesions": f"{numeral} {size} {noun}",
    }
