"""Image-to-text and text-to-image retrieval over the whole gallery."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from medfast.evals.bootstrap import bootstrap_ci, bootstrap_cis
from medfast.evals.encode import Embeddings
from medfast.evals.features import GlobalFeatures, LocalFeatures, Matchable
from medfast.evals.metrics import DEEP_KS, KS, Floats, mean_of, median_of, recall_at
from medfast.ops import filip_scores, retrieval_rank

# Scores of pairs, which are 1 at most, that another order of sums may tell apart from equal ones.
_NEAR = 1e-4
# Pairs whose features are copied at a time.
_CHUNK = 2**16
# Of shares of queries.
_ROUNDING = 1e-9


def retrieval(embeddings: Embeddings) -> dict[str, Any]:
    """Return Recall@k of both directions with chance levels and intervals by study.

    One positive per query: its own caption (or image). Another view of the same study counts as
    a miss.
    """
    n = len(embeddings.index)
    image_to_text, text_to_image = embeddings.ranks
    both = {"image_to_text": image_to_text, "text_to_image": text_to_image}
    hits = {
        f"{direction}_R@{k}": recall_at(found, k) for direction, found in both.items() for k in KS
    }
    return {
        "n": n,
        "metrics": {name: float(hit.mean()) for name, hit in hits.items()},
        "chance": {name: min(1.0, int(name.rpartition("@")[2]) / n) for name in hits},
        "ci95": {name: bootstrap_ci(hit, embeddings.group.tolist()) for name, hit in hits.items()},
    }


def retrieval_figures(
    embeddings: Embeddings,
    captions: Sequence[Hashable],
    images: Sequence[Hashable] | None = None,
    groups: ArrayLike | None = None,
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Return all figures of retrieval, with one positive per query and with all of them.

    With one positive, a query is to find its own caption (or image), as the field reports it. With
    all, it is to find any of its positives: what the gallery holds for the pairs of its study and
    for the queries that equal it, and whatever in the gallery equals one of these. The rank is
    that of the best positive, with the other positives taken out of the gallery; ties with the
    rest count against the query. That a positive is among the best k is the same with them or
    without.

    Ranks are exact and no N x N scores are kept (but for late interaction, where they are smaller
    than the features); with all positives memory grows with their number.

    Args:
        embeddings: Of N pairs.
        captions: Of each pair, equal where texts are.
        images: Of each pair, such as a hash, equal where pictures are; None: all differ.
        groups: Patient of each pair, [N], whom the intervals draw; None: the study.
        seed: Of the intervals.
        resamples: Draws of the intervals.

    Returns:
        "n" and "gallery", both N; "metrics", "chance" and "ci95", each with
        "DIRECTION_R@K" for K of `DEEP_KS` and "DIRECTION_median_rank" (1 is the best), and with
        "DIRECTION_all_positives_R@K" and so on; "positives", by direction how many a query has on
        average. Directions are "image_to_text" and "text_to_image".

    Raises:
        ValueError: the lengths differ.
    """
    n = len(embeddings.index)
    image_ids = torch.arange(n) if images is None else _ids(images)
    text_ids = _ids(captions)
    if len(image_ids) != n or len(text_ids) != n:
        raise ValueError(
            f"retrieval_figures: captions and images must be those of the {n} pairs; got "
            f"{len(text_ids)} and {len(image_ids)}."
        )
    ranks: dict[str, Tensor] = {}
    positives: dict[str, Tensor] = {}
    scored = _scored(_unified(embeddings.image, image_ids), _unified(embeddings.text, text_ids))
    ids = ((image_ids, text_ids), (text_ids, image_ids))
    names = ("image_to_text", "text_to_image")
    for name, single, own, both in zip(names, embeddings.ranks, scored, ids, strict=True):
        ranks[name], positives[name] = single, torch.ones(n, dtype=torch.int64)
        more = f"{name}_all_positives"
        ranks[more], positives[more] = best_positive_ranks(own, embeddings.group, *both, single)
    values, chance = {}, {}
    for name, found in ranks.items():
        by_chance = _Chance(n, positives[name].numpy())
        for k in DEEP_KS:
            values[f"{name}_R@{k}"] = mean_of(recall_at(found, k))
            chance[f"{name}_R@{k}"] = by_chance.recall(k)
        values[f"{name}_median_rank"] = median_of(found.numpy() + 1)
        chance[f"{name}_median_rank"] = by_chance.median_rank()

    def statistic(weights: Floats) -> dict[str, Floats]:
        return {name: value(weights) for name, value in values.items()}

    drawn = embeddings.group.numpy() if groups is None else groups
    return {
        "n": n,
        "gallery": n,
        "metrics": {name: float(x[0]) for name, x in statistic(np.ones((1, n))).items()},
        "chance": chance,
        "ci95": bootstrap_cis(statistic, n, drawn, seed=seed, resamples=resamples),
        "positives": {
            name: positives[f"{name}_all_positives"].double().mean().item() for name in names
        },
    }


