"""What a source holds of one tower, by the parameter names of medfast's own trunk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from medfast.errors import UsageError


class Weight(NamedTuple):
    """A tensor, and the names in the source of those that it is made of."""

    tensor: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True)
class Tower:
    """One tower of a source.

    Attributes:
        format: What the source is, in words.
        weights: By name in medfast's own trunk.
        projection: Into the shared space, [D, C], if the source has one without bias.
        local_projection: That of patches or tokens, likewise.
        activation: "gelu", "quick_gelu" and so on; None where the source does not tell.
        heads: Attention heads of a layer, likewise.
        pool: How the features that the projection takes are pooled, likewise.
    """

    format: str
    weights: Mapping[str, Weight]
    projection: Weight | None = None
    local_projection: Weight | None = None
    activation: str | None = None
    heads: int | None = None
    pool: str | None = None


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Weight]:
    """Return the tensors whose names begin with `prefix`, by the rest of their names."""
    return {
        name.removeprefix(prefix): Weight(tensor, (name,))
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def renamed(
    weights: Mapping[str, Weight], rules: Sequence[tuple[str, str]], drop: Iterable[str] = ()
) -> dict[str, Weight]:
    """Return weights by other names.

    Args:
        weights: By the names of a source.
        rules: Parts of names and what takes their place, one rule after the other.
        drop: Beginnings of names that are left out.
    """
    found = {}
    for name, weight in weights.items():
        if name.startswith(tuple(drop)):
            continue
        for old, new in rules:
            name = name.replace(old, new)
        found[name] = weight
    return found


def inverse(rules: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the rules of `renamed` that give names back."""
    return [(new, old) for old, new in reversed(rules)]


def apart(weights: Mapping[str, Weight], joint: str, part: str) -> dict[str, Weight]:
    """Return weights with queries, keys and values apart, where they are kept as one.

    Args:
        weights: By name.
        joint: What names of joint ones hold, such as ".attn.qkv.".
        part: What takes its place, with {} for the letter, such as ".attn.{}_proj.".
    """
    found: dict[str, Weight] = {}
    for name, weight in weights.items():
        if joint not in name:
            found[name] = weight
            continue
        for letter, tensor in zip("qkv", weight.tensor.chunk(3), strict=True):
            found[name.replace(joint, part.format(letter))] = Weight(tensor, weight.names)
    return found


def together(weights: Mapping[str, Weight], part: str, joint: str) -> dict[str, Weight]:
    """Return weights with queries, keys and values as one: what `apart` takes back."""
    query, *others = (part.format(letter) for letter in "qkv")
    found: dict[str, Weight] = {}
    for name, weight in weights.items():
        if query in name:
            names = [name.replace(query, own) for own in (query, *others)]
            parts = [weights[own] for own in names if own in weights]
            tensor = torch.cat([own.tensor for own in parts])
            sources = tuple(source for own in parts for source in own.names)
            found[name.replace(query, joint)] = Weight(tensor, sources)
        elif not any(own in name for own in others):
            found[name] = weight
    return found


def prefix_of(names: Iterable[str], anchor: str, source: str) -> str | None:
    """Return what stands before the one name that ends with `anchor`; None without such a name.

    Raises:
        UsageError: there are several, so that the source holds more than one such tower.
    """
    found = sorted(n.removesuffix(anchor) for n in names if n == anchor or n.endswith(f".{anchor}"))
    if len(found) > 1:
        raise UsageError(
            f"{source} holds {len(found)} towers of one kind, under {', '.join(map(repr, found))}; "
            "give a file of one of them."
        )
    return found[0] if found else None
