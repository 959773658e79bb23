"""Matrix products of the tiled implementations: written in place, summed in at least fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

try:
    from medfast import _C
except ImportError:  # built without
    _C = None  # type: ignore[assignment]

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


def matmul_into(
    out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, accumulate: bool = False
) -> Tensor:
    """Write `alpha * a @ b` to `out`, or add it; no gradient is recorded.

    Writing to memory that is there saves a CPU the page faults of a fresh tensor, half of the
    time of a product of this library's shapes.

    Where `multiplies_bf16()`, csrc multiplies fp32, too: each entry as the sum of three of bf16,
    with smaller errors than torch's product and in less time. An entry of the result then does not
    depend on the size of the matrices.

    Args:
        out: [M, N], its rows contiguous.
        a: [M, K], of the dtype of `out`; or bf16 where `multiplies_bf16()`, while `out` is of fp32.
            A transpose of a contiguous matrix is as good as a contiguous one.
        b: [K, N], likewise.
        alpha: Factor of the product.
        accumulate: Add to `out` instead of overwriting it.

    Returns:
        `out`.
    """
    if a.dtype != out.dtype or (_is_fp32_on_cpu(out) and multiplies_bf16()):
        _products(out[None], a[None], b[None], alpha, accumulate)
        return out
    return _by_torch(out, a, b, alpha, accumulate)


def bmm_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> Tensor:
    """Write `a @ b` of a few small matrices each to `out`, or add it.

    No gradient is recorded.

    Several are divided among threads with less ado than one. Of fp32 torch's are the faster.

    Args:
        out: [n, M, N], its rows contiguous, of a dtype that `matmul_into` takes.
        a: [n, M, K], likewise.
        b: [n, K, N], likewise.
        accumulate: Add to `out` instead of overwriting it.

    Returns:
        `out`.
    """
    if a.dtype == torch.bfloat16:
        _products(out, a, b, 1.0, accumulate)
        return out
    if len(out) == 1 or (out.device.type == "cpu" and not _is_intel()):
        for of_one, x, y in zip(out, a, b, strict=True):
            _by_torch(of_one, x, y, 1.0, accumulate)
        return out
    if not accumulate:
        return torch.bmm(a, b, out=out)
    return torch.baddbmm(out, a, b, out=out)


def multiplies_bf16() -> bool:
    """Return whether bf16 matrices are multiplied as such, with sums in fp32, and fast.

    torch itself rounds the result of a bf16 product to bf16.
    """
    return _C is not None and _C.multiplies_bf16()


def _by_torch(out: Tensor, a: Tensor, b: Tensor, alpha: float, accumulate: bool) -> Tensor:
    if _is_fp32_on_cpu(out) and not _is_intel():
        product = matmul(a, b)
        return out.add_(product, alpha=alpha) if accumulate else torch.mul(product, alpha, out=out)
    if alpha == 1 and not accumulate:
        return torch.mm(a, b, out=out)
    return torch.addmm(out, a, b, beta=float(accumulate), alpha=alpha, out=out)


def _is_fp32_on_cpu(out: Tensor) -> bool:
    return out.device.type == "cpu" and out.dtype == torch.float32


def _products(out: Tensor, a: Tensor, b: Tensor, alpha: float, accumulate: bool) -> None:
    assert _C is not None
    (count, M, K), N = a.shape, b.shape[2]
    _C.product(
        *(count, M, N, K),
        *(a.data_ptr(), a.stride(), b.data_ptr(), b.stride()),
        *(alpha, accumulate, out.data_ptr(), out.stride()[:2]),
        is_bf16=a.dtype == torch.bfloat16,
    )


@functools.cache
def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _onednn_linear() -> Callable[..., Tensor] | None:
    # An operator of torch's compiler, not of its documented interface: it may go.
    if torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available():
        return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None
