"""The matrix product in which the chunked implementations spend their time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# With fewer multiplications, oneDNN's set-up costs more than its speed saves.
_LEAST_WORK = 2**20


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` of two matrices, without a gradient.

    On x86 torch hands fp32 products to MKL, which keeps its AVX-512 code for Intel's processors.
    oneDNN, which torch also carries, has no such rule and is twice as fast on AMD's.
    """
    work = a.shape[0] * a.shape[1] * b.shape[1]
    if work >= _LEAST_WORK and a.device.type == "cpu" and a.dtype == torch.float32:
        linear = _onednn_linear()
        if linear is not None:
            return linear(a, b.T, None, "none", [], "")
    return a @ b


def _onednn_linear() -> Callable[..., Tensor] | None:
    # torch.compile emits this operator, but nothing documents it: a release may lack it.
    if torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available():
        return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None
