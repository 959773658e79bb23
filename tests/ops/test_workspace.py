import subprocess
import sys

import pytest
import torch

from medfast.ops import workspace
from medfast.ops.workspace import lend, workspace_bytes

LIKE = torch.empty(0)


@pytest.fixture(autouse=True)
def nothing_idle(monkeypatch):
    monkeypatch.setattr(workspace, "_idle", [])


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


def test_a_piece_that_does_not_suit_is_let_go():
    del_place = lend(1000, LIKE, torch.float32).data_ptr()
    assert len(workspace._idle) == 1
    small = lend(10, LIKE, torch.float32)
    assert small.data_ptr() != del_place
    assert workspace._idle == []
    assert lend(2000, LIKE, torch.float32).numel() == 2000
    del small
    assert len(workspace._idle) == 1  # one at most


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
