"""What the benchmarks know of each op: its inputs, its results in fp64, the products it needs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medfast import ops
from medfast.ops.filip import reference as filip
from medfast.ops.local_alignment import reference as local_alignment
from medfast.ops.sparc import reference as sparc

Shape = tuple[int, ...]
# (m, k, n): a product of [m, k] and [k, n].
Products = list[tuple[int, int, int]]

# Relative errors, in norm, that a result may have at a scale of 14.3. The gradients of bf16 and
# fp16 features are rounded to that dtype, at least once.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
SCALE = 14.3
BIAS = -10.0
# Entries of a tile of the fp64 truths: 0.5 GB.
_TILE = 2**26
# Entries of the contexts of all pairs that the definition of a local loss may keep.
_MOST_LITERAL = 2**30
# Ranks of as many queries are compared with the truth; all of a large gallery would take minutes.
_QUERIES = 2048
# So alike are a query and its target that some ranks are 0 and some are in the hundreds.
_FAINT = 0.12
# Scores closer than this may be in either order: the rounding of unit features' products in fp32.
_NEAR = 2e-6


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        inputs: Returns the arguments in fp32 from (shape, generator); the features come first.
        call: Calls medfast's function with the arguments and `impl`.
        results: The names of what `evaluate` returns.
        truth: Returns, from the arguments, each result in fp64; for ranks the least and the most
            that the rounding of fp32 scores can make of them, for the first queries.
        products: Returns the products of "forward" and "backward" that no way around is known for.
        table: The op's key in `dispatch.IMPLEMENTATIONS`.
        noise: What rounding leaves of a result that is 0 by definition.
        branches: What rounding may add to a gradient's error where it decides between two ways.
        has_gradient: Whether there is a backward.
        scores_pairs: Whether the features are a pair's two global ones, and all pairs are scored.
        sizes: Returns a shape from (B, D), for checks at many sizes.
        few: The most of the first size for a small run.
    """

    inputs: Callable[[Shape, torch.Generator], tuple[Tensor, ...]]
    call: Callable[..., Any]
    results: tuple[str, ...]
    truth: Callable[..., list[Tensor]]
    products: Callable[[Shape], dict[str, Products]]
    table: str
    noise: float = 0.0
    branches: float = 0.0
    has_gradient: bool = True
    scores_pairs: bool = False
    sizes: Callable[[int, int], Shape] = lambda B, D: (B, D)
    few: int = 129


