"""Batch norm whose statistics are those of the pairs of all ranks. torch's own needs a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medfast.distributed.ring import Ring


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all ranks, which may be of different sizes.

    Values, gradients and running statistics are those of one process with all of them.

    Args:
        norm: What it replaces; weights and statistics are shared with it.
        ring: The ranks.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, ring: Ring) -> None:
        super().__init__(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
        # The very same tensors, so that an optimiser that has them keeps them.
        self._parameters = norm._parameters
        self._buffers = norm._buffers
        self.training = norm.training
        self.ring = ring

    def _check_input_dim(self, input: Tensor) -> None:
        """Take any shape [B, C, ...]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x [B, C, ...]."""
        if not self.training:
            return super().forward(x)
        y, mean, variance, count = _SyncBatchNorm.apply(
            x, self.weight, self.bias, self.eps, self.ring
        )
        if self.track_running_stats:
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = self.momentum
                if momentum is None:
                    momentum = 1 / self.num_batches_tracked.item()
                unbiased = variance * (count / (count - 1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return y


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ring: Ring
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Two passes: the square of the mean may be all there is of the mean of the squares.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        others = [d for d in range(x.ndim) if d != 1]
        own = wide.new_tensor(x.numel() // x.shape[1])
        *sums, count = ring.all_reduce(torch.cat([wide.sum(others), own[None]])).split(
            [x.shape[1], 1]
        )
        mean = sums[0] / count
        centred = wide - _along(mean, x)
        variance = ring.all_reduce(centred.square().sum(others)) / count
        scale = (variance + eps).rsqrt()
        normal = centred * _along(scale, x)
        ctx.save_for_backward(normal, scale, weight, count)
        ctx.ring, ctx.others, ctx.has_bias = ring, others, bias is not None
        y = normal if weight is None else normal * _along(weight, x)
        y = y if bias is None else y + _along(bias, x)
        ctx.mark_non_differentiable(mean, variance, count)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, d_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        normal, scale, weight, count = ctx.saved_tensors
        d_wide = d_y.to(normal.dtype)
        d_bias = d_wide.sum(ctx.others)
        d_weight = (d_wide * normal).sum(ctx.others)
        # Every rank's values are in the statistics of all.
        both = ctx.ring.all_reduce(torch.stack([d_bias, d_weight])) / count
        mean, along = (_along(part, normal) for part in both)
        d_x = (d_wide - mean - normal * along) * _along(scale, normal)
        if weight is not None:
            d_x *= _along(weight, normal)
        has_weight = weight is not None
        return (
            d_x.to(d_y.dtype),
            d_weight.to(weight.dtype) if has_weight else None,
            d_bias.to(weight.dtype) if ctx.has_bias else None,
            None,
            None,
        )


def synchronize_batch_norm(module: nn.Module, ring: Ring) -> None:
    """Replace each batch norm within `module` by one over all ranks, its weights unchanged.

    Raises:
        ValueError: one is of a kind that does more than to normalise.
    """
    for parent in list(module.modules()):
        for name, norm in list(parent.named_children()):
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                raise ValueError(
                    f"synchronize_batch_norm: {name} must be a plain batch norm; got "
                    f"{type(norm).__name__}. Choose towers without it, or train in one process."
                )
            setattr(parent, name, SyncBatchNorm(norm, ring))


def _along(channels: Tensor, like: Tensor) -> Tensor:
    """Return [C] such that it meets the second dimension of `like`."""
    return channels.view(1, -1, *[1] * (like.ndim - 2))
