import subprocess
import sys

import pytest
import torch

from medfast.ops import workspace
from medfast.ops.workspace import lend, workspace_bytes

LIKE = torch.empty(0)


@pytest.fixture(autouse=True)
def nothing_idle(monkeypatch):
    monkeypatch.setattr(workspace, "_idle", {})


def test_memory_is_lent_again_when_the_last_reference_goes():
    loan = lend(1000, LIKE, torch.float32)
    assert loan.shape == (1000,)
    assert loan.dtype == torch.float32
    place = loan.data_ptr()
    view = loan.view(10, 100)[3:]
    del loan
    other = lend(1000, LIKE, torch.float32)
    assert other.data_ptr() != place
    del view
    assert lend(900, LIKE, torch.float32).data_ptr() == place


def test_two_loans_never_share_memory():
    loans = [lend(1000, LIKE, torch.float32).fill_(k) for k in range(3)]
    del loans[1]
    loans += [lend(1000, LIKE, torch.float32).fill_(k) for k in (3, 4)]
    assert [loan.unique().tolist() for loan in loans] == [[0], [2], [3], [4]]


def test_loans_of_several_sizes_find_their_memory_again():
    sizes = [1000, 3000, 5000]
    loans = [lend(size, LIKE, torch.float32) for size in sizes]
    places = [loan.data_ptr() for loan in loans]
    del loans
    again = [lend(size, LIKE, torch.float32) for size in reversed(sizes)]
    assert [loan.data_ptr() for loan in reversed(again)] == places
    del again
    # The smallest that suits, and none that is much too large.
    assert lend(2000, LIKE, torch.float32).data_ptr() == places[1]
    assert lend(400, LIKE, torch.float32).data_ptr() not in places


def test_what_waits_is_no_more_than_the_workspace(monkeypatch):
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", str(10_000 / 2**20))
    loans = [lend(1000, LIKE, torch.float32) for _ in range(3)]
    places = [loan.data_ptr() for loan in loans]
    while loans:
        del loans[0]
    assert list(workspace._idle) == places[1:]  # two of 4,000 bytes, the last ones
    # Memory that is new counts: what has waited longest goes.
    other = lend(400, LIKE, torch.float32)
    assert list(workspace._idle) == places[1:]
    larger = lend(2200, LIKE, torch.float32)
    assert workspace._idle == {}
    assert larger.data_ptr() != other.data_ptr()


def test_no_memory_for_nothing():
    assert lend(0, LIKE, torch.float64).shape == (0,)
    assert lend(4, LIKE.to("meta"), torch.float32).device.type == "meta"


def test_a_loan_may_outlive_the_interpreter():
    code = (
        "import torch; from medfast.ops.workspace import lend;"
        "torch.kept = lend(10**6, torch.empty(0), torch.float32).fill_(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("value", ["0", "-3", "nan", "inf", "much"])
def test_a_wrong_size_is_named(monkeypatch, value):
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", value)
    with pytest.raises(ValueError, match=f"MEDFAST_WORKSPACE_MB must be a positive.*'{value}'"):
        workspace_bytes()