def pairs(
    shape: Shape, generator: torch.Generator, correlation: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Return unit image and text features [B, D], row by row alike to some degree."""
    image, noise = (
        F.normalize(torch.randn(shape, generator=generator, device=generator.device), dim=1)
        for _ in range(2)
    )
    return image, F.normalize(correlation * image + (1 - correlation) * noise, dim=1)


def evaluate(function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the function's result and, if it has a gradient, that of each argument."""
    leaves = [
        argument.detach().requires_grad_(argument.is_floating_point()) for argument in arguments
    ]
    found = function(*leaves)
    if isinstance(found, Tensor) and found.requires_grad:
        return [found.detach(), *torch.autograd.grad(found, with_gradient(leaves))]
    return list(found) if isinstance(found, tuple) else [found]


def with_gradient(arguments: Sequence[Tensor]) -> list[Tensor]:
    """Return the arguments that a gradient is wanted of: masks and numbers have none."""
    return [argument for argument in arguments if argument.requires_grad]


def errors(op: Op, found: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """Return the error of each result, by name.

    That is the norm of the difference over the norm of the truth; for ranks the share of queries
    whose rank no rounding explains.
    """
    assert len(found) == len(truth)
    error = _relative_error if op.has_gradient else _share_outside
    return {
        name: error(got, want) for name, got, want in zip(op.results, found, truth, strict=False)
    }


def _relative_error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def _share_outside(ranks: Tensor, bounds: Tensor) -> float:
    least, most = bounds
    ranks = ranks[: len(least)]
    return ((ranks < least) | (ranks > most)).double().mean().item()


def clip_truth(image: Tensor, text: Tensor, scale: Tensor) -> list[Tensor]:
    """Return clip_loss and its gradients in fp64, tile by tile.

    The diagonal stays out of the sums: where it wins by far, loss and gradient are made of what the
    others take, and even fp64 would lose that beside it.
    """
    image, text, scale = image.double(), text.double(), scale.double()
    B = len(image)
    diagonal, rows = image.new_empty(B), image.new_empty(B)
    columns = image.new_full((B,), -math.inf)
    for part in _parts(B, B):
        logits = scale * image[part] @ text.T
        own = logits.diagonal(part.start)
        diagonal[part] = own
        own.fill_(-math.inf)
        rows[part] = logits.logsumexp(1)
        columns = torch.logaddexp(columns, logits.logsumexp(0))
    loss = -(F.logsigmoid(diagonal - rows) + F.logsigmoid(diagonal - columns)).mean() / 2
    d_own = -(torch.sigmoid(rows - diagonal) + torch.sigmoid(columns - diagonal))
    rows, columns = torch.logaddexp(rows, diagonal), torch.logaddexp(columns, diagonal)

    def gradient(part: slice, logits: Tensor) -> Tensor:
        weights = (logits - rows[part, None]).exp_().add_((logits - columns).exp_())
        weights.diagonal(part.start).copy_(d_own[part])
        return weights.div_(2 * B)

    return [loss, *_gradients(image, text, scale, 0.0, gradient)[:3]]


def siglip_truth(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> list[Tensor]:
    """Return siglip_loss and its gradients in fp64, tile by tile."""
    image, text, scale, bias = image.double(), text.double(), scale.double(), bias.double()
    B = len(image)
    losses = []

    def gradient(part: slice, logits: Tensor) -> Tensor:
        # A pair wants a positive logit, all others a negative one.
        logits.diagonal(part.start).neg_()
        losses.append(F.logsigmoid(-logits).sum() / -B)
        weights = torch.sigmoid(logits).div_(B)
        weights.diagonal(part.start).neg_()
        return weights

    gradients = _gradients(image, text, scale, bias, gradient)
    return [torch.stack(losses).sum(), *gradients]


def cyclip_truth(image: Tensor, text: Tensor) -> list[Tensor]:
    """Return `cyclip_sum` and its gradients in fp64, from products of D x D."""

    def value(image: Tensor, text: Tensor) -> Tensor:
        p, q = image - text, image + text
        straight = (p.T @ p * (q.T @ q)).sum()
        mixed = p.T @ q
        swapped = (mixed * mixed.T).sum()
        return ((straight - swapped) + 2 * (straight + swapped)) / (2 * len(image))

    return evaluate(value, (image.double(), text.double()))


def cyclip_sum(terms: tuple[Tensor, Tensor]) -> Tensor:
    """Return one loss from both terms, weighted apart so that neither's error hides."""
    cross_modal, in_modal = terms
    return cross_modal + 2 * in_modal


def rank_truth(query: Tensor, gallery: Tensor, target: Tensor) -> list[Tensor]:
    """Return the least and the most that each of the first queries' ranks may be, [2, Q]."""
    query, target, gallery = query[:_QUERIES].double(), target[:_QUERIES], gallery.double()
    bounds = []
    for part in _parts(len(query), len(gallery)):
        scores = query[part] @ gallery.T
        own = scores.gather(1, target[part, None])
        # The query's own score is the one that the second sum counts and a rank does not.
        least, most = (scores >= own + _NEAR).sum(1), (scores >= own - _NEAR).sum(1) - 1
        bounds.append(torch.stack([least, most]))
    return [torch.cat(bounds, dim=1)]


def paired_rank_truth(query: Tensor, gallery: Tensor) -> list[Tensor]:
    """Return the bounds of `rank_truth` for row i against row i, both ways."""
    own = torch.arange(len(query), device=query.device)
    return rank_truth(query, gallery, own) + rank_truth(gallery, query, own)


def token_truth(function: Callable[..., Tensor], definition: Callable[..., Tensor]) -> Any:
    """Return what computes a local loss and its gradients in fp64.

    The definition keeps everything; where that is too much, the tiled PyTorch form in fp64 stands
    for it, which the tests hold to the definition.
    """

    def truth(*arguments: Tensor) -> list[Tensor]:
        arguments = tuple(x.double() if x.is_floating_point() else x for x in arguments)
        (B, P, D), T = arguments[0].shape, arguments[1].shape[1]
        if B * B * T * P * D <= _MOST_LITERAL:
            return evaluate(definition, arguments)
        return evaluate(lambda *a: function(*a, impl="torch"), arguments)

    return truth


def _token_inputs(
    shape: Shape, generator: torch.Generator, unit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return patches, tokens and mask for (B, P, T, mean number of words, D).

    The captions are from 1 to T words long; each word is faintly alike to a patch of its image.
    """
    B, P, T, mean, D = shape
    device = generator.device
    patches, tokens = (
        torch.randn(B, count, D, generator=generator, device=device) for count in (P, T)
    )
    seen = torch.randint(P, (B, T, 1), generator=generator, device=device).expand(B, T, D)
    tokens = _FAINT * patches.gather(1, seen) + (1 - _FAINT) * tokens
    # Uniform around the mean, as far as 1 and T allow.
    reach = min(mean - 1, T - mean)
    lengths = torch.randint(
        mean - reach, mean + reach + 1, (B, 1), generator=generator, device=device
    )
    mask = torch.arange(T, device=device) < lengths
    if unit:
        return F.normalize(patches, dim=-1), F.normalize(tokens, dim=-1), mask
    # As projected features are: similarities of a few units.
    return patches * D**-0.25, tokens * D**-0.25, mask


def _with_scale(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return *inputs, inputs[0].new_tensor(SCALE)


def _token_sizes(B: int, D: int) -> Shape:
    """Return odd numbers of patches and words, few pairs and short captions."""
    T = 1 + B % 77
    return (min(B, 40), 1 + B % 197, T, (T + 1) // 2, D)


def _local_alignment_products(shape: Shape) -> dict[str, Products]:
    B, P, _, mean, D = shape
    words = B * mean
    similarity, mixed = [(words, D, B * P)], [(words, P, P)] * B
    gradients = [(words, B * P, D), (B * P, words, D), *[(P, words, P)] * B]
    return {"forward": similarity + mixed, "backward": similarity + mixed + gradients}


def _sparc_products(shape: Shape) -> dict[str, Products]:
    B, P, _, n, D = shape
    forward = [(n, D, P), (n, P, D), (n, D, n)]
    backward = [(n, n, D), (n, n, D), (n, D, P), (n, P, D), (P, 2 * n, D)]
    return {"forward": forward * B, "backward": backward * B}


def _parts(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, _TILE // columns)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _gradients(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | float,
    gradient: Callable[[slice, Tensor], Tensor],
) -> list[Tensor]:
    """Return the gradients of image, text, scale and bias from that of the logits, tile by tile."""
    d_image, d_text = torch.empty_like(image), torch.zeros_like(text)
    d_bias = torch.zeros_like(scale)
    for part in _parts(len(image), len(text)):
        d_logits = gradient(part, scale * image[part] @ text.T + bias)
        d_image[part] = d_logits @ text
        d_text += d_logits.T @ image[part]
        d_bias += d_logits.sum()
    d_scale = (image * d_image).sum()
    return [d_image.mul_(scale), d_text.mul_(scale), d_scale, d_bias]


def _clip_inputs(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    image, text = pairs(shape, generator)
    return image, text, image.new_tensor(SCALE)


def _siglip_inputs(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    return *_clip_inputs(shape, generator), torch.tensor(BIAS, device=generator.device)


def _rank_inputs(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    N, M, D = shape
    gallery, query = pairs((M, D), generator, _FAINT)
    target = torch.randperm(M, generator=generator, device=generator.device)[:N]
    return query[target], gallery, target


def _loss_products(shape: Shape, again: int) -> dict[str, Products]:
    B, D = shape
    return {"forward": [(B, D, B)], "backward": [(B, D, B)] * again + [(B, B, D)] * 2}


def _cyclip_products(shape: Shape) -> dict[str, Products]:
    B, D = shape
    return {"forward": [(D, B, D)] * 3, "backward": [(B, D, D)] * 4}


OPS = {
    "clip_loss": Op(
        inputs=_clip_inputs,
        call=lambda *arguments, impl: ops.clip_loss(*arguments, impl=impl),
        results=("loss", "d_image", "d_text", "d_scale"),
        truth=clip_truth,
        # The softmax needs its sums before any gradient: the logits come twice.
        products=functools.partial(_loss_products, again=1),
        table="clip_loss",
        scores_pairs=True,
    ),
    "siglip_loss": Op(
        inputs=_siglip_inputs,
        call=lambda *arguments, impl: ops.siglip_loss(*arguments, impl=impl),
        results=("loss", "d_image", "d_text", "d_scale", "d_bias"),
        truth=siglip_truth,
        # A logit's gradient needs that logit alone: the forward can go on to all gradients.
        products=functools.partial(_loss_products, again=0),
        table="siglip_loss",
        scores_pairs=True,
    ),
    "cyclip_loss": Op(
        inputs=pairs,
        call=lambda *arguments, impl: cyclip_sum(ops.cyclip_loss(*arguments, impl=impl)),
        results=("loss", "d_image", "d_text"),
        truth=cyclip_truth,
        products=_cyclip_products,
        table="cyclip_loss",
        # A pair alone is consistent with itself.
        noise=1e-7,
        scores_pairs=True,
    ),
    "local_alignment_loss": Op(
        inputs=lambda shape, generator: _token_inputs(shape, generator, unit=False),
        call=lambda *arguments, impl: ops.local_alignment_loss(*arguments, impl=impl),
        results=("loss", "d_patches", "d_tokens"),
        truth=token_truth(ops.local_alignment_loss, local_alignment.local_alignment_loss),
        products=_local_alignment_products,
        table="local_alignment_loss",
        sizes=_token_sizes,
        few=9,
    ),
    "filip_loss": Op(
        inputs=lambda shape, generator: _with_scale(_token_inputs(shape, generator, unit=True)),
        call=lambda *arguments, impl: ops.filip_loss(*arguments, impl=impl),
        results=("loss", "d_patches", "d_tokens", "d_scale"),
        truth=token_truth(ops.filip_loss, filip.filip_loss),
        # The backward adds the one feature that each maximum came from: no product is needed.
        products=lambda shape: {
            "forward": [(shape[0] * shape[3], shape[4], shape[0] * shape[1])],
            "backward": [],
        },
        table="filip_loss",
        # Two parts may be equally good to within rounding; the gradient goes to one of them.
        branches=5e-3,
        sizes=_token_sizes,
        few=9,
    ),
    "sparc_loss": Op(
        inputs=lambda shape, generator: _with_scale(_token_inputs(shape, generator, unit=False)),
        call=lambda *arguments, impl: ops.sparc_loss(*arguments, impl=impl),
        results=("loss", "d_patches", "d_tokens", "d_scale"),
        truth=token_truth(ops.sparc_loss, sparc.sparc_loss),
        products=_sparc_products,
        table="sparc_loss",
        # A share may be at the threshold to within rounding.
        branches=5e-3,
        sizes=_token_sizes,
        few=9,
    ),
    "retrieval_rank": Op(
        inputs=_rank_inputs,
        call=lambda *arguments, impl: ops.retrieval_rank(*arguments, impl=impl),
        results=("ranks",),
        truth=rank_truth,
        products=lambda shape: {"forward": [(shape[0], shape[2], shape[1])]},
        table="retrieval_rank",
        has_gradient=False,
        sizes=lambda B, D: (B, B + 3, D),
    ),
    "paired_ranks": Op(
        inputs=lambda shape, generator: pairs(shape, generator, _FAINT),
        call=lambda *arguments, impl: ops.paired_ranks(*arguments, impl=impl),
        results=("ranks", "ranks_back"),
        truth=paired_rank_truth,
        products=lambda shape: {"forward": [(shape[0], shape[1], shape[0])]},
        table="retrieval_rank",
        has_gradient=False,
    ),
}
