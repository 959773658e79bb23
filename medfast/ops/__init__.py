"""The losses as functions: one folder per op, one file per implementation."""

from medfast.ops.clip.api import clip_loss
from medfast.ops.local_alignment.api import local_alignment_loss, word_patch_attention

__all__ = ["clip_loss", "local_alignment_loss", "word_patch_attention"]
