"""What crosses ranks: losses over the pairs of all of them, without gathering features.

A rank keeps its own images. The texts of the others come by on a ring, block by block, and in the
backward their gradient comes by with them, so that no rank ever holds the features of all; only
small ones are gathered, or all on request. Letters: B pairs of a rank, N pairs of all ranks.
"""

from medfast.distributed.global_losses import clip_loss, cyclip_loss, siglip_loss, simclr_loss
from medfast.distributed.local_losses import filip_loss, local_alignment_loss, sparc_loss
from medfast.distributed.ring import Ring

__all__ = [
    "Ring",
    "clip_loss",
    "cyclip_loss",
    "filip_loss",
    "local_alignment_loss",
    "siglip_loss",
    "simclr_loss",
    "sparc_loss",
]
