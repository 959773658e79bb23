"""The phantom as questions and answers, in the layouts of the sets for visual question answering.

Everything that is asked can be seen in the picture, and nearly nothing told from the question.
"""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medfast.data.phantom.cases import DETAILS, Sample, choose
from medfast.data.phantom.domains import DOMAINS
from medfast.data.phantom.medical.cases import FINDINGS, MODALITIES
from medfast.data.phantom.wording import pick
from medfast.errors import UsageError, unknown_name

FEWEST_IMAGES = 30

# Apart from the streams of the picture, its caption and the wrong details.
_QUESTIONS = 3
# Of the questions about training images, one in so many is for testing, as VQA-RAD has it.
_TESTED = 10
_PATH_WORDS = {"train": "train", "validation": "val", "test": "test"}

_NAMES = {
    "radiograph": ("X-ray", "an x ray"),
    "ct": ("CT", "a CT scan"),
    "mr": ("MRI", "an MRI scan"),
    "ultrasound": ("Ultrasound", "an ultrasound image"),
    "histology": ("Histology", "a histology image"),
}
_ANSWERS = {
    "side": ("Left", "Right"),
    "size": ("small", "large"),
    # Or in digits: people write both.
    "count": ("One", "Two", "Three"),
}
_WORDINGS = {
    "modality": ("What modality is shown?", "What kind of image is this?"),
    "kind": ("What is the abnormality?", "What kind of lesion is seen?"),
    "side": ("On which side is the {}?", "Where is the {}, on the left or right?"),
    "size": ("How large is the {}?", "Is the {} small or large?"),
    "count": ("How many lesions are there?", "What is the number of lesions?"),
}


@dataclass(frozen=True)
class Asked:
    """A question about a picture, with VQA-RAD's two types."""

    question: str
    answer: str
    answer_type: str
    question_type: str


def questions(sample: Sample) -> list[Asked]:
    """Return what is asked about a medical sample: modality, presence, kind, side, size, number."""
    rng = sample.rng(_QUESTIONS)
    case = sample.case
    name, _ = _NAMES[case.modality]
    shown = _guess(case.modality, MODALITIES, rng)
    kind = case.finding.kind if case.finding else ""
    looked_for = _guess(kind, FINDINGS, rng)
    asked = [
        Asked(pick(rng, _WORDINGS["modality"]), name, "OPEN", "MODALITY"),
        Asked(f"Is this {_NAMES[shown][1]}?", _yes(shown == case.modality), "CLOSED", "MODALITY"),
        Asked(f"Is there a {looked_for}?", _yes(looked_for == kind), "CLOSED", "PRES"),
    ]
    if case.finding is not None:
        asked.append(Asked(pick(rng, _WORDINGS["kind"]), kind, "OPEN", "ABN"))
        for detail, values in DETAILS.items():
            index = values.index(getattr(case.finding, detail))
            answer = _ANSWERS[detail][index]
            if detail == "count" and rng.random() < 0.5:
                answer = str(index + 1)
            question = pick(rng, _WORDINGS[detail]).format(kind)
            # A choice that the question names is closed in VQA-RAD.
            answer_type = "CLOSED" if " or " in question else "OPEN"
            asked.append(Asked(question, answer, answer_type, detail.upper()))
    return asked


def _guess(truth: str, options: Sequence[str], rng: np.random.Generator) -> str:
    """Return the truth as often as one of the other options."""
    others = tuple(option for option in options if option != truth)
    return truth if rng.random() < 0.5 and truth else choose(rng, others)


def _yes(true: bool) -> str:
    return "Yes" if true else "No"


# A sample's encoded picture.
Encode = Callable[[Sample], bytes]
# Path below the root and content of every file of questions, given the samples.
Tables = Callable[[Sequence[Sample], Encode], Iterator[tuple[str, bytes]]]


@dataclass(frozen=True)
class VqaLayout:
    """How questions and images lie on disk.

    Attributes:
        source: Key of the reader.
        tables: Gives the files of questions.
        image: Path of a sample's image below the root; None if the tables hold the images.
        package: What `tables` needs.
    """

    source: str
    tables: Tables
    image: Callable[[Sample], str] | None
    package: str = ""


def write_vqa(out: Path, *, layout: str = "vqa_rad", images: int = 300, seed: int = 0) -> Path:
    """Write medical pictures with questions into `out` and return it.

    The files depend on the arguments alone. In VQA-RAD's layouts one question in ten about training
    images is a test question, as upstream's splits share images; the phantom's validation split is
    part of their training split, since upstream has none.

    Args:
        out: The folder to fill; must be new or empty.
        layout: One of `VQA_LAYOUTS`.
        images: Number of images over all splits (80 % train, 10 % validation, 10 % test), at least
            30.
        seed: Any number that is not negative.

    Raises:
        UsageError: an argument is out of range, or `out` cannot be written or is not empty.
    """
    if layout not in VQA_LAYOUTS:
        raise UsageError(unknown_name("phantom: layout", layout, VQA_LAYOUTS))
    place = VQA_LAYOUTS[layout]
    if place.package and importlib.util.find_spec(place.package) is None:
        raise UsageError(
            f"phantom: layout {layout} needs {place.package}: pip install {place.package}."
        )
    if images < FEWEST_IMAGES or seed < 0:
        raise UsageError(
            f"phantom: images must be at least {FEWEST_IMAGES} and seed at least 0; got {images} "
            f"and {seed}."
        )
    samples = DOMAINS["medical"].samples(images, seed)
    try:
        if out.exists() and any(out.iterdir()):
            raise UsageError(
                f"phantom: out must be a new or empty folder; {out} has files in it. Name another "
                "folder, or empty this one."
            )
        for name, data in place.tables(samples, _jpeg):
            _write(out / name, data)
        if place.image is not None:
            for sample in samples:
                _write(out / place.image(sample), _jpeg(sample))
    except OSError as error:
        raise UsageError(
            f"phantom: out must be a folder that can be written; {out}: {error.strerror}. Name "
            "another folder, or change its permissions."
        ) from error
    return out


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _jpeg(sample: Sample) -> bytes:
    file = io.BytesIO()
    DOMAINS["medical"].render(sample).save(file, "JPEG", quality=90)
    return file.getvalue()


