import doctest

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medfast.ops import paired_ranks, retrieval_rank
from medfast.ops.dispatch import why_not
from medfast.ops.ranking import api, reference

IMPLS = [
    "torch",
    "cpu",
    pytest.param("torch on cuda", marks=pytest.mark.gpu),
    pytest.param("triton on cuda", marks=pytest.mark.gpu),
]
# 1 = no rivals, 63..65 straddle the padding, 5000 takes several tiles
SIZES = [(1, 1, 3), (1, 7, 5), (7, 1, 5), (63, 65, 16), (100, 300, 64), (1100, 5000, 8)]


@pytest.fixture(params=IMPLS)
def impl(request):
    name, _, device = request.param.partition(" on ")
    if why_not("retrieval_rank", name) is not None:
        pytest.skip(why_not("retrieval_rank", name))
    with torch.device(device or "cpu"):
        yield name


def _features(N, M, D, dtype=torch.float32):
    torch.manual_seed(0)
    query, gallery = (F.normalize(torch.randn(n, D), dim=-1) for n in (N, M))
    return query.to(dtype), gallery.to(dtype), torch.randint(M, (N,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "M", "D"), SIZES)
def test_ranks_are_those_of_the_definition(impl, N, M, D, dtype):
    inputs = _features(N, M, D, dtype)
    want = reference.retrieval_rank(*inputs)
    # Products that sum in another order may swap scores that differ by a rounding.
    found = retrieval_rank(*inputs, impl=impl)
    assert found.dtype == torch.int64
    assert (found - want).abs().max() <= 1
    assert (found != want).float().mean() <= 0.002


def test_ranks_are_those_of_a_sort(impl):
    query, gallery, target = _features(200, 150, 8, torch.float64)
    if why_not("retrieval_rank", impl, query) is not None:
        query, gallery = query.float(), gallery.float()
    order = (query @ gallery.T).argsort(dim=1, descending=True)
    want = (order == target[:, None]).int().argmax(1)
    assert torch.equal(retrieval_rank(query, gallery, target, impl=impl), want)


@pytest.mark.parametrize(("N", "M", "D"), SIZES)
def test_duplicates_of_the_target_count_against_the_query(impl, N, M, D):
    query, gallery, _ = _features(N, M, D)
    copies = gallery[torch.arange(3 * M) % M]
    target = torch.arange(N) % M
    found = retrieval_rank(query, copies, target, impl=impl)
    # Every row is there three times, so what beats the target, or is it, comes in threes.
    assert ((found - 2) % 3 == 0).all()


def test_ties_count_against_the_query(impl):
    same = torch.ones(70, 3)
    assert (retrieval_rank(same, same, torch.arange(70), impl=impl) == 69).all()


def test_nan_counts_against_the_query(impl):
    query, gallery, target = _features(50, 80, 16)
    clean = retrieval_rank(query, gallery, target, impl=impl)
    gallery[-1] = torch.nan
    query[0] = torch.nan
    found = retrieval_rank(query, gallery, target, impl=impl)
    assert found[0] == 79
    others = (target != 79) & (torch.arange(50) > 0)
    assert (found[others] >= clean[others]).all()
    assert (found[target == 79] == 79).all()


@pytest.mark.parametrize("N", [1, 2, 65, 300, 4100])
def test_both_directions_in_one_pass(impl, N):
    query, gallery, _ = _features(N, N, 8)
    gallery[N // 2 :] = gallery[: N - N // 2].clone()
    target = torch.arange(N)
    by_query, by_gallery = paired_ranks(query, gallery, impl=impl)
    assert torch.equal(by_query, retrieval_rank(query, gallery, target, impl=impl))
    want = retrieval_rank(gallery, query, target, impl=impl)
    assert (by_gallery - want).abs().max() <= 1
    assert (by_gallery != want).float().mean() <= 0.002


def test_both_directions_with_nan(impl):
    query, gallery, _ = _features(70, 70, 8)
    query[3] = torch.nan
    by_query, by_gallery = paired_ranks(query, gallery, impl=impl)
    assert by_query[3] == by_gallery[3] == 69


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 140), st.integers(1, 140), st.integers(1, 40), st.integers(0, 2**31))
def test_any_size_agrees_with_the_definition_on_whole_numbers(N, M, D, seed):
    """Whole numbers have no rounding: ranks must be equal, and ties are plenty."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randint(-2, 3, (N, D), generator=generator).float()
    gallery = torch.randint(-2, 3, (M, D), generator=generator).float()
    target = torch.randint(M, (N,), generator=generator)
    want = reference.retrieval_rank(query, gallery, target)
    for impl in ("torch", "cpu"):
        if why_not("retrieval_rank", impl) is None:
            assert torch.equal(retrieval_rank(query, gallery, target, impl=impl), want)


def test_no_matrix_of_all_scores(impl, monkeypatch, largest_tensor):
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "4")
    inputs = _features(3000, 3000, 8)
    with largest_tensor() as largest:
        retrieval_rank(*inputs, impl=impl)
        paired_ranks(*inputs[:2], impl=impl)
    assert largest.bytes <= 4 * 2**20


def test_strides_do_not_matter(impl):
    query, gallery, target = _features(100, 90, 16)
    strided = query.T.contiguous().T, gallery.repeat(1, 2)[:, :16], target.repeat(2)[::2]
    assert torch.equal(
        retrieval_rank(*strided[:2], target, impl=impl),
        retrieval_rank(query, gallery, target, impl=impl),
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda q, g, t: (q, g[:, :3], t),
            r"\[4, 8\] and \[6, 3\] with one D|\[4, 8\] and \[6, 3\]",
        ),
        (lambda q, g, t: (q, g, t[:2]), r"target must be torch.int64 \[4\]"),
        (lambda q, g, t: (q, g, t.float()), r"target must be torch.int64 \[4\]"),
        (lambda q, g, t: (q, g, [0, 1, 2, 3]), r"target must be torch.int64 \[4\]"),
        (lambda q, g, t: (q, g, t + 3), r"target must be rows of the gallery, 0 to 5; got 6"),
        (lambda q, g, t: (q, g, t - 1), r"target must be rows of the gallery, 0 to 5; got -1"),
        (lambda q, g, t: (q, g.double(), t), "gallery must be torch.float32"),
        (lambda q, g, t: (q[:0], g, t[:0]), "no size of 0"),
    ],
)
def test_a_wrong_argument_is_named(change, says):
    query, gallery, _ = _features(4, 6, 8)
    with pytest.raises(ValueError, match=f"retrieval_rank: .*{says}"):
        retrieval_rank(*change(query, gallery, torch.arange(4)))


def test_pairs_must_be_as_many():
    with pytest.raises(ValueError, match=r"paired_ranks: .*\[4, 8\] and \[6, 8\]"):
        paired_ranks(*_features(4, 6, 8)[:2])


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_explicit_request_is_refused_not_replaced(impl):
    with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run here: .* impl='auto'"):
        retrieval_rank(*_features(4, 6, 8), impl=impl)


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(api).failed == 0