class Scored(NamedTuple):
    """How queries match a gallery of M items; both functions take rows of each, int64 [U].

    Attributes:
        score: Returns the scores of these pairs, [U].
        rank: Returns the rank of each of these items for its query, int64 [U], as
            `medfast.ops.retrieval_rank`.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    rank: Callable[[Tensor, Tensor], Tensor]


def best_positive_ranks(
    scored: Scored, study: Tensor, query_ids: Tensor, gallery_ids: Tensor, single: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the rank of each query's best positive, and how many positives it has.

    The rank is |{j no positive of i : s_ij >= max over positives p of s_ip}|. Let r_p be the rank
    of p among all others. It is least for the best positives, and equal for two of them if and only
    if their scores are; so the rank is min r_p + 1 - |{p : r_p = min}|, which no rounding of scores
    that are computed elsewhere can spoil. Only positives whose scores come near the best are
    ranked.

    Args:
        scored: The scores of N queries and N items of the gallery; equal ids have equal features.
        study: Of each pair, int64 [N].
        query_ids: Equal where queries are, int64 [N].
        gallery_ids: Equal where items of the gallery are, int64 [N].
        single: Rank of each query's own item, which is right where it is the only positive.

    Returns:
        Both int64 [N].
    """
    _, item, copies = gallery_ids.unique(return_inverse=True, return_counts=True)
    pairs = torch.cat([_equal_pairs(study), _equal_pairs(query_ids)], dim=1)
    # Each query with each distinct item that is right for it, once.
    key = (pairs[0] * len(copies) + item[pairs[1]]).unique()
    row, right = key // len(copies), key % len(copies)
    positives = torch.zeros_like(single).index_add_(0, row, copies[right])
    several = positives[row] > 1
    row, right = row[several], right[several]
    if len(row) == 0:
        return single.clone(), positives
    first_item, first_query = _first(item), _first(query_ids)[_numbered(query_ids)]
    # Equal queries ask alike.
    key, of_pair = (first_query[row] * len(single) + first_item[right]).unique(return_inverse=True)
    asked = torch.stack([key // len(single), key % len(single)])
    scores = _in_chunks(scored.score, asked).nan_to_num(nan=-torch.inf)[of_pair]
    best = scores.new_full((len(single),), -torch.inf).scatter_reduce_(0, row, scores, "amax")
    near = scores >= best[row] - _NEAR
    row, right, of_pair = row[near], right[near], of_pair[near]
    kept, of_pair = of_pair.unique(return_inverse=True)
    found = _in_chunks(scored.rank, asked[:, kept])[of_pair]
    most = torch.iinfo(torch.int64).max
    least = torch.full_like(single, most).scatter_reduce_(0, row, found, "amin")
    equal = torch.where(found == least[row], copies[right], 0)
    tied = torch.zeros_like(single).index_add_(0, row, equal)
    return torch.where(positives > 1, least + 1 - tied, single), positives


def _scored(images: Matchable, texts: Matchable) -> tuple[Scored, Scored]:
    """Return how images match texts, and texts images."""
    if isinstance(images, LocalFeatures) and isinstance(texts, LocalFeatures):
        both = filip_scores(images.unit, texts.unit, texts.mask, patch_mask=images.mask)
        return _by_scores(both[0]), _by_scores(both[1])
    assert isinstance(images, GlobalFeatures)
    assert isinstance(texts, GlobalFeatures)
    return _by_features(images.unit, texts.unit), _by_features(texts.unit, images.unit)


def _by_features(query: Tensor, gallery: Tensor) -> Scored:
    return Scored(
        lambda rows, items: (query[rows] * gallery[items]).sum(1),
        lambda rows, items: retrieval_rank(query[rows], gallery, items),
    )


def _by_scores(scores: Tensor) -> Scored:
    def score(rows: Tensor, items: Tensor) -> Tensor:
        return scores[rows.to(scores.device), items.to(scores.device)].cpu()

    def rank(rows: Tensor, items: Tensor) -> Tensor:
        found = []
        for row, item in zip(rows.tolist(), items.tolist(), strict=True):
            # Not "at least": what NaN is compared with is neither.
            others = ~(scores[row] < scores[row, item])
            others[item] = False
            found.append(others.sum())
        return torch.stack(found).cpu()

    return Scored(score, rank)


def _unified(features: Matchable, ids: Tensor) -> Matchable:
    """Give equal texts, or images, one feature: beside others they round in another way."""
    if len(ids.unique()) == len(ids):
        return features
    return features[_first(ids)[_numbered(ids)].tolist()]


def _ids(values: Sequence[Hashable]) -> Tensor:
    """Return a number for each value, equal where values are, int64 [N]."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])


def _numbered(ids: Tensor) -> Tensor:
    """Return ids as numbers from 0, int64 [N]."""
    return ids.unique(return_inverse=True)[1]


def _first(ids: Tensor) -> Tensor:
    """Return the first row of each distinct id, in ascending order of the ids."""
    _, number, counts = ids.unique(return_inverse=True, return_counts=True)
    return number.argsort(stable=True)[counts.cumsum(0) - counts]


def _equal_pairs(ids: Tensor) -> Tensor:
    """Return all pairs of rows with equal ids, a row with itself among them, int64 [2, pairs]."""
    _, number, counts = ids.unique(return_inverse=True, return_counts=True)
    order, starts, size = number.argsort(stable=True), counts.cumsum(0) - counts, counts[number]
    rows = torch.arange(len(ids)).repeat_interleave(size)
    within = torch.arange(len(rows)) - (size.cumsum(0) - size).repeat_interleave(size)
    return torch.stack([rows, order[starts[number[rows]] + within]])


def _in_chunks(function: Callable[[Tensor, Tensor], Tensor], pairs: Tensor) -> Tensor:
    return torch.cat([function(*part) for part in pairs.split(_CHUNK, dim=1)])


class _Chance:
    """What a random order of the gallery gives.

    Args:
        gallery: M, how many items it holds.
        positives: How many of these are right, of each query, [N].
    """

    def __init__(self, gallery: int, positives: NDArray[np.int64]) -> None:
        self._gallery = gallery
        self._positives, self._queries = np.unique(positives, return_counts=True)

    def recall(self, k: int) -> float:
        """Return the share of queries that have a positive among the first k."""
        return 1 - self._missed(k)

    def median_rank(self) -> float:
        """Return the median rank of the first positive, 1 being the best."""
        below, above = (self._first_rank(1 / 2 + side * _ROUNDING) for side in (-1, 1))
        return (below + above) / 2

    def _first_rank(self, share: float) -> int:
        """Return the least rank by which at least this share of the queries has a positive."""
        ranks = range(1, self._gallery + 1)
        return ranks[bisect_left(ranks, share, key=self.recall)]

    def _missed(self, k: int) -> float:
        """Return the share of queries that have none among the first k.

        Of m positives among M items that is C(M - m, k) / C(M, k).
        """
        M = self._gallery
        of_each = [
            np.prod(np.maximum(M - k - np.arange(m), 0) / (M - np.arange(m)))
            for m in self._positives
        ]
        return float(np.average(of_each, weights=self._queries))
