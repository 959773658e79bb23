"""The optimisers and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from medfast.config import TrainConfig
from medfast.distributed.sharding import is_sharded
from medfast.errors import UsageError


def build_optimizer(
    config: TrainConfig, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the optimiser of those of `parameters` that are trained; vectors do not decay.

    Raises:
        UsageError: apex is asked for and not there.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.wd},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.sharding != "none":
        # No kernel takes parts and whole ones together.
        groups = [
            {**group, "params": [p for p in group["params"] if is_sharded(p) == kind]}
            for group in groups
            for kind in (False, True)
        ]
    args: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **args, fused=True)
    # The trainer clips the gradient itself.
    if config.optimizer == "lamb":
        from timm.optim import Lamb

        return Lamb(groups, **args, max_grad_norm=None)
    return fused_lamb()(groups, **args, max_grad_norm=math.inf)


def fused_lamb() -> Any:
    """Return NVIDIA apex's FusedLAMB.

    Raises:
        UsageError: it is not installed, or there is no GPU for it.
    """
    try:
        # PyPI's package of this name is another project: it has no optimizers.
        from apex.optimizers import FusedLAMB
    except ImportError as error:
        raise UsageError(
            f"--optimizer apex_lamb: NVIDIA's apex is not here ({error}); it has no wheel (PyPI's "
            "apex is another project). Build it from github.com/NVIDIA/apex, or use --optimizer "
            "lamb."
        ) from None
    if not torch.cuda.is_available():
        raise UsageError(
            "--optimizer apex_lamb: torch finds no GPU here, for which it is made; use --optimizer "
            "lamb."
        )
    return FusedLAMB


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Return the rate of step `step` (from 0): linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, total_steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
