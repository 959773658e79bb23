"""sparc_loss and its gradients, a few pairs at a time: products between csrc's kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medfast import _C
from medfast.ops import packing
from medfast.ops.matmul import bmm_into
from medfast.ops.packing import valid
from medfast.ops.sparc.reference import CONSTANT, MIN_NORM
from medfast.ops.workspace import lend

# Pairs whose tensors stay in cache together.
_TOGETHER = 8


def forward(
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    logit_scale: Tensor,
    threshold: float | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the loss and the gradients of patches, tokens and scale, None without `needs_grad`."""
    B, P, D = patches.shape
    words = packing.all_words("sparc_loss", tokens, token_mask)
    features = words.features.float()
    scale = logit_scale.item()
    d_patches = lend(B * P * D, patches, torch.float32).view(B, P, D) if needs_grad else None
    d_words = torch.empty_like(features) if needs_grad else None
    loss = d_scale = 0.0
    runs = list(_runs(words))
    memory = torch.empty(max(_entries(run, P, D) for run in runs))
    for run in runs:
        w = features[run.rows].view(run.count, run.length, D)
        mask = None if patch_mask is None else patch_mask[run.pairs]
        v = valid(patches[run.pairs], mask).contiguous()
        here = _tensors(memory, run, P, D)
        aligned = _Alignment(here.similarity, mask, threshold)
        bmm_into(here.similarity, w, v.mT)
        aligned.weigh(here.weights)
        bmm_into(here.contexts, here.weights, v)
        bmm_into(here.products, here.contexts, w.mT)
        weight = 1 / (2 * run.length * B)
        of_run, of_scale = _C.sparc_loss_contrast(
            here.contexts.data_ptr(),
            w.data_ptr(),
            run.count,
            run.length,
            D,
            scale,
            weight,
            MIN_NORM,
            here.products.data_ptr(),
            here.through_contexts.data_ptr(),
            here.through_words.data_ptr(),
        )
        loss += weight * of_run
        d_scale += of_scale
        if d_patches is None or d_words is None:
            continue
        d_w, d_v = d_words[run.rows].view_as(w), d_patches[run.pairs]
        bmm_into(here.d_contexts, here.products, w)
        _add_rows(here.d_contexts, here.contexts, here.through_contexts)
        bmm_into(d_w, here.products.mT, here.contexts)
        _add_rows(d_w, w, here.through_words)
        bmm_into(d_v, here.weights.mT, here.d_contexts)
        d_similarity = bmm_into(here.weights, here.d_contexts, v.mT)
        aligned.backward(d_similarity)
        bmm_into(d_w, d_similarity, v, accumulate=True)
        bmm_into(d_v, d_similarity.mT, w, accumulate=True)
    total = torch.tensor(loss)
    if d_words is None:
        return total, None, None, None
    return total, d_patches, packing.unpack([words], [d_words], tokens), torch.tensor(d_scale)


@dataclass(frozen=True)
class _Run:
    """Neighbours in the batch whose captions are equally long: letters b pairs, n words each."""

    pairs: slice  # b of the batch
    rows: slice  # b * n of the packed words
    count: int  # b
    length: int  # n


def _runs(words: packing.Words) -> Iterator[_Run]:
    """Yield runs of at most `_TOGETHER` pairs; equally long captions are in the batch's order."""
    captions, starts = words.captions.tolist(), words.starts.tolist()
    first = 0
    for k in range(1, len(captions) + 1):
        length = starts[first + 1] - starts[first]
        if (
            k < len(captions)
            and k - first < _TOGETHER
            and captions[k] == captions[k - 1] + 1
            and starts[k + 1] - starts[k] == length
        ):
            continue
        count = k - first
        pairs = slice(captions[first], captions[first] + count)
        yield _Run(pairs, slice(starts[first], starts[k]), count, length)
        first = k


class _Tensors(NamedTuple):
    """The tensors of a run."""

    similarity: Tensor  # [b, n, P]
    weights: Tensor  # [b, n, P]
    contexts: Tensor  # [b, n, D]
    d_contexts: Tensor  # [b, n, D]
    products: Tensor  # [b, n, n]
    through_contexts: Tensor  # [b, n]
    through_words: Tensor  # [b, n]


def _shapes(run: _Run, P: int, D: int) -> list[tuple[int, ...]]:
    b, n = run.count, run.length
    return [(b, n, P)] * 2 + [(b, n, D)] * 2 + [(b, n, n)] + [(b, n)] * 2


def _entries(run: _Run, P: int, D: int) -> int:
    return sum(torch.Size(shape).numel() for shape in _shapes(run, P, D))


def _tensors(memory: Tensor, run: _Run, P: int, D: int) -> _Tensors:
    """Return the tensors of a run, in memory that the last run has had."""
    shapes = _shapes(run, P, D)
    parts = memory[: _entries(run, P, D)].split([torch.Size(shape).numel() for shape in shapes])
    return _Tensors(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))


class _Alignment:
    """The weights of patches from similarities [b, n, P], and their gradient."""

    def __init__(self, similarity: Tensor, mask: Tensor | None, threshold: float | None) -> None:
        b, n, P = similarity.shape
        self._similarity = similarity
        if mask is None:
            # One mask for all pairs.
            counted, self._rows = torch.ones(1, P), b * n
        else:
            counted, self._rows = mask.float(), n
        least = (1 / counted.sum(1)).tolist() if threshold is None else [threshold] * len(counted)
        self._pairs = list(zip(counted, least, strict=True))

    def weigh(self, weights: Tensor) -> None:
        """Write the weights [b, n, P]."""
        self._each(_C.sparc_loss_align, weights)

    def backward(self, gradient: Tensor) -> None:
        """Turn the gradient of the weights [b, n, P] into that of the similarities."""
        self._each(_C.sparc_loss_align_gradient, gradient)

    def _each(self, kernel: Any, out: Tensor) -> None:
        P = out.shape[2]
        inputs, outputs = (x.view(-1, self._rows, P) for x in (self._similarity, out))
        for x, y, (counted, least) in zip(inputs, outputs, self._pairs, strict=True):
            kernel(x.data_ptr(), counted.data_ptr(), self._rows, P, least, CONSTANT, y.data_ptr())


def _add_rows(out: Tensor, rows: Tensor, factors: Tensor) -> None:
    """Add each row times its factor, [b, n, D] and [b, n]."""
    b, n, D = rows.shape
    _C.sparc_loss_add_rows(rows.data_ptr(), factors.data_ptr(), b * n, D, out.data_ptr())
