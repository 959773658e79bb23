"""The compiled passes beside their Python counterparts, in every instruction set."""

import pytest
import torch

from medfast.ops.dispatch import why_not

pytestmark = pytest.mark.skipif(
    why_not("clip_loss", "cpu") is not None, reason=str(why_not("clip_loss", "cpu"))
)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def kernels(request):
    from medfast import _C

    if request.param not in _C.instruction_sets():
        pytest.skip(f"this processor does not have {request.param}")
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield _C
    _C.use_instruction_set(before)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (64, 1024), (65, 1025), (200, 31)])
def test_sums_of_exponentials(kernels, rows, columns):
    torch.manual_seed(0)
    logits = torch.rand(rows, columns) * 120 - 20
    row_sums, column_sums = torch.full((rows,), torch.nan), torch.full((columns,), torch.nan)
    kernels.clip_loss_sums(
        logits.data_ptr(), rows, columns, 40.0, row_sums.data_ptr(), column_sums.data_ptr()
    )
    want = (logits.double() - 40).exp()
    torch.testing.assert_close(row_sums.double(), want.sum(1), rtol=2e-6, atol=0)
    torch.testing.assert_close(column_sums.double(), want.sum(0), rtol=2e-6, atol=0)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (65, 1025)])
def test_sums_of_softmaxes(kernels, rows, columns):
    torch.manual_seed(0)
    logits = torch.rand(rows, columns) * 80 - 40
    by_row, by_column = torch.rand(rows), torch.rand(columns)
    want = (logits.double() - 3).exp() * (by_row[:, None] + by_column).double()
    kernels.clip_loss_softmaxes(
        logits.data_ptr(), rows, columns, 3.0, by_row.data_ptr(), by_column.data_ptr()
    )
    # Rounding the difference to the shift, 43 at most, moves its exponential by 43 * 2^-24.
    torch.testing.assert_close(logits.double(), want, rtol=3e-6, atol=0)


def test_exponential_is_exact_to_rounding_and_clamped(kernels):
    x = torch.cat([torch.linspace(-87, 88, 200_001), torch.tensor([-1e30, 1e30, -torch.inf])])
    found = x.clone().reshape(1, -1)
    one, none = torch.ones(1), torch.zeros(len(x))
    kernels.clip_loss_softmaxes(found.data_ptr(), 1, len(x), 0.0, one.data_ptr(), none.data_ptr())
    torch.testing.assert_close(
        found[0].double(), x.double().clamp(-87, 88).exp(), rtol=1.2e-7, atol=0
    )


def test_nan_stays_nan(kernels):
    logits = torch.tensor([[0.0, torch.nan]])
    row_sums, column_sums = torch.empty(1), torch.empty(2)
    kernels.clip_loss_sums(
        logits.data_ptr(), 1, 2, 0.0, row_sums.data_ptr(), column_sums.data_ptr()
    )
    assert row_sums.isnan().all()
    assert column_sums.isnan().tolist() == [False, True]


def test_threads_do_not_change_a_bit(kernels):
    torch.manual_seed(0)
    logits = torch.randn(300, 3000)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            sums = torch.empty(300), torch.empty(3000)
            kernels.clip_loss_sums(logits.data_ptr(), 300, 3000, 0.0, *(s.data_ptr() for s in sums))
            found.append(torch.cat(sums))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_an_unknown_instruction_set_is_refused(kernels):
    with pytest.raises(ValueError, match="does not have the instruction set"):
        kernels.use_instruction_set("mmx")
