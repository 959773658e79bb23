"""How captions of any domain are put together: draws that stay in step, and capital letters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Return one of the options with one draw whatever their number: later draws stay in step."""
    return options[int(rng.random() * len(options))]


def capitalised(text: str) -> str:
    """Return the text with every sentence's first letter in upper case."""
    return ". ".join(sentence[:1].upper() + sentence[1:] for sentence in text.split(". "))