def _rad_rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return VQA-RAD's rows, with the spelling that its authors have not made uniform."""
    asked = [(sample, own) for sample in samples for own in questions(sample)]
    return [
        {
            "qid": number,
            "phrase_type": _phrase_type(sample, number),
            "image_name": f"{sample.id}.jpg",
            "image_organ": sample.case.organ.upper(),
            "question": own.question,
            "question_type": own.question_type,
            # Numbers are numbers there, and some types end in a space.
            "answer": int(own.answer) if own.answer.isdigit() else own.answer,
            "answer_type": f"{own.answer_type} " if number % 7 == 0 else own.answer_type,
        }
        for number, (sample, own) in enumerate(asked, 1)
    ]


def _phrase_type(sample: Sample, number: int) -> str:
    phrase = "para" if number % 3 == 0 else "freeform"
    tested = sample.split == "test" or number % _TESTED == 0
    return f"test_{phrase}" if tested else phrase


def _rad_published(samples: Sequence[Sample], encode: Encode) -> Iterator[tuple[str, bytes]]:
    yield "VQA_RAD Dataset Public.json", _json(_rad_rows(samples))


def _rad_mevf(samples: Sequence[Sample], encode: Encode) -> Iterator[tuple[str, bytes]]:
    rows = _rad_rows(samples)
    tested = [row["phrase_type"].startswith("test_") for row in rows]
    for name, test in (("trainset.json", False), ("testset.json", True)):
        own = [row for row, is_test in zip(rows, tested, strict=True) if is_test == test]
        yield name, _json(own)


def _json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def _path_pickles(samples: Sequence[Sample], encode: Encode) -> Iterator[tuple[str, bytes]]:
    for word, own in _by_word(samples):
        rows = [
            {"image": _path_name(sample), "question": q.question, "answer": q.answer.lower()}
            for sample in own
            for q in questions(sample)
        ]
        yield f"qas/{word}/{word}_qa.pkl", pickle.dumps(rows)


def _path_labels(samples: Sequence[Sample], encode: Encode) -> Iterator[tuple[str, bytes]]:
    for word, own in _by_word(samples):
        asked = [(sample, q) for sample in own for q in questions(sample)]
        rows = [
            {
                "question_id": number,
                "img_id": _path_name(sample),
                "sent": q.question,
                "label": {q.answer.lower(): 1},
                "answer_type": "yes/no" if q.answer in ("Yes", "No") else "other",
            }
            for number, (sample, q) in enumerate(asked)
        ]
        yield f"pvqa/qas/{word}_vqa.pkl", pickle.dumps(rows)


def _path_parquet(samples: Sequence[Sample], encode: Encode) -> Iterator[tuple[str, bytes]]:
    yield from _parquets(samples, lambda s: {"bytes": encode(s), "path": f"{_path_name(s)}.jpg"})


def _path_parquet_names(samples: Sequence[Sample], encode: Encode) -> Iterator[tuple[str, bytes]]:
    yield from _parquets(samples, lambda sample: f"{_path_name(sample)}.jpg")


def _parquets(
    samples: Sequence[Sample], cell: Callable[[Sample], Any]
) -> Iterator[tuple[str, bytes]]:
    import pyarrow as pa
    from pyarrow import parquet

    for word, own in _by_word(samples):
        cells = {sample.id: cell(sample) for sample in own}
        rows = [
            {"image": cells[sample.id], "question": q.question, "answer": q.answer.lower()}
            for sample in own
            for q in questions(sample)
        ]
        file = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=100)
        # The hub's own name for the split.
        name = "validation" if word == "val" else word
        yield f"data/{name}-00000-of-00001.parquet", file.getvalue()


def _by_word(samples: Sequence[Sample]) -> Iterator[tuple[str, list[Sample]]]:
    """Yield PathVQA's word for each split, and the samples of the split."""
    for split, word in _PATH_WORDS.items():
        yield word, [sample for sample in samples if sample.split == split]


def _path_name(sample: Sample) -> str:
    return f"{_PATH_WORDS[sample.split]}_{sample.id.rpartition('_')[2]}"


def _path_image(sample: Sample) -> str:
    return f"images/{_PATH_WORDS[sample.split]}/{_path_name(sample)}.jpg"


VQA_LAYOUTS: dict[str, VqaLayout] = {
    "vqa_rad": VqaLayout(
        "vqa_rad", _rad_published, lambda sample: f"VQA_RAD Image Folder/{sample.id}.jpg"
    ),
    "vqa_rad_mevf": VqaLayout("vqa_rad", _rad_mevf, lambda sample: f"images/{sample.id}.jpg"),
    "path_vqa": VqaLayout("path_vqa", _path_pickles, _path_image),
    "path_vqa_labels": VqaLayout("path_vqa", _path_labels, lambda s: f"pvqa/{_path_image(s)}"),
    "path_vqa_parquet": VqaLayout("path_vqa", _path_parquet, None, "pyarrow"),
    "path_vqa_parquet_names": VqaLayout("path_vqa", _path_parquet_names, _path_image, "pyarrow"),
}
