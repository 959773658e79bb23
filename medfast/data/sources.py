"""What every data set says of itself, and the sentences for what is missing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from medfast.errors import UsageError


@dataclass(frozen=True)
class About:
    """Facts of a data set.

    Attributes:
        key: Its name on the command line.
        title: Its full name.
        licence: The licence, or the agreement under which it is given.
        access: How to get it, as a sentence that starts with a verb.
        citation: The paper to cite.
        credentialed: Whether only people who signed an agreement may see its images.
    """

    key: str
    title: str
    licence: str
    access: str
    citation: str
    credentialed: bool = False


class AbsentError(UsageError):
    """A set or a split of it that is not there: sets need not have every split."""


def missing(about: About, root: Path, looked_for: Iterable[str] = ()) -> AbsentError:
    """Return the error for a folder or a file of the data set that is not there.

    It says what to get, under which agreement, and where to put it.
    """
    if not root.exists():
        what = f"there is no {root}"
    else:
        what = f"{root} holds none of: {', '.join(looked_for)}"
    return AbsentError(
        f"{about.key}: {what}. {about.access} ({about.licence}), put it there and "
        f"name it {about.key}:{root}."
    )


def few_pairs(validation: float, test: float, otherwise: str) -> str:
    """Return the remedy for a split that `hash_split` has left empty.

    Args:
        validation: As of `hash_split`.
        test: As of `hash_split`.
        otherwise: How to name the splits, as a clause after "or".
    """
    least = min(share for share in (validation, test) if share)
    # With so many groups a split is empty once in 150 times.
    count = round(5 / least)
    return (
        f"A hash puts {least:.0%} of the groups (patients, articles, images) there, so that it "
        f"takes about {count} of them: give more pairs, or {otherwise}."
    )


def hash_split(group: str, validation: float, test: float = 0.0) -> str:
    """Return the split of a group (patient, article, image) that upstream does not fix.

    It depends on the name of the group alone, so whatever shares a group shares its split.

    Args:
        group: Name of the group.
        validation: Share of the groups in "validation".
        test: Share of the groups in "test".
    """
    # File names need not be UTF-8.
    name = group.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < validation:
        return "validation"
    return "test" if place < validation + test else "train"
