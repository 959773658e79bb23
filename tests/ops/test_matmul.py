import itertools

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


def test_bf16_products_need_the_kernels(monkeypatch):
    monkeypatch.setattr(matmul, "_C", None)
    assert not matmul.multiplies_bf16()


def test_bf16_is_fast_with_amx(kernels):
    assert matmul.multiplies_bf16() == (kernels.instruction_set() == "amx")


def _multiply(out, a, b, accumulate=False):
    """csrc's product, which `matmul_into` leaves to torch where it does not pay."""
    matmul._products(out, a, b, 1.0, accumulate)


_DTYPES = [torch.bfloat16, torch.float32]


# One of everything; parts of a tile, a panel and a step of its depth, and one more than each;
# depths that are summed in one go, and more; blocks of rows and of columns.
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize(
    ("count", "M", "N", "K"),
    [
        *((1, n, n, n) for n in (1, 2, 15, 16, 17, 31, 32, 33, 63, 65)),
        *((1, 20, 40, K) for K in (511, 512, 513, 1030)),
        *((1, M, 3, 5) for M in (256, 257, 600)),
        *((1, 3, N, 5) for N in (127, 129, 511, 513, 2048, 2049, 4100)),
        *((n, 33, 17, 40) for n in (2, 3, 9)),
    ],
)
def test_own_products_of_any_size(kernels, dtype, count, M, N, K):
    torch.manual_seed(M + N + K)
    a = torch.randn(count, M, K).to(dtype)
    b = torch.randn(count, K, N).to(dtype)
    # Every other row of a wider one: neither side of these is contiguous.
    sparse = torch.randn(count, 2 * M, 2 * K).to(dtype)[:, ::2, ::2]
    for x, y in [
        *itertools.product((a, a.mT.contiguous().mT), (b, b.mT.contiguous().mT)),
        (sparse, b),
    ]:
        whole = torch.full((M, count, N + 3), torch.nan)
        out = whole[:, :, 1 : N + 1].transpose(0, 1)
        want = x.double() @ y.double()
        _multiply(out, x, y)
        # Roundings of sums in fp32.
        bound = 5e-7 * (x.double().abs() @ y.double().abs())
        assert ((out - want).abs() <= bound).all()
        _multiply(out, x, y, accumulate=True)
        assert ((out - 2 * want).abs() <= 2 * bound).all()
        assert whole[:, :, [0, N + 1, N + 2]].isnan().all()


def test_fp32_products_lose_no_bit_of_an_operand(kernels):
    """Products of two numbers, with all bits in use: without any of its six terms this fails."""
    torch.manual_seed(0)
    a, b = (torch.rand(shape) * 10.0 ** torch.randint(-9, 9, shape) for shape in ((64, 1), (1, 96)))
    out = torch.empty(1, 64, 96)
    _multiply(out, a[None], b[None])
    want = a.double() * b.double()
    assert ((out[0] - want).abs() / want).max() < 2**-22


@pytest.mark.parametrize("dtype", _DTYPES)
def test_fp32_products_are_as_precise_as_those_of_torch(kernels, dtype):
    torch.manual_seed(0)
    a = torch.nn.functional.normalize(torch.randn(100, 512)).to(dtype)
    out = torch.empty(1, 100, 100)
    _multiply(out, a[None], a.T[None])
    want = a.double() @ a.double().T
    theirs = a.float() @ a.float().T
    assert (out[0] - want).norm() <= 1.5 * (theirs - want).norm()


@pytest.mark.parametrize("dtype", _DTYPES)
def test_own_products_do_not_depend_on_the_number_of_threads(kernels, dtype):
    torch.manual_seed(0)
    a, b = torch.randn(1, 300, 700).to(dtype), torch.randn(1, 700, 600).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.empty(1, 300, 600))
            _multiply(found[-1], a, b)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", _DTYPES)
def test_an_entry_of_own_products_does_not_depend_on_the_size(kernels, dtype):
    """Ranks compare an item's score with another's from a tile of another shape."""
    torch.manual_seed(0)
    a, b = torch.randn(1, 300, 600).to(dtype), torch.randn(1, 600, 2100).to(dtype)
    whole = torch.empty(1, 300, 2100)
    _multiply(whole, a, b)
    for rows, columns in ((slice(299, 300), slice(2099, 2100)), (slice(5, 40), slice(3, 700))):
        part = torch.empty(1, rows.stop - rows.start, columns.stop - columns.start)
        _multiply(part, a[:, rows], b[..., columns])
        assert torch.equal(part, whole[:, rows, columns])


@pytest.mark.parametrize("dtype", _DTYPES)
def test_own_products_pass_on_what_is_not_finite(kernels, dtype):
    a, b = torch.ones(1, 40, 50).to(dtype), torch.ones(1, 50, 60).to(dtype)
    a[0, 3, 7], a[0, 35, 49], b[0, 11, 59] = torch.nan, torch.inf, -torch.inf
    out = torch.empty(1, 40, 60)
    _multiply(out, a, b)
    want = a.float() @ b.float()
    assert torch.equal(out.isfinite(), want.isfinite())
    assert out[0, 3].isnan().all()
    if dtype == torch.bfloat16:  # of fp32, infinity less its first term is NaN
        torch.testing.assert_close(out, want, equal_nan=True)


# Payloads of NaN, at which adding to the bits overflows or leaves infinity.
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1])
def test_no_nan_is_lost_in_fp32(kernels, bits):
    a = torch.tensor([[[bits]]], dtype=torch.int32).view(torch.float32)
    out = torch.empty(1, 1, 1)
    _multiply(out, a, torch.ones(1, 1, 1))
    assert out.isnan()


@pytest.mark.parametrize("is_fast", [False, True])
def test_fp32_is_multiplied_where_that_is_fast(monkeypatch, kernels, is_fast):
    monkeypatch.setattr(matmul, "multiplies_bf16", lambda: is_fast)
    torch.manual_seed(0)
    a, b = torch.randn(70, 90), torch.randn(90, 50)
    own = torch.empty(1, 70, 50)
    _multiply(own, a[None], b[None])
    found = matmul_into(torch.empty(70, 50), a, b)
    assert torch.equal(found, own[0]) == is_fast
    # Of those that come in batches, each is too small, even if it comes alone.
    for count in (1, 2):
        several = torch.empty(count, 70, 50)
        bmm_into(several, a.expand(count, -1, -1), b.expand(count, -1, -1))
        assert not torch.equal(several[0], own[0])


def test_torch_still_multiplies_bf16_beside_ours(kernels):
    """Both configure the same tile registers, and neither may find them as the other left them."""
    torch.manual_seed(0)
    a, b = torch.randn(64, 96).bfloat16(), torch.randn(96, 80).bfloat16()
    want = a @ b
    for _ in range(3):
        matmul_into(torch.empty(64, 80), a, b)
        assert torch.equal(a @ b, want)
