"""The question: words about an image and their answer, as every reader returns it."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfast.data.records import Record, clean_caption
from medfast.data.skipped import Skipped
from medfast.data.sources import About, AbsentError
from medfast.errors import UsageError

# VQA-RAD's authors noted the type of the answer behind some questions: a model must not read it.
_TYPE_NOTE = re.compile(r"\?\s*-\s*(?:yes/no|open)\s*$")
# Not the hyphen within a word, nor the point within a number.
_PUNCTUATION = re.compile(r"(?!(?<=\w)-(?=\w)|(?<=\d)\.(?=\d))(?:[^\w\s]|_)")


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        key: Name of the question.
        image: The image, which may be damaged.
        question: Its words, see `clean_question`.
        answer: The answer as the data set tells it, with white space squeezed.
        answer_type: "closed" or "open", by the rule of the data set.
        kind: What sort of question it is, for the majority answer of each.
        origin: The image's content: equal for all questions about equal images.
    """

    key: str
    image: Record
    question: str
    answer: str
    answer_type: str
    kind: str
    origin: str


def clean_question(text: str) -> str:
    """Return a question in lower case without punctuation, with "x ray" as "x-ray"."""
    text = _TYPE_NOTE.sub("", unicodedata.normalize("NFKC", text).lower().strip())
    text = re.sub("['`\u2018\u2019]", "", text)
    text = " ".join(_PUNCTUATION.sub(" ", text).split())
    return re.sub(r"\bx ray", "x-ray", text)


def as_text(value: Any) -> str:
    """Return a text or a number of a table as text with white space squeezed; of others ""."""
    if isinstance(value, float):
        # Whole numbers with gaps among them are kept as floats by many programs, the gaps as NaN.
        value = int(value) if value.is_integer() else "" if math.isnan(value) else value
    return clean_caption(str(value)) if isinstance(value, str | int | float) else ""


def image_origin(data: bytes) -> str:
    """Return the origin of an encoded image: equal for equal bytes."""
    return f"image {hashlib.blake2b(data, digest_size=16).hexdigest()}"


class ImageFiles:
    """The images of a data set by their names; each is read once, for its origin.

    Args:
        folders: Where they may lie.
        suffix: What the file has behind the name that the questions use.
    """

    def __init__(self, folders: Sequence[Path], suffix: str = "") -> None:
        self._folders = folders
        self._suffix = suffix
        self._found: dict[str, tuple[Record, str] | str] = {}

    def find(self, name: str) -> tuple[Record, str] | str:
        """Return an image and its origin, or why it cannot be read."""
        if name not in self._found:
            self._found[name] = self._look_for(name) if name else "it names no image"
        return self._found[name]

    def _look_for(self, name: str) -> tuple[Record, str] | str:
        file = name if name.endswith(self._suffix) else name + self._suffix
        paths = [folder / file for folder in self._folders]
        path = next((path for path in paths if path.is_file()), paths[0])
        record = Record(key=name, image=path, caption="")
        try:
            origin = image_origin(record.read())
        except OSError as error:
            return f"{path} cannot be read ({error.strerror or error})"
        return record, origin


def checked(
    key: str,
    table: Path,
    found: tuple[Record, str] | str,
    question: Any,
    answer: Any,
    answer_type: str = "",
    kind: str = "",
) -> Question | Skipped:
    """Return a question, or what it lacks.

    Args:
        key: Its name.
        table: The file that holds it.
        found: Its image and the image's origin, or why there is none.
        question: Its words, as they are in the file.
        answer: The answer, likewise.
        answer_type: "closed" or "open"; if it is not told, yes and no are closed answers.
        kind: What sort of question it is; if it is not told, its first word.
    """
    words, said = clean_question(as_text(question)), as_text(answer)
    if not words or not said:
        lacking = "question" if not words else "answer"
        return Skipped(key, str(table), f"its {lacking} is empty or no text")
    if isinstance(found, str):
        return Skipped(key, str(table), found)
    closed = said.casefold().rstrip(".") in ("yes", "no")
    return Question(
        key=key,
        image=found[0],
        question=words,
        answer=said,
        answer_type=answer_type or ("closed" if closed else "open"),
        kind=kind or words.partition(" ")[0],
        origin=found[1],
    )


def absent(about: About, root: Path, looked_for: Sequence[str]) -> AbsentError:
    """Return the error for a folder without the file of questions that a split needs."""
    what = (
        f"{root} holds none of: {', '.join(looked_for)}" if root.exists() else f"there is no {root}"
    )
    return AbsentError(f"{about.key}: {what}. {about.access} ({about.licence}), and put it there.")


def damaged(table: Path, reason: object) -> UsageError:
    """Return the error for a file of questions that cannot be used."""
    return UsageError(f"{table} cannot be read ({reason}); get a whole copy of it.")
