"""The losses as functions: one folder per op, one file per implementation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from medfast.ops.flops import register_flop_formulas, register_if_counting

if TYPE_CHECKING:
    from medfast.ops.clip.api import clip_loss
    from medfast.ops.cyclip.api import cyclip_loss
    from medfast.ops.filip.api import filip_loss, filip_scores
    from medfast.ops.local_alignment.api import (
        local_alignment_loss,
        local_alignment_scores,
        word_patch_attention,
    )
    from medfast.ops.pixels.api import normalize_crops
    from medfast.ops.ranking.api import paired_ranks, retrieval_rank
    from medfast.ops.siglip.api import siglip_loss
    from medfast.ops.simclr.api import simclr_loss
    from medfast.ops.sparc.api import sparc_loss

__all__ = [
    "clip_loss",
    "cyclip_loss",
    "filip_loss",
    "filip_scores",
    "local_alignment_loss",
    "local_alignment_scores",
    "normalize_crops",
    "paired_ranks",
    "register_flop_formulas",
    "retrieval_rank",
    "siglip_loss",
    "simclr_loss",
    "sparc_loss",
    "word_patch_attention",
]

# Each function's folder. An op is registered with torch when it is first asked for: that takes
# milliseconds, which those who use another op need not wait for.
_FOLDERS = {
    "clip_loss": "clip",
    "cyclip_loss": "cyclip",
    "filip_loss": "filip",
    "filip_scores": "filip",
    "local_alignment_loss": "local_alignment",
    "local_alignment_scores": "local_alignment",
    "normalize_crops": "pixels",
    "paired_ranks": "ranking",
    "retrieval_rank": "ranking",
    "siglip_loss": "siglip",
    "simclr_loss": "simclr",
    "sparc_loss": "sparc",
    "word_patch_attention": "local_alignment",
}


def __getattr__(name: str) -> Any:
    if name not in _FOLDERS:
        raise AttributeError(f"module 'medfast.ops' has no attribute {name!r}")
    function = getattr(importlib.import_module(f"medfast.ops.{_FOLDERS[name]}.api"), name)
    globals()[name] = function
    return function


register_if_counting()
