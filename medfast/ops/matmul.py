"""Matrix products of the tiled implementations: written in place, summed in at least fp32."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# Below this many multiplications oneDNN's set-up costs more than it saves.
_LEAST_WORK = 2**20
# cblas.h
_ROW_MAJOR, _NO_TRANSPOSE, _TRANSPOSE = 101, 111, 112


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

    Args:
        out: [M, N], its rows contiguous.
        a: [M, K], of the dtype of `out`, or bf16 where `multiplies_bf16()`; a transpose of a
            contiguous matrix is as good as a contiguous one.
        b: [K, N], likewise.
        alpha: Factor of the product.
        accumulate: Add to `out` instead of overwriting it.

    Returns:
        `out`.
    """
    if a.dtype != out.dtype:
        return _mkl_bf16(out, a, b, alpha, accumulate)
    if out.device.type == "cpu" and out.dtype == torch.float32 and not _is_intel():
        product = matmul(a, b)
        return out.add_(product, alpha=alpha) if accumulate else torch.mul(product, alpha, out=out)
    if alpha == 1 and not accumulate:
        return torch.mm(a, b, out=out)
    return torch.addmm(out, a, b, beta=float(accumulate), alpha=alpha, out=out)


def bmm_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> Tensor:
    """Write `a @ b` of a few small matrices each to `out`, or add it; no gradient is recorded.

    MKL divides several among its threads with less ado than one.

    Args:
        out: [n, M, N], contiguous.
        a: [n, M, K], of a dtype that `matmul_into` takes.
        b: [n, K, N], likewise.
        accumulate: Add to `out` instead of overwriting it.

    Returns:
        `out`.
    """
    if len(out) == 1 or a.dtype != out.dtype or (out.device.type == "cpu" and not _is_intel()):
        for of_one, x, y in zip(out, a, b, strict=True):
            matmul_into(of_one, x, y, accumulate=accumulate)
        return out
    if accumulate:
        return torch.baddbmm(out, a, b, out=out)
    return torch.bmm(a, b, out=out)


@functools.cache
def multiplies_bf16() -> bool:
    """Return whether this CPU multiplies bf16 matrices in hardware with sums in fp32 at hand.

    torch itself rounds the result of a bf16 product to bf16. MKL does not, and its function is
    found inside torch's library, where torch was built with MKL.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    in_hardware = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return bool(in_hardware) and _is_intel() and mkl_bf16_gemm() is not None


@functools.cache
def mkl_bf16_gemm() -> Callable[..., None] | None:
    """Return MKL's product of bf16 matrices with an fp32 result, or None where torch has none."""
    folder = Path(torch.__file__).parent / "lib"
    for path in sorted(folder.glob("libtorch_cpu.*")):
        try:
            return ctypes.CDLL(str(path)).cblas_gemm_bf16bf16f32
        except (AttributeError, OSError):
            continue
    return None


def _mkl_bf16(out: Tensor, a: Tensor, b: Tensor, alpha: float, accumulate: bool) -> Tensor:
    gemm = mkl_bf16_gemm()
    assert gemm is not None  # the caller asked multiplies_bf16()
    (M, K), N = a.shape, b.shape[1]
    gemm(
        ctypes.c_int(_ROW_MAJOR),
        *(ctypes.c_int(_NO_TRANSPOSE if _is_row_major(x) else _TRANSPOSE) for x in (a, b)),
        *(ctypes.c_int(size) for size in (M, N, K)),
        ctypes.c_float(alpha),
        *(ctypes.c_void_p(a.data_ptr()), ctypes.c_int(_leading(a))),
        *(ctypes.c_void_p(b.data_ptr()), ctypes.c_int(_leading(b))),
        ctypes.c_float(accumulate),
        *(ctypes.c_void_p(out.data_ptr()), ctypes.c_int(out.stride(0))),
    )
    return out


def _is_row_major(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1


def _leading(matrix: Tensor) -> int:
    # A matrix of one row or column may have any stride there; BLAS wants a possible one.
    if _is_row_major(matrix):
        return max(matrix.stride(0), matrix.shape[1])
    return max(matrix.stride(1), matrix.shape[0])


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
