"""The losses as functions: one folder per op, one file per implementation."""

from medfast.ops.clip.api import clip_loss
from medfast.ops.cyclip.api import cyclip_loss
from medfast.ops.flops import register_flop_formulas, register_if_counting
from medfast.ops.local_alignment.api import local_alignment_loss, word_patch_attention
from medfast.ops.ranking.api import paired_ranks, retrieval_rank
from medfast.ops.siglip.api import siglip_loss

__all__ = [
    "clip_loss",
    "cyclip_loss",
    "local_alignment_loss",
    "paired_ranks",
    "register_flop_formulas",
    "retrieval_rank",
    "siglip_loss",
    "word_patch_attention",
]

register_if_counting()
