import sys
import types

import pytest
import torch

from medfast.config import TrainConfig
from medfast.errors import UsageError
from medfast.optimizers import build_optimizer, learning_rate

APEX = TrainConfig(optimizer="apex_lamb")


def _parameters():
    return [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]


def test_apex_is_refused_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UsageError, match=r"--optimizer apex_lamb: NVIDIA's apex is not here"):
        build_optimizer(APEX, _parameters())


def test_pypis_apex_is_not_taken_for_nvidias(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    with pytest.raises(UsageError, match=r"PyPI's apex is another project"):
        build_optimizer(APEX, _parameters())


def test_apex_gets_the_settings(monkeypatch):
    class FusedLAMB(torch.optim.SGD):
        def __init__(self, groups, lr, betas, eps, max_grad_norm):
            super().__init__(groups, lr=lr)
            self.given = (lr, betas, eps, max_grad_norm)

    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedLAMB = FusedLAMB
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = build_optimizer(APEX, _parameters())
    # The trainer clips the gradient by --grad-clip-norm.
    assert made.given == (APEX.lr, (APEX.beta1, APEX.beta2), APEX.eps, float("inf"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="torch finds no GPU"):
        build_optimizer(APEX, _parameters())


def test_frozen_parameters_are_left_out():
    matrix, vector = _parameters()
    matrix.requires_grad_(False)
    groups = build_optimizer(TrainConfig(), [matrix, vector]).param_groups
    assert [p for group in groups for p in group["params"]] == [vector]


def test_the_rate_warms_up_then_falls_to_zero():
    config = TrainConfig(lr=1.0, warmup=4)
    rates = [learning_rate(config, step, 20) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[12] == pytest.approx(0.5)
    assert rates[20] == pytest.approx(0)
    assert sorted(rates[4:], reverse=True) == rates[4:]
