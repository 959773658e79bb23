"""Fused contrastive losses and fast training for medical vision-language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medfast.losses import (
        ClipLoss,
        CyclipLoss,
        FilipLoss,
        LocalAlignmentLoss,
        SigLipLoss,
        SparcLoss,
    )

__version__ = "0.1.0"
__all__ = [
    "ClipLoss",
    "CyclipLoss",
    "FilipLoss",
    "LocalAlignmentLoss",
    "SigLipLoss",
    "SparcLoss",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that `medfast --help` never pays for torch.
    if name in __all__:
        return getattr(importlib.import_module("medfast.losses"), name)
    raise AttributeError(f"module 'medfast' has no attribute {name!r}")
