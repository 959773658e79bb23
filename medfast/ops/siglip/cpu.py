"""The pass of siglip_loss with csrc's kernel: sums and gradient in one walk over a tile."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast import _C
from medfast.ops.siglip.chunked import Passes, Sums


class CpuPasses(Passes):
    def negatives(self, logits: Tensor, bias: Tensor, out: Tensor | None) -> Sums:
        sums = _C.siglip_loss_pass(
            logits.data_ptr(),
            logits.stride(0),
            logits.shape[0],
            logits.shape[1],
            bias.item(),
            0 if out is None else out.data_ptr(),
            out is not None and out.dtype == torch.bfloat16,
        )
        return Sums(*sums)
