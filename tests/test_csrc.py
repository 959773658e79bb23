"""The compiled passes beside their Python counterparts, in every instruction set."""

import math
import platform

import pytest
import torch
import torch.nn.functional as F

from medfast.ops.dispatch import why_not

pytestmark = pytest.mark.skipif(
    why_not("clip_loss", "cpu") is not None, reason=str(why_not("clip_loss", "cpu"))
)


def _sums(kernels, logits, shift):
    row_sums, column_sums = (torch.full((n,), torch.nan) for n in logits.shape)
    kernels.clip_loss_sums(
        *(logits.data_ptr(), logits.stride(0), *logits.shape, shift),
        *(row_sums.data_ptr(), column_sums.data_ptr()),
    )
    return row_sums, column_sums


def _gradient(kernels, logits, shift, by_row, by_column, dtype=torch.float32):
    found = torch.full(logits.shape, torch.nan, dtype=dtype)
    total = kernels.clip_loss_gradient(
        *(logits.data_ptr(), logits.stride(0), *logits.shape, shift),
        *(by_row.data_ptr(), by_column.data_ptr(), found.data_ptr(), dtype == torch.bfloat16),
    )
    return found, total


def _no_steps(M, N):
    """Memory for kept steps: panels of 32 x 32."""
    return torch.zeros(-(-M // 32), -(-N // 32), 32, 32, dtype=torch.int16)


def _in_rows(kept):
    """Kept steps as a matrix, with what is beyond the last row and column."""
    return kept.transpose(1, 2).reshape(kept.shape[0] * 32, -1)


def _inside(tile):
    """The same tile as a part of a larger matrix."""
    larger = torch.full((tile.shape[0], tile.shape[1] + 5), torch.nan)
    larger[:, : tile.shape[1]] = tile
    return larger[:, : tile.shape[1]]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (64, 1024), (65, 1025), (200, 31)])
def test_sums_of_exponentials(kernels, rows, columns):
    torch.manual_seed(0)
    logits = torch.rand(rows, columns) * 120 - 20
    want = (logits.double() - 40).exp()
    for tile in (logits, _inside(logits)):
        row_sums, column_sums = _sums(kernels, tile, 40.0)
        torch.testing.assert_close(row_sums.double(), want.sum(1), rtol=2e-6, atol=0)
        torch.testing.assert_close(column_sums.double(), want.sum(0), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (65, 1025)])
def test_gradient_of_log_sum_exps(kernels, rows, columns, dtype):
    torch.manual_seed(0)
    logits = torch.rand(rows, columns) * 80 - 40
    by_row, by_column = torch.randn(rows), torch.rand(columns)
    want = (logits.double() - 3).exp() * (by_row[:, None] + by_column).double()
    for tile in (logits, _inside(logits)):
        found, total = _gradient(kernels, tile, 3.0, by_row, by_column, dtype)
        # Rounding the difference to the shift, 43 at most, moves its exponential by 43 * 2^-24.
        rtol = 3e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(found.double(), want, rtol=rtol, atol=0)
        terms = want * logits
        assert abs(total - terms.sum()) < 1e-5 * terms.abs().sum()


def test_own_entries_do_not_enter_the_total(kernels):
    logits = torch.tensor([[-torch.inf, 2.0]])
    found, total = _gradient(kernels, logits, 0.0, torch.ones(1), torch.zeros(2))
    assert total == pytest.approx(2 * math.exp(2))
    assert found[0, 0] < 1e-37


