"""The public functions retrieval_rank and paired_ranks: checks, choice, documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from medfast.ops import dispatch
from medfast.ops.ranking import chunked, reference

_OP = "retrieval_rank"


def retrieval_rank(query: Tensor, gallery: Tensor, target: Tensor, *, impl: str = "auto") -> Tensor:
    """Return the rank of each query's target among all rows of the gallery; 0 is the best.

        rank_i = |{j != target_i : query_i . gallery_j >= query_i . gallery_target_i}|

    Ties count against the query, so a model that scores everything alike finds nothing; scores are
    compared as computed, in fp32. A NaN score counts as a tie, and a target that scores NaN is
    last. Recall@k is `(rank < k).mean()`. The work is one matrix product, in tiles within
    `MEDFAST_WORKSPACE_MB`: nothing is sorted, and no N x M scores are kept but by "reference".

    Args:
        query: Features [N, D], fp32, bf16, fp16 or fp64; as a rule of unit length.
        gallery: Features [M, D], likewise.
        target: Rows of the gallery, int64 [N].
        impl: "auto", "cpu", "triton", "torch" or "reference".

    Returns:
        Ranks from 0 to M - 1, int64 [N].

    Raises:
        ValueError: An argument has another shape, dtype or device, a target is no row of the
            gallery (looked at on a CPU only), or `impl` is unknown.
        RuntimeError: `impl` cannot run here.

    Example:
        >>> import torch
        >>> from medfast.ops import retrieval_rank
        >>> gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> retrieval_rank(gallery, gallery, torch.tensor([0, 2, 2]))
        tensor([0, 2, 0])
    """
    dispatch.check_features(_OP, query=(query, "N D"), gallery=(gallery, "M D"))
    dispatch.check_ids(_OP, "target", target, query, "query")
    if query.device.type == "cpu":
        low, high = target.aminmax()
        if low < 0 or high >= len(gallery):
            got = f"{(low if low < 0 else high).item()}"
            must = f"rows of the gallery, 0 to {len(gallery) - 1}"
            raise dispatch.argument_error(_OP, "target", must, got, "Check the pairing.")
    chosen = dispatch.choose(_OP, impl, query)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        if chosen == "reference":
            return reference.retrieval_rank(query, gallery, target)
        if chosen == "triton":
            from medfast.ops.ranking import triton

            return triton.ranks(query, gallery, target)
        return chunked.ranks(query, gallery, target, _passes(chosen))


def paired_ranks(query: Tensor, gallery: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Return the ranks of both directions of N pairs, from one pass over their scores.

    It equals `retrieval_rank(query, gallery, arange(N)), retrieval_rank(gallery, query, arange(N))`
    for half the work.

    Args:
        query: Features [N, D], as in `retrieval_rank`.
        gallery: Features [N, D]; row i belongs to query i.
        impl: As in `retrieval_rank`.

    Returns:
        The ranks of row i of `gallery` for row i of `query`, and the other way round, int64 [N].

    Raises:
        ValueError: As `retrieval_rank`.
        RuntimeError: As `retrieval_rank`.

    Example:
        >>> import torch
        >>> from medfast.ops import paired_ranks
        >>> paired_ranks(torch.eye(2), torch.tensor([[1.0, 0.0], [0.9, 0.4]]))
        (tensor([0, 0]), tensor([0, 1]))
    """
    dispatch.check_features("paired_ranks", query=(query, "N D"), gallery=(gallery, "N D"))
    chosen = dispatch.choose(_OP, impl, query)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        if chosen == "reference":
            return reference.paired_ranks(query, gallery)
        if chosen == "triton":
            from medfast.ops.ranking import triton

            return triton.paired_ranks(query, gallery)
        return chunked.paired_ranks(query, gallery, _passes(chosen))


def _passes(impl: str) -> chunked.Passes:
    if impl == "cpu":
        from medfast.ops.ranking.cpu import CpuPasses

        return CpuPasses()
    return chunked.Passes()
