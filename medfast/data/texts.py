"""What a view of a caption is: some of its words dropped or swapped."""

from __future__ import annotations

import random
from collections.abc import Sequence

# The default of EDA's published code, for both.
SHARE = 0.1


def reworded(caption: str, rng: random.Random) -> str:
    """Return a view of a caption: with equal chance, words of it dropped or pairs of them swapped.

    DeCLIP's second text view (Li 2022, arXiv 2110.05208) is made by EDA (Wei & Zou 2019,
    arXiv 1901.11196), here without its synonyms, which need a thesaurus of the language.
    """
    words = caption.split()
    if len(words) < 2:
        return caption
    change = _dropped if rng.random() < 0.5 else _swapped
    return " ".join(change(words, rng))


def _dropped(words: Sequence[str], rng: random.Random) -> Sequence[str]:
    """Drop each word with the same small chance, but never all."""
    return [word for word in words if rng.random() >= SHARE] or [rng.choice(words)]


def _swapped(words: Sequence[str], rng: random.Random) -> Sequence[str]:
    """Swap pairs of words, at least one."""
    swapped = list(words)
    for _ in range(max(1, round(SHARE * len(words)))):
        a, b = rng.sample(range(len(words)), 2)
        swapped[a], swapped[b] = swapped[b], swapped[a]
    return swapped
