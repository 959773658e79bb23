import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medfast.ops import clip_loss, register_flop_formulas, siglip_loss

B, D = 65, 16
PRODUCT = 2 * B * B * D


def _count(fn, needs):
    register_flop_formulas()
    features = [torch.randn(B, D).requires_grad_(need) for need in needs]
    with FlopCounterMode(display=False) as counter:
        fn(*features).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize(("workspace", "recomputed"), [("256", 0), ("0.01", 1)])
def test_clip_loss_costs_one_product_forward_and_two_or_three_backward(
    monkeypatch, impl, workspace, recomputed
):
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", workspace)
    loss = lambda x, y: clip_loss(x, y, 14.3, impl=impl)  # noqa: E731
    assert _count(loss, [True, True]) == (3 + recomputed) * PRODUCT
    assert _count(loss, [True, False]) == (2 + recomputed) * PRODUCT


def test_siglip_loss_costs_three_products():
    loss = lambda x, y: siglip_loss(x, y, 10.0, -10.0)  # noqa: E731
    assert _count(loss, [True, True]) == 3 * PRODUCT
    assert _count(loss, [False, True]) == 2 * PRODUCT


def test_formulas_are_there_if_the_counter_was_imported_first():
    code = (
        "import torch; from torch.utils.flop_counter import flop_registry; import medfast.ops;"
        "assert torch.ops.medfast.clip_loss_fwd in flop_registry"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_counter_is_not_imported_for_it():
    code = "import sys, medfast.ops; sys.exit('torch.utils.flop_counter' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