def test_bf16_is_rounded_to_nearest_even(kernels):
    weights = torch.cat([torch.randn(100_000), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.nan])])
    logits = torch.zeros(1, len(weights))
    found, _ = _gradient(kernels, logits, 0.0, torch.zeros(1), weights, torch.bfloat16)
    torch.testing.assert_close(found[0], weights.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_exponential_is_exact_to_rounding_and_clamped(kernels):
    x = torch.cat([torch.linspace(-87, 88, 200_001), torch.tensor([-1e30, 1e30, -torch.inf])])
    found, _ = _gradient(kernels, x.reshape(1, -1), 0.0, torch.ones(1), torch.zeros(len(x)))
    torch.testing.assert_close(
        found[0].double(), x.double().clamp(-87, 88).exp(), rtol=1.2e-7, atol=0
    )


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only done on x86")
def test_results_too_small_for_full_precision_are_zero_inside_kernels_alone(kernels):
    # As denormals each of them would take a hundred times as long.
    found, _ = _gradient(
        kernels, torch.full((1, 40), -80.0), 0.0, torch.full((1,), 1e-6), torch.zeros(40)
    )
    assert (found == 0).all()
    assert torch.tensor([1e-38]) * 1e-3 > 0


def _sigmoids(kernels, logits, bias, dtype=torch.float32):
    found = torch.full(logits.shape, torch.nan, dtype=dtype)
    sums = kernels.siglip_loss_pass(
        *(logits.data_ptr(), logits.stride(0), *logits.shape, bias),
        *(found.data_ptr(), dtype == torch.bfloat16),
    )
    return found, torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (65, 1025)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_sigmoid_losses_of_negatives(kernels, rows, columns, dtype, spread):
    torch.manual_seed(0)
    logits = torch.randn(rows, columns) * spread
    t = logits.double() - 2
    want = torch.stack([F.softplus(t).sum(), t.sigmoid().sum(), (t.sigmoid() * logits).sum()])
    for tile in (logits, _inside(logits)):
        found, sums = _sigmoids(kernels, tile, -2.0, dtype)
        # Rounding t, 130 at most, moves its exponential by 130 * 2^-24.
        rtol = 8e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(found.double(), t.sigmoid(), rtol=rtol, atol=1e-37)
        assert ((sums - want).abs() <= 1e-5 * (t.sigmoid() * logits).abs().sum() + 1e-6).all()


def test_softplus_keeps_its_relative_error_where_it_is_tiny(kernels):
    for t in (-80.0, -30.0, -17.0, -1e-3, 0.0, 1e-3, 17.0, 80.0):
        _, sums = _sigmoids(kernels, torch.tensor([[t]]), 0.0)
        want = F.softplus(torch.tensor(t, dtype=torch.float64), threshold=1e9)
        torch.testing.assert_close(sums[0], want, rtol=5e-7, atol=0)


def test_nan_stays_nan(kernels):
    logits = torch.tensor([[0.0, torch.nan]])
    row_sums, column_sums = _sums(kernels, logits, 0.0)
    assert row_sums.isnan().all()
    assert column_sums.isnan().tolist() == [False, True]
    found, sums = _sigmoids(kernels, logits, 0.0)
    assert found.isnan().tolist() == [[False, True]]
    assert sums.isnan().all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (65, 1025)])
def test_counts_of_what_is_not_below(kernels, rows, columns):
    torch.manual_seed(0)
    scores = torch.randint(-3, 4, (rows, columns)).float()
    scores[0, -1] = torch.nan
    by_row, by_column = (
        torch.randint(-3, 4, (rows,)).float(),
        torch.randint(-3, 4, (columns,)) + 0.0,
    )
    for tile in (scores, _inside(scores)):
        row_counts, column_counts = torch.ones(rows).long(), torch.ones(columns).long()
        pointers = (by_row.data_ptr(), by_column.data_ptr())
        kernels.retrieval_rank_counts(
            *(tile.data_ptr(), tile.stride(0), rows, columns, *pointers),
            *(row_counts.data_ptr(), column_counts.data_ptr()),
        )
        assert torch.equal(row_counts, 1 + (~(scores < by_row[:, None])).sum(1))
        assert torch.equal(column_counts, 1 + (~(scores < by_column)).sum(0))
        kernels.retrieval_rank_counts(
            *(tile.data_ptr(), tile.stride(0), rows, columns, by_row.data_ptr(), 0),
            *(row_counts.data_ptr(), 0),
        )
        assert torch.equal(row_counts, 1 + 2 * (~(scores < by_row[:, None])).sum(1))


