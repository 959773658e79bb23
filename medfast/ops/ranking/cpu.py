"""The pass of retrieval_rank with csrc's kernel: both directions in one walk over a tile."""

from __future__ import annotations

from torch import Tensor

from medfast import _C
from medfast.ops.ranking.chunked import Passes


class CpuPasses(Passes):
    def count(
        self,
        scores: Tensor,
        row_thresholds: Tensor,
        row_counts: Tensor,
        column_thresholds: Tensor | None = None,
        column_counts: Tensor | None = None,
    ) -> None:
        _C.retrieval_rank_counts(
            scores.data_ptr(),
            scores.stride(0),
            scores.shape[0],
            scores.shape[1],
            row_thresholds.data_ptr(),
            0 if column_thresholds is None else column_thresholds.data_ptr(),
            row_counts.data_ptr(),
            0 if column_counts is None else column_counts.data_ptr(),
        )
