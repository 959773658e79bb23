"""What the ops cost, for `torch.utils.flop_counter.FlopCounterMode`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch


def register_flop_formulas() -> None:
    """Tell torch's flop counter what the matrix products of the global losses cost.

    Call it before a `FlopCounterMode` is made. It is called on import of `medfast.ops` where the
    counter has been imported by then; to import it for that would cost more than all of medfast.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    import medfast.ops.clip.autograd
    import medfast.ops.siglip.autograd  # noqa: F401

    for op, formula in (
        (torch.ops.medfast.clip_loss_fwd, _clip_loss_fwd),
        (torch.ops.medfast.clip_loss_bwd, _clip_loss_bwd),
        (torch.ops.medfast.siglip_loss_fwd, _siglip_loss_fwd),
    ):
        if op not in flop_registry:
            register_flop_formula(op)(formula)


def register_if_counting() -> None:
    """Register the formulas if the flop counter is loaded."""
    if "torch.utils.flop_counter" in sys.modules:
        register_flop_formulas()


# The counter passes the arguments of the op, shapes in place of tensors.


def _clip_loss_fwd(rows: Sequence[int], columns: Sequence[int], *_: Any, **__: Any) -> int:
    return _product(rows, columns)


def _clip_loss_bwd(
    d_own: Any,
    d_rows: Any,
    d_columns: Any,
    rows: Sequence[int],
    columns: Sequence[int],
    logit_scale: Any,
    offset: int,
    own: Any,
    row_lse: Any,
    column_lse: Any,
    kept: Sequence[int],
    impl: str,
    needs: list[bool],
    **_: Any,
) -> int:
    recomputed = 0 in kept
    return (recomputed + _gradient_products(needs)) * _product(rows, columns)


def _siglip_loss_fwd(
    rows: Sequence[int],
    columns: Sequence[int],
    logit_scale: Any,
    logit_bias: Any,
    offset: int,
    impl: str,
    needs: list[bool],
    **_: Any,
) -> int:
    return (1 + _gradient_products(needs)) * _product(rows, columns)


def _product(rows: Sequence[int], columns: Sequence[int]) -> int:
    return 2 * rows[0] * columns[0] * rows[1]


def _gradient_products(needs: list[bool]) -> int:
    needs_rows, needs_columns, needs_scale = needs
    return max(needs_rows + needs_columns, needs_scale)
