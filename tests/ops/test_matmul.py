import itertools
import sys

import pytest
import torch

from medfast.ops import matmul
from medfast.ops.dispatch import why_not
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
    if dtype == torch.bfloat16 and why_not("clip_loss", "cpu") is not None:
        pytest.skip(why_not("clip_loss", "cpu"))
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
    if dtype == torch.bfloat16 and why_not("clip_loss", "cpu") is not None:
        pytest.skip(why_not("clip_loss", "cpu"))
    torch.manual_seed(0)
    a, b = torch.randn(count, 7, 5).to(dtype), torch.randn(count, 9, 7).to(dtype)
    out = torch.full((count, 5, 9), 3.0 if accumulate else torch.nan)
    want = a.float().mT @ b.float().mT + (3 if accumulate else 0)
    assert bmm_into(out, a.mT, b.mT, accumulate=accumulate) is out
    torch.testing.assert_close(out, want)


def test_bf16_products_need_the_kernels_and_the_hardware(monkeypatch):
    monkeypatch.setitem(sys.modules, "medfast._C", None)
    monkeypatch.delattr("medfast._C", raising=False)
    assert not matmul.multiplies_bf16.__wrapped__()


def test_bf16_is_fast_with_amx(kernels):
    assert matmul.multiplies_bf16.__wrapped__() == (kernels.instruction_set() == "amx")


# One of everything; parts of a tile, a panel and a step of its depth, and one more than each;
# depths that are summed in one go, and more; blocks of rows and of columns.
@pytest.mark.parametrize(
    ("count", "M", "N", "K"),
    [
        *((1, n, n, n) for n in (1, 2, 15, 16, 17, 31, 32, 33, 63, 65)),
        *((1, 20, 40, K) for K in (511, 512, 513, 1030)),
        *((1, M, 3, 5) for M in (256, 257, 600)),
        *((1, 3, N, 5) for N in (511, 513, 2048, 2049, 4100)),
        *((n, 33, 17, 40) for n in (2, 3, 9)),
    ],
)
def test_bf16_products_of_any_size(kernels, count, M, N, K):
    torch.manual_seed(M + N + K)
    a = torch.randn(count, M, K).bfloat16()
    b = torch.randn(count, K, N).bfloat16()
    # Every other row of a wider one: neither side of these is contiguous.
    sparse = torch.randn(count, 2 * M, 2 * K).bfloat16()[:, ::2, ::2]
    for x, y in [
        *itertools.product((a, a.mT.contiguous().mT), (b, b.mT.contiguous().mT)),
        (sparse, b),
    ]:
        whole = torch.full((M, count, N + 3), torch.nan)
        out = whole[:, :, 1 : N + 1].transpose(0, 1)
        want = x.double() @ y.double()
        assert bmm_into(out, x, y) is out
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5 * K**0.5)
        bmm_into(out, x, y, accumulate=True)
        torch.testing.assert_close(out.double(), 2 * want, rtol=1e-5, atol=2e-5 * K**0.5)
        assert whole[:, :, [0, N + 1, N + 2]].isnan().all()


def test_bf16_products_do_not_depend_on_the_number_of_threads(kernels):
    torch.manual_seed(0)
    a, b = torch.randn(300, 700).bfloat16(), torch.randn(700, 600).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(matmul_into(torch.empty(300, 600), a, b))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_bf16_products_pass_on_what_is_not_finite(kernels):
    a, b = torch.ones(40, 50).bfloat16(), torch.ones(50, 60).bfloat16()
    a[3, 7], a[35, 49], b[11, 59] = torch.nan, torch.inf, -torch.inf
    out = matmul_into(torch.empty(40, 60), a, b)
    torch.testing.assert_close(out, a.float() @ b.float(), equal_nan=True)


def test_torch_still_multiplies_bf16_beside_ours(kernels):
    """Both configure the same tile registers, and neither may find them as the other left them."""
    torch.manual_seed(0)
    a, b = torch.randn(64, 96).bfloat16(), torch.randn(96, 80).bfloat16()
    want = a @ b
    for _ in range(3):
        matmul_into(torch.empty(64, 80), a, b)
        assert torch.equal(a @ b, want)
