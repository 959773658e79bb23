"""The passes of clip_loss with csrc's kernels: one exponential per logit, one walk over a tile."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medfast import _C
from medfast.ops import matmul, tiles
from medfast.ops.clip.chunked import PANEL, KeptLogits, Passes, whole_panels

# Above this scale one shift cannot serve every row: sums may fall below what fp32 holds.
_MAX_SCALE = 150.0
# The shift leaves exponentials of e^60 at most, so sums of any batch stay far from overflow.
_HEADROOM = 60.0
# The kernel adds e^-87 < 2^-125 for a logit however low: to a sum of n terms above n 2^-102 that is
# less than 2^-23 of it, a rounding. Lower sums take the exact path.
_SMALLEST_PER_TERM = 2.0**-102
# The kernel cuts exponentials off at e^88: a sum below this holds none that was cut.
_LARGEST = math.exp(85)

# The largest logit that is kept in 16 bits: the relative error of its exponential, half a step,
# then is below 2^-9, half of what rounding the gradient to bf16 may cost.
_LARGEST_KEPT = 127.0
# One less than the highest number, as room for roundings of the logits.
_STEPS = 2**15 - 2

# Rows of features that are longer would take much memory as panels, which are as deep as they.
_MOST_BYTES = 8192


class CpuPasses(Passes):
    """Exponentials of the logits minus one constant serve rows and columns at once.

    Where the constant does not suit a tile (a huge scale, unnormalised features, a row far from
    everything) the tile takes the exact path of `Passes` instead.
    """

    def __init__(self, logit_scale: Tensor) -> None:
        self.logit_scale = logit_scale
        self.scale = logit_scale.item()
        self.shift = max(abs(self.scale) - _HEADROOM, 0.0)
        self.has_shift = abs(self.scale) <= _MAX_SCALE

    def in_steps(self, kept: Tensor, rows: Tensor, columns: Tensor) -> KeptLogits | None:
        if kept.dtype != torch.int16 or kept.numel() == 0 or not self._multiplies(rows):
            return None
        # No logit is larger (Cauchy and Schwarz).
        largest = abs(self.scale)
        for x in (tiles.operand(rows), tiles.operand(columns)):
            largest *= _C.largest_norm(x.data_ptr(), *x.shape)
        return KeptLogits(kept, largest / _STEPS) if 0 < largest <= _LARGEST_KEPT else None

    def of_features(
        self, rows: Tensor, columns: Tensor, offset: int, kept: Tensor | KeptLogits | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return own logits and log-sum-exps where csrc's products are fast and the constant suits.

        Products of 32 x 32 logits go through the exponential before the next are computed.
        """
        if not self._multiplies(rows):
            return None
        x, y = tiles.operand(rows), tiles.operand(columns)
        own = x.new_full((len(x),), -torch.inf, dtype=torch.float32)
        row_sums, column_sums = (own.new_empty(len(side)) for side in (x, y))
        _C.clip_loss_sums_of_features(
            *(x.data_ptr(), y.data_ptr(), len(x), len(y), x.shape[1]),
            *(self.scale, offset, self.shift),
            *(own.data_ptr(), row_sums.data_ptr(), column_sums.data_ptr()),
            *_address(kept, len(y)),
            is_bf16=x.dtype == torch.bfloat16,
        )
        if not _suits(row_sums, column_sums):
            return None
        return own, row_sums.log_().add_(self.shift), column_sums.log_().add_(self.shift)

    def log_sum_exps(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.has_shift:
            rows, columns = (logits.new_empty(size) for size in logits.shape)
            _C.clip_loss_sums(
                logits.data_ptr(),
                logits.stride(0),
                logits.shape[0],
                logits.shape[1],
                self.shift,
                rows.data_ptr(),
                columns.data_ptr(),
            )
            if _suits(rows, columns):
                return rows.log_().add_(self.shift), columns.log_().add_(self.shift)
        return super().log_sum_exps(logits)

    def gradients_of_features(
        self,
        d_own: Tensor,
        d_rows: Tensor,
        d_columns: Tensor,
        rows: Tensor,
        columns: Tensor,
        offset: int,
        own: Tensor,
        row_lse: Tensor,
        column_lse: Tensor,
        kept: Tensor,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        logits = self.in_steps(kept, rows, columns)
        if logits is None or not self._takes(row_lse, column_lse):
            return None
        x, y = tiles.operand(rows), tiles.operand(columns)
        row_weights = self._weights(row_lse, d_rows)
        column_weights = self._weights(column_lse, d_columns)
        d_own = d_own.contiguous()
        needs_rows, needs_columns, _ = needs
        d_x, d_y = (torch.empty_like(side) for side in (x, y))
        total = 0.0
        for is_needed, of_columns, features, gradient in (
            # Either side's yields the gradient of the scale, too.
            (needs_rows or not needs_columns, False, y, d_x),
            (needs_columns, True, x, d_y),
        ):
            if is_needed:
                total = _C.clip_loss_gradient_of_features(
                    *_address(logits, len(y)),
                    *(len(x), len(y), x.shape[1]),
                    *(self.scale, offset, self.shift),
                    *(row_weights.data_ptr(), column_weights.data_ptr(), d_own.data_ptr()),
                    *(features.data_ptr(), of_columns, gradient.data_ptr()),
                )
        d_log_scale = tiles.LogScaleGradient()
        d_log_scale.add(total, d_own, own.masked_fill(own == -torch.inf, 0))
        d_scale = d_log_scale.of_scale(self.logit_scale)
        assert d_scale is not None
        d_x, d_y, d_scale = (
            gradient if is_needed else gradient.new_empty(0)
            for gradient, is_needed in zip((d_x, d_y, d_scale), needs, strict=True)
        )
        return d_x, d_y, d_scale

    def gradient(
        self,
        logits: Tensor,
        row_lse: Tensor,
        column_lse: Tensor,
        d_rows: Tensor,
        d_columns: Tensor,
        out: Tensor,
    ) -> float | None:
        if not self._takes(row_lse, column_lse):
            return super().gradient(logits, row_lse, column_lse, d_rows, d_columns, out)
        row_weights = self._weights(row_lse, d_rows)
        column_weights = self._weights(column_lse, d_columns)
        return _C.clip_loss_gradient(
            logits.data_ptr(),
            logits.stride(0),
            logits.shape[0],
            logits.shape[1],
            self.shift,
            row_weights.data_ptr(),
            column_weights.data_ptr(),
            out.data_ptr(),
            out.dtype == torch.bfloat16,
        )

    def _multiplies(self, features: Tensor) -> bool:
        """Return whether csrc's products serve these features, and one constant their scale."""
        dtype = tiles.operand_dtype(features)
        return (
            self.has_shift
            and dtype != torch.float64
            and features.shape[1] * dtype.itemsize <= _MOST_BYTES
            and matmul.multiplies_bf16()
        )

    def _takes(self, row_lse: Tensor, column_lse: Tensor) -> bool:
        """Return whether the constant suits logits with these log-sum-exps."""
        smallest = max(len(row_lse), len(column_lse)) * _SMALLEST_PER_TERM
        lowest, highest = self.shift + math.log(smallest), self.shift + math.log(_LARGEST)
        return self.has_shift and all(_within(x, lowest, highest) for x in (row_lse, column_lse))

    def _weights(self, lse: Tensor, d_lse: Tensor) -> Tensor:
        """Return what each row, or column, multiplies its exponentials with in the gradient."""
        return torch.exp(self.shift - lse).mul_(d_lse)


def _address(kept: Tensor | KeptLogits | None, columns: int) -> tuple[int, int, float]:
    """Return where logits of so many columns are kept, the stride and the step; 0 for nowhere."""
    if kept is None:
        return 0, 0, 1.0
    if isinstance(kept, Tensor):
        return kept.data_ptr(), kept.stride(0), 1.0
    return kept.steps.data_ptr(), whole_panels(columns), kept.step


def _suits(row_sums: Tensor, column_sums: Tensor) -> bool:
    """Return whether the constant suits logits whose exponentials have these sums."""
    terms = max(len(row_sums), len(column_sums)) + PANEL - 1
    smallest = terms * _SMALLEST_PER_TERM
    return all(_within(sums, smallest, _LARGEST) for sums in (row_sums, column_sums))


def _within(values: Tensor, lowest: float, highest: float) -> bool:
    """Return whether all values are between the two; false where any is NaN."""
    low, high = values.aminmax()
    return low.item() > lowest and high.item() < highest
