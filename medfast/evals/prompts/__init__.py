"""The prompts of zero-shot classification: templates by modality, phrases by class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from medfast.data.classification import facts
from medfast.errors import UsageError, unknown_name
from medfast.evals.prompts.phrases import PHRASES
from medfast.evals.prompts.templates import HISTOLOGY4, TEMPLATES

CHOICES = ("default", "histology4")


def prompts(key: str, templates: str = "default", without: Sequence[str] = ()) -> list[list[str]]:
    """Return the prompts of each class of a set, K lists.

    Args:
        key: Of the classification set.
        templates: "default" puts every phrase for a class into every template that fits the
            modality; "histology4" the plain name of the class into four templates for histology,
            whatever the modality, as earlier work does.
        without: Names of classes to leave out, as `read` takes them.

    Raises:
        UsageError: a name is not known.
    """
    if templates not in CHOICES:
        raise UsageError(unknown_name("--prompts", templates, CHOICES))
    of = facts(key)
    for name in without:
        if name not in of.classes:
            raise UsageError(unknown_name(f"class of {key}", name, of.classes))
    if templates == "histology4":
        phrases: Sequence[tuple[str, ...]] = [(name,) for name in of.classes]
        chosen: tuple[str, ...] = HISTOLOGY4
    else:
        phrases, chosen = PHRASES[key], TEMPLATES[of.modality]
    return [
        [template.format(phrase) for phrase in own for template in chosen]
        for name, own in zip(of.classes, phrases, strict=True)
        if name not in without
    ]


def prompt_hash(prompts: Sequence[Sequence[str]]) -> str:
    """Return the SHA-256 that tells whether two figures were asked for in the same words."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
