"""cyclip_loss from products of D x D, or of B x B where that is smaller, in differentiable PyTorch.

With P = X - Y and Q = X + Y, N = P Q^T is the sum of X X^T - Y Y^T, which is symmetric, and of
X Y^T - Y X^T, which is antisymmetric. Both terms are the squares of one part of N:

    1/2 (|N|^2 -/+ <N, N^T>) / B,  |N|^2 = <P^T P, Q^T Q>,  <N, N^T> = tr((P^T Q)^2).

Nothing is lost as Y approaches X: P, rounded only once, is a factor of all that is summed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cyclip_loss(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-modal and the in-modal term; see `medfast.ops.cyclip_loss`."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    image, text = image.to(dtype), text.to(dtype)
    difference, total = image - text, image + text
    pairs, width = image.shape
    if pairs > width:
        return from_grams(*grams(difference, total), pairs)
    n = difference @ total.T
    return (n - n.T).square().sum() / (4 * pairs), (n + n.T).square().sum() / (4 * pairs)


def grams(difference: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return P^T P, Q^T Q and P^T Q, each [D, D] and a sum over pairs."""
    return difference.T @ difference, total.T @ total, difference.T @ total


def from_grams(
    differences: Tensor, totals: Tensor, mixed: Tensor, pairs: int
) -> tuple[Tensor, Tensor]:
    """Return both terms from what `grams` returns, summed over `pairs` pairs."""
    straight, swapped = (differences * totals).sum(), (mixed * mixed.T).sum()
    return (straight - swapped) / (2 * pairs), (straight + swapped) / (2 * pairs)
