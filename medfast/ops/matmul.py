"""The matrix product that the chunked implementations spend their time in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Below this many multiplications oneDNN's set-up costs more than it saves.
_LEAST_WORK = 2**20


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` of two matrices; no gradient is recorded.

    On a CPU torch hands fp32 products to MKL, which keeps its AVX-512 code for Intel's
    processors. oneDNN, also part of torch, has no such rule: on AMD's it is twice as fast.
    """
    work = a.shape[0] * a.shape[1] * b.shape[1]
    if work >= _LEAST_WORK and a.device.type == "cpu" and a.dtype == b.dtype == torch.float32:
        onednn = _onednn_linear()
        if onednn is not None:
            return onednn(a, b.T, None, "none", [], "")
    return a @ b


def _onednn_linear() -> Callable[..., Tensor] | None:
    # An operator of torch's compiler, not of its documented interface: it may go.
    if torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available():
        return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None