def test_threads_do_not_change_a_bit(kernels):
    torch.manual_seed(0)
    logits = torch.randn(300, 3000)
    weights = torch.rand(300), torch.rand(3000)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            gradient, total = _gradient(kernels, logits, 0.0, *weights)
            _, sums = _sigmoids(kernels, logits, 0.0)
            outputs = (
                *_sums(kernels, logits, 0.0),
                gradient.flatten(),
                torch.tensor([total]),
                sums,
            )
            found.append(torch.cat([x.double() for x in outputs]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("M", "N", "D"), [(1, 1, 1), (2, 5, 3), (31, 33, 64), (129, 40, 65), (40, 4100, 30)]
)
@pytest.mark.parametrize("offset", [0, 7, -5, 5000])
@pytest.mark.parametrize("scale", [20.0, -3.0])
def test_sums_of_features_are_those_of_their_logits(kernels, M, N, D, offset, scale):
    torch.manual_seed(M + N)
    rows, columns = (F.normalize(torch.randn(n, D), dim=1).bfloat16() for n in (M, N))
    shift, step = 5.0, 25 / 32766
    own, row_sums, column_sums = (torch.full((n,), torch.nan) for n in (M, M, N))
    own.fill_(-torch.inf)
    kept = _no_steps(M, N)
    kernels.clip_loss_sums_of_features(
        *(rows.data_ptr(), columns.data_ptr(), M, N, D, scale, offset, shift),
        *(own.data_ptr(), row_sums.data_ptr(), column_sums.data_ptr()),
        *(kept.data_ptr(), kept.shape[1] * 32, step),
        is_bf16=True,
    )
    logits = scale * rows.double() @ columns.double().T
    is_own = torch.arange(M)[:, None] + offset == torch.arange(N)
    for i, j in is_own.nonzero().tolist():
        assert own[i] == pytest.approx(logits[i, j].item(), rel=1e-5, abs=1e-5)
    assert (own == -torch.inf).sum() == M - is_own.sum()
    exponentials = (logits - shift).exp().masked_fill(is_own, 0)
    torch.testing.assert_close(row_sums.double(), exponentials.sum(1), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(column_sums.double(), exponentials.sum(0), rtol=1e-5, atol=1e-30)
    steps = _in_rows(kept)
    assert (steps[M:] == 0).all()
    assert (steps[:, N:] == 0).all()
    assert (steps[:M, :N][is_own] == -(2**15)).all()
    distance = (steps[:M, :N].double() * step - logits).masked_fill(is_own, 0).abs()
    assert distance.max() <= step / 2 + 1e-4


@pytest.mark.parametrize(
    ("M", "N", "D"),
    [(1, 1, 1), (2, 5, 3), (31, 33, 64), (129, 40, 65), (300, 530, 30), (40, 9, 515)],
)
@pytest.mark.parametrize("offset", [0, 7, -5, 5000])
def test_gradient_of_features_from_kept_logits(kernels, M, N, D, offset):
    torch.manual_seed(M + N)
    rows, columns = (F.normalize(torch.randn(n, D), dim=1).bfloat16() for n in (M, N))
    scale, shift, step = 20.0, 5.0, 20.1 / 32766
    # Whatever is kept beyond the last row and column.
    kept = torch.randint_like(_no_steps(M, N), -(2**15), 2**15 - 1)
    unused = [torch.full((n,), -torch.inf) for n in (M, M, N)]
    kernels.clip_loss_sums_of_features(
        *(rows.data_ptr(), columns.data_ptr(), M, N, D, scale, offset, shift),
        *(*(x.data_ptr() for x in unused), kept.data_ptr(), kept.shape[1] * 32, step),
        is_bf16=True,
    )
    by_row, by_column, own = torch.rand(M) - 0.5, torch.rand(N), torch.randn(M)

    is_own = torch.arange(M)[:, None] + offset == torch.arange(N)
    logits = (_in_rows(kept)[:M, :N].double() * step).masked_fill(is_own, 0)
    weights = (logits - shift).exp() * (by_row[:, None] + by_column)
    weights.masked_fill_(is_own, 0)
    terms = weights * logits
    weights += is_own * own[:, None].double()
    for of_columns, features, other, w in (
        (False, rows, columns, weights),
        (True, columns, rows, weights.T),
    ):
        found = torch.full_like(features, torch.nan)
        total = kernels.clip_loss_gradient_of_features(
            *(kept.data_ptr(), kept.shape[1] * 32, step, M, N, D, scale, offset, shift),
            *(by_row.data_ptr(), by_column.data_ptr(), own.data_ptr()),
            *(other.data_ptr(), of_columns, found.data_ptr()),
        )
        assert abs(total - terms.sum()) <= 1e-5 * terms.abs().sum()
        # Weights and the result are rounded to bf16.
        allowed = 1.01 * 2.0**-7 * scale * (w.abs() @ other.double().abs()) + 1e-30
        assert ((found.double() - scale * w @ other.double()).abs() <= allowed).all()


@pytest.mark.parametrize("offset", [0, 7])
def test_fp32_keeps_the_logits_as_they_are(kernels, offset):
    torch.manual_seed(0)
    M, N, D, shift, stride = 129, 70, 65, 5.0, 73
    rows, columns = (F.normalize(torch.randn(n, D), dim=1) for n in (M, N))
    own, row_sums, column_sums = (torch.full((n,), -torch.inf) for n in (M, M, N))
    kept = torch.zeros(M, stride)
    kernels.clip_loss_sums_of_features(
        *(rows.data_ptr(), columns.data_ptr(), M, N, D, 20.0, offset, shift),
        *(own.data_ptr(), row_sums.data_ptr(), column_sums.data_ptr()),
        *(kept.data_ptr(), stride, 1.0),
        is_bf16=False,
    )
    logits = 20.0 * rows.double() @ columns.double().T
    is_own = torch.arange(M)[:, None] + offset == torch.arange(N)
    torch.testing.assert_close(own[is_own.any(1)].double(), logits[is_own], rtol=1e-6, atol=1e-5)
    exponentials = (logits - shift).exp().masked_fill(is_own, 0)
    torch.testing.assert_close(row_sums.double(), exponentials.sum(1), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(column_sums.double(), exponentials.sum(0), rtol=1e-5, atol=1e-30)
    assert (kept[:, N:] == 0).all()
    want = logits.masked_fill(is_own, -torch.inf)
    torch.testing.assert_close(kept[:, :N].double(), want, rtol=1e-6, atol=1e-5)


def _gradients_of_kept(kernels, rows, columns):
    (M, D), N = rows.shape, len(columns)
    torch.manual_seed(0)
    kept = torch.randint_like(_no_steps(M, N), -1000, 1000)
    weights = torch.rand(M), torch.rand(N), torch.rand(M)
    for other, of_columns in ((columns, False), (rows, True)):
        gradient = torch.empty(N if of_columns else M, D, dtype=torch.bfloat16)
        total = kernels.clip_loss_gradient_of_features(
            *(kept.data_ptr(), kept.shape[1] * 32, 0.01, M, N, D, 20.0, 0, 0.0),
            *(*(x.data_ptr() for x in weights), other.data_ptr(), of_columns, gradient.data_ptr()),
        )
        yield gradient.float().flatten()
        yield torch.tensor([total])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_of_features_do_not_depend_on_the_number_of_threads(kernels, dtype):
    torch.manual_seed(0)
    rows, columns = (F.normalize(torch.randn(n, 40), dim=1).to(dtype) for n in (1100, 300))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums = [torch.empty(n) for n in (1100, 1100, 300)]
            kernels.clip_loss_sums_of_features(
                *(rows.data_ptr(), columns.data_ptr(), 1100, 300, 40, 20.0, 0, 0.0),
                *(x.data_ptr() for x in sums),
                is_bf16=dtype == torch.bfloat16,
            )
            found.append(torch.cat(sums[1:]))
            if dtype == torch.bfloat16:
                found[-1] = torch.cat([found[-1], *_gradients_of_kept(kernels, rows, columns)])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_an_unknown_instruction_set_is_refused(kernels):
    with pytest.raises(ValueError, match="does not have the instruction set"):
        kernels.use_instruction_set("mmx")
