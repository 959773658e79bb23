import itertools

import pytest
import torch

from medfast.ops import matmul
from medfast.ops.matmul import bmm_into, matmul_into


@pytest.fixture(params=[True, False], ids=["intel", "other"])
def vendor(request, monkeypatch):
    """Both ways to a product, whatever the processor."""
    monkeypatch.setattr(matmul, "_is_intel", lambda: request.param)


def _operands(M, N, K, dtype):
    """Yield a [M, K] and b [K, N], each contiguous and as a transpose."""
    torch.manual_seed(0)
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    yield from itertools.product((a, a.T.contiguous().T), (b, b.T.contiguous().T))


@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 1, 1), (3, 5, 7), (1, 9, 4), (9, 1, 4), (300, 200, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_product_into_a_part_of_a_matrix(vendor, M, N, K, dtype, accumulate):
    if dtype == torch.bfloat16 and matmul.mkl_bf16_gemm() is None:
        pytest.skip("torch is built without MKL")
    for a, b in _operands(M, N, K, dtype):
        whole = torch.full((M + 1, N + 2), 3.0, dtype=torch.promote_types(dtype, torch.float32))
        out = whole[:M, :N]
        want = 0.5 * (a.double() @ b.double()) + (3 if accumulate else 0)
        if not accumulate:
            out.fill_(torch.nan)
        assert matmul_into(out, a, b, alpha=0.5, accumulate=accumulate) is out
        rtol = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(out.double(), want, rtol=rtol, atol=10 * rtol)
        assert (whole[M:] == 3).all()
        assert (whole[:, N:] == 3).all()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_several_products_at_once(vendor, count, dtype, accumulate):
    if dtype == torch.bfloat16 and matmul.mkl_bf16_gemm() is None:
        pytest.skip("torch is built without MKL")
    torch.manual_seed(0)
    a, b = torch.randn(count, 7, 5).to(dtype), torch.randn(count, 9, 7).to(dtype)
    out = torch.full((count, 5, 9), 3.0 if accumulate else torch.nan)
    want = a.float().mT @ b.float().mT + (3 if accumulate else 0)
    assert bmm_into(out, a.mT, b.mT, accumulate=accumulate) is out
    torch.testing.assert_close(out, want)


def test_bf16_products_need_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {}, raising=False)
    assert not matmul.multiplies_bf16.__wrapped__()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    monkeypatch.setattr(matmul, "_is_intel", lambda: True)
    assert matmul.multiplies_bf16.__wrapped__() == (matmul.mkl_bf16_gemm() is not None)
