"""What the Triton kernels compute: run by test_triton_kernels.py, interpreted or on a GPU."""

import math
import os

import pytest
import torch
import torch.nn.functional as F

from medfast.ops import triton_tiles
from medfast.ops.clip import triton as clip
from medfast.ops.ranking import triton as ranking
from medfast.ops.siglip import triton as siglip

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# Under the interpreter a product of bf16 tiles is garbage.
DTYPES = [torch.float32, torch.float16] + ([] if IS_INTERPRETED else [torch.bfloat16])
# The dtype's rounding of G, and of what is summed in fp32.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
# 1 = nothing but an own entry; 127..129 straddle tiles; D of 1, 3 and 100 end within a block
SIZES = [
    (1, 1, 16, 0),
    (2, 2, 3, 0),
    (127, 127, 64, 0),
    (128, 128, 1, 0),
    (129, 129, 100, 0),
    # Some rows have no own column, or some columns no row.
    (70, 33, 16, 0),
    # A tile's corner is an own entry, and nothing else of it.
    (40, 130, 64, 33),
    (40, 130, 8, 63),
    (130, 33, 64, -60),
    (5, 40, 8, 1000),
    (40, 5, 8, -1000),
]
if not IS_INTERPRETED:
    # The same corners, for tiles of 128 x 128.
    SIZES += [(300, 400, 64, 1), (300, 400, 64, 127), (1000, 900, 200, 3)]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every tensor that torch leaves empty holds NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny_workspace(monkeypatch):
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "0.002")


class _Spy:
    """Stands for a kernel, and keeps what it is launched with; launches it if told to."""

    def __init__(self, monkeypatch, module, name, launches=True):
        self.kernel = getattr(module, name)
        self.launches, self.calls = launches, []
        monkeypatch.setattr(module, name, self)

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.calls.append(dict(zip(self.kernel.arg_names, args, strict=False)))
            if self.launches:
                self.kernel[grid](*args, **kwargs)

        return launch


def _features(M, N, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = (F.normalize(torch.randn(size, D, generator=generator), dim=-1) for size in (M, N))
    return [side.to(DEVICE, dtype) for side in sides]


def _scalar(value):
    return torch.tensor(value, device=DEVICE)


def _own(M, N, offset):
    return torch.arange(M)[:, None] + offset == torch.arange(N)


def _logits(rows, columns, scale, bias=0.0):
    return scale * (rows.double().cpu() @ columns.double().cpu().T) + bias


def _lse_truth(logits, offset):
    own = _own(*logits.shape, offset)
    others = logits.masked_fill(own, -torch.inf)
    diagonal = logits.masked_fill(~own, -torch.inf).amax(1)
    return diagonal, others.logsumexp(1), others.logsumexp(0)


def _upstream(diagonal, row_lse, column_lse, offset):
    """The gradients of a mean over pairs: what the loss hands to the backward."""
    M, N = len(row_lse), len(column_lse)
    of_column = torch.full((N,), -torch.inf, dtype=diagonal.dtype, device=diagonal.device)
    pairs = _own(M, N, offset).nonzero().to(diagonal.device)
    of_column[pairs[:, 1]] = diagonal[pairs[:, 0]]
    d_rows = torch.sigmoid(row_lse - diagonal) / (2 * M)
    d_columns = torch.sigmoid(column_lse - of_column) / (2 * M)
    d_own = torch.zeros_like(d_rows)
    d_own[pairs[:, 0]] = -(d_rows[pairs[:, 0]] + d_columns[pairs[:, 1]])
    return d_own, d_rows, d_columns


def _gradient_truth(upstream, logits, offset, row_lse, column_lse):
    d_own, d_rows, d_columns, row_lse, column_lse = (
        x.double().cpu() for x in (*upstream, row_lse, column_lse)
    )
    gradient = d_rows[:, None] * (logits - row_lse[:, None]).exp()
    gradient += d_columns * (logits - column_lse).exp()
    own = _own(*logits.shape, offset)
    return torch.where(own, d_own[:, None].expand_as(own), gradient)


def _assert_close(name, got, want, tolerance, floor=0.0):
    assert got.dtype == torch.float32, name
    error = (got.double().cpu() - want).norm()
    allowed = tolerance * want.norm() + floor
    assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def _assert_same(name, got, want, tolerance):
    """Infinities, and NaN, are where they are in the truth; the rest is within the tolerance."""
    assert got.dtype == torch.float32, name
    torch.testing.assert_close(
        got.double().cpu(), want, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
    )


def _check_clip(rows, columns, scale, offset=0):
    """Compare the forward and the backward with fp64; return the forward's results."""
    logits = _logits(rows, columns, scale)
    truth = _lse_truth(logits, offset)
    found = clip.forward(rows, columns, _scalar(scale), offset)
    largest = logits.abs().max().item()
    for name, got, want in zip(("own", "rows", "columns"), found, truth, strict=True):
        # A logit is as exact as the products that it sums.
        _assert_same(name, got, want, 2e-6 + 5e-7 * largest)
    # As exact as fp32 holds the sums that it is given.
    sums = [x.float().to(DEVICE) for x in truth[1:]]
    upstream = _upstream(truth[0].float().to(DEVICE), *sums, offset)
    gradient = _gradient_truth(upstream, logits, offset, *sums)
    *products, d_scale = clip.backward(
        *upstream, rows, columns, _scalar(scale), offset, found[0], *sums, True, True
    )
    tolerance = TOLERANCE[rows.dtype] + 5e-7 * largest
    sides = (columns.double().cpu(), rows.double().cpu())
    wanted = (gradient @ sides[0], gradient.T @ sides[1])
    for name, got, want, side in zip(("d_rows", "d_columns"), products, wanted, sides, strict=True):
        # Where terms cancel, the roundings of the terms remain.
        _assert_close(name, got, want, tolerance, tolerance * gradient.norm() * side.norm() / 8)
    # Of a gradient that is not rounded to the dtype.
    terms = gradient * (sides[1] @ sides[0].T)
    _assert_close("d_scale", d_scale, terms.sum(), 0, (3e-6 + 5e-7 * largest) * terms.abs().sum())
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "D", "offset"), SIZES)
def test_clip_loss(M, N, D, offset, dtype):
    _check_clip(*_features(M, N, D, dtype), 14.3, offset)


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (x[:1].expand_as(x), x[:1].expand_as(x)),  # every logit 100
        lambda x, y: (x[:1].expand_as(x), -x[:1].expand_as(x)),  # every logit -100
        lambda x, y: (x, x),  # every diagonal wins by far
        lambda x, y: (x, -x),
        lambda x, y: (x, torch.zeros_like(y)),
        lambda x, y: (x, torch.cat([x[:1], y[1:]])),
    ],
)
def test_clip_loss_of_extreme_batches(make):
    _check_clip(*make(*_features(65, 65, 32)), 100.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_saturated_batch_do_not_vanish(dtype):
    """All weights are about 1e-36: what is divided by their largest fits any dtype."""
    eye = torch.eye(48, device=DEVICE, dtype=dtype)
    _check_clip(eye, eye, 80.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_large_gradient_does_not_round_away_the_others(dtype):
    rows, columns = _features(64, 64, 16, dtype)
    logits = _logits(rows, columns, 14.3)
    own, row_lse, column_lse = clip.forward(rows, columns, _scalar(14.3), 0)
    d_own, d_columns = torch.zeros_like(own), torch.zeros_like(own)
    d_rows = torch.full_like(own, 1e-5)
    d_rows[0] = 1
    upstream = (d_own, d_rows, d_columns)
    gradient = _gradient_truth(upstream, logits, 0, row_lse, column_lse)[1:]
    found, _, _ = clip.backward(
        *upstream, rows, columns, _scalar(14.3), 0, own, row_lse, column_lse, True, False
    )
    want = gradient @ columns.double().cpu()
    _assert_close("d_rows", found[1:], want, 2 * TOLERANCE[dtype] + 1e-5)


@pytest.mark.parametrize(("scale", "offset"), [(200.0, 0), (-20.0, 7), (-110.0, -40)])
def test_clip_loss_of_features_that_are_not_normalised(scale, offset):
    rows, columns = _features(65, 70, 32)
    lengths = torch.linspace(0.1, 9, 70, device=DEVICE).unsqueeze(1)
    _check_clip(rows * lengths[:65], columns * lengths.flip(0), scale, offset)


def _runs_exact_path(monkeypatch, rows, columns, scale):
    """Return whether the forward and whether the backward took the path without a shift."""
    online = _Spy(monkeypatch, clip, "_clip_loss_online_lse_kernel")
    gradient = _Spy(monkeypatch, clip, "_clip_loss_gradient_kernel")
    _check_clip(rows, columns, scale)
    flags, state = online.calls[0]["flags_ptr"], gradient.calls[0]["normalisers_ptr"]
    return bool(flags.any()), bool(state[2] != 0)


@pytest.mark.parametrize(("scale", "expected"), [(14.3, False), (100.0, False), (151.0, True)])
def test_the_exact_path_is_for_large_scales(monkeypatch, scale, expected):
    assert _runs_exact_path(monkeypatch, *_features(65, 65, 32), scale) == (expected, expected)


def test_the_shift_holds_the_largest_logits(monkeypatch):
    rows, _ = _features(65, 65, 32)
    rows[:] = rows[:1]
    assert _runs_exact_path(monkeypatch, rows, rows, 100.0) == (False, False)


@pytest.mark.parametrize("row", [0, 64])
def test_the_exact_path_is_for_one_row_far_from_everything(monkeypatch, row):
    rows, columns = _features(65, 65, 32)
    columns[:] = columns[:1]
    rows[:] = columns[:1]
    rows[row] = -rows[row]
    assert _runs_exact_path(monkeypatch, rows, columns, 100.0) == (True, True)


def test_the_exact_path_is_for_overflow(monkeypatch):
    rows, columns = _features(33, 33, 8)
    assert _runs_exact_path(monkeypatch, rows * 10, columns * 10, 14.3) == (True, True)


def test_without_a_flag_the_exact_path_does_nothing(monkeypatch):
    rows, columns = _features(65, 65, 32)
    want = clip.forward(rows, columns, _scalar(14.3), 0)
    _Spy(monkeypatch, clip, "_clip_loss_online_lse_kernel", launches=False)
    for a, b in zip(clip.forward(rows, columns, _scalar(14.3), 0), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("side", [0, 1])
def test_nan_reaches_what_it_touches(side):
    features = _features(40, 70, 32)
    features[side][3, 5] = torch.nan
    own, row_lse, column_lse = clip.forward(*features, _scalar(14.3), 0)
    touched = (row_lse, column_lse)[side]
    assert touched[3].isnan()
    assert own[3].isnan()
    assert (row_lse, column_lse)[1 - side][4].isnan()
    upstream = [torch.full_like(x, 0.01) for x in (own, row_lse, column_lse)]
    *products, d_scale = clip.backward(
        *upstream, *features, _scalar(14.3), 0, own, row_lse, column_lse, True, True
    )
    assert all(product[4].isnan().all() for product in products)
    assert d_scale.isnan()
    loss, *_ = siglip.forward(*features, _scalar(10.0), _scalar(-10.0), 0, False, False)
    assert loss.isnan()


def test_nan_upstream_is_not_hidden():
    rows, columns = _features(20, 20, 8)
    own, row_lse, column_lse = clip.forward(rows, columns, _scalar(14.3), 0)
    upstream = [torch.full_like(row_lse, torch.nan) for _ in range(3)]
    for product in clip.backward(
        *upstream, rows, columns, _scalar(14.3), 0, own, row_lse, column_lse, True, True
    ):
        assert product.isnan().all()


def test_zero_upstream_gives_zero():
    rows, columns = _features(20, 20, 8)
    own, row_lse, column_lse = clip.forward(rows, columns, _scalar(14.3), 0)
    upstream = [torch.zeros_like(row_lse) for _ in range(3)]
    for product in clip.backward(
        *upstream, rows, columns, _scalar(14.3), 0, own, row_lse, column_lse, True, True
    ):
        assert (product == 0).all()


def _siglip_truth(rows, columns, scale, bias, offset):
    products = rows.double().cpu() @ columns.double().cpu().T
    sign = _own(len(rows), len(columns), offset).double() * 2 - 1
    signed = sign * (scale * products + bias)
    gradient = -sign * torch.sigmoid(-signed)
    # -logsigmoid is softplus without the threshold at which torch's softplus turns linear.
    return -F.logsigmoid(signed).sum(), gradient, products


def _check_siglip(rows, columns, scale, bias, offset=0):
    truth, gradient, products = _siglip_truth(rows, columns, scale, bias, offset)
    loss, g_rows, g_columns, g_scale, g_bias = siglip.forward(
        rows, columns, _scalar(scale), _scalar(bias), offset, True, True
    )
    largest = abs(scale) * products.abs().max().item() + abs(bias)
    tolerance = 2e-6 + 5e-7 * largest
    _assert_same("loss", loss / truth.float(), torch.ones((), dtype=torch.float64), tolerance)
    terms = gradient * products
    _assert_close("g_scale", g_scale, terms.sum(), 0, tolerance * terms.abs().sum())
    _assert_close("g_bias", g_bias, gradient.sum(), 0, tolerance * gradient.abs().sum())
    tolerance += TOLERANCE[rows.dtype]
    for name, got, weights, side in (
        ("g_rows", g_rows, gradient, columns.double().cpu()),
        ("g_columns", g_columns, gradient.T, rows.double().cpu()),
    ):
        floor = tolerance * weights.norm() * side.norm() / 8
        _assert_close(name, got, weights @ side, tolerance, floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "D", "offset"), SIZES)
def test_siglip_loss(M, N, D, offset, dtype):
    _check_siglip(*_features(M, N, D, dtype), 10.0, -10.0, offset)


@pytest.mark.parametrize("bias", [-25.0, 0.0, 30.0])
@pytest.mark.parametrize("scale", [0.0, 100.0, -10.0])
def test_siglip_loss_is_exact_for_small_and_large_losses(scale, bias):
    _check_siglip(*_features(65, 65, 32), scale, bias)


def test_tiny_siglip_losses_are_not_lost():
    """Without own entries nothing else is in the sum."""
    _check_siglip(*_features(65, 65, 32), 5.0, -25.0, offset=1000)


def test_siglip_loss_of_pairs_that_match():
    rows, _ = _features(65, 65, 32)
    _check_siglip(rows, rows, 100.0, -50.0)


@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True)])
def test_gradients_that_nobody_needs_are_none(needs):
    rows, columns = _features(40, 70, 32)
    arguments = (rows, columns, _scalar(10.0), _scalar(-10.0), 0)
    want = siglip.forward(*arguments, True, True)
    found = siglip.forward(*arguments, *needs)
    for a, b, need in zip(found, want, (True, *needs, True, True), strict=True):
        assert (a is not None) == need
        if a is not None:
            torch.testing.assert_close(a, b)
    own, row_lse, column_lse = clip.forward(rows, columns, _scalar(14.3), 0)
    upstream = [torch.full((n,), 0.01, device=DEVICE) for n in (40, 40, 70)]
    *products, d_scale = clip.backward(
        *upstream, rows, columns, _scalar(14.3), 0, own, row_lse, column_lse, *needs
    )
    assert [product is not None for product in products] == list(needs)
    assert (d_scale is not None) == any(needs)


def _ranks_truth(scores, target):
    threshold = scores.gather(1, target[:, None])
    others = torch.arange(scores.shape[1]) != target[:, None]
    return (others & ~(scores < threshold)).sum(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "M", "D"), [(1, 1, 4), (3, 2, 1), (127, 129, 64), (33, 200, 100), (200, 65, 3)]
)
def test_ranks(N, M, D, dtype):
    """Integers: every score is exact, and many are equal."""
    generator = torch.Generator().manual_seed(1)
    query, gallery = (torch.randint(-2, 3, (n, D), generator=generator).float() for n in (N, M))
    target = torch.randint(M, (N,), generator=generator)
    found = ranking.ranks(*(x.to(DEVICE, dtype) for x in (query, gallery)), target.to(DEVICE))
    assert found.dtype == torch.int64
    assert torch.equal(found.cpu(), _ranks_truth(query @ gallery.T, target))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D"), [(1, 4), (129, 64), (70, 3)])
def test_paired_ranks(N, D, dtype):
    generator = torch.Generator().manual_seed(2)
    query, gallery = (torch.randint(-2, 3, (N, D), generator=generator).float() for _ in range(2))
    scores, target = query @ gallery.T, torch.arange(N)
    found = ranking.paired_ranks(*(x.to(DEVICE, dtype) for x in (query, gallery)))
    for got, want in zip(found, (scores, scores.T), strict=True):
        assert got.dtype == torch.int64
        assert torch.equal(got.cpu(), _ranks_truth(want, target))


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_of_the_target_tie_wherever_they_are(dtype):
    query, gallery = _features(60, 130, 100, dtype)
    target = torch.arange(60, device=DEVICE)
    gallery[:60] = query
    single = ranking.ranks(query, gallery, target)
    copies = torch.cat([gallery, gallery[:60], gallery[:60].flip(0)])
    for start in (0, 130):
        assert torch.equal(ranking.ranks(query, copies, target + start), single + 2)


def test_nan_scores_rank_last():
    query, gallery = _features(40, 70, 8)
    gallery[3] = torch.nan
    found = ranking.ranks(query, gallery, torch.full((40,), 3, device=DEVICE))
    assert (found == 69).all()
    without = ranking.ranks(query, gallery[4:], torch.zeros(40, dtype=torch.int64, device=DEVICE))
    with_nan = ranking.ranks(query, gallery[3:], torch.ones(40, dtype=torch.int64, device=DEVICE))
    assert torch.equal(with_nan, without + 1)


def test_a_target_outside_of_the_gallery_ranks_behind_everything():
    query, gallery = _features(3, 70, 8)
    found = ranking.ranks(query, gallery, torch.tensor([-1, 70, 2**40], device=DEVICE))
    assert (found == 70).all()


@pytest.mark.parametrize(("M", "N", "D", "offset"), [(129, 129, 100, 0), (200, 70, 16, -90)])
def test_a_tiny_workspace_changes_nothing_beyond_rounding(
    tiny_workspace, monkeypatch, M, N, D, offset
):
    rows, columns = _features(M, N, D)
    tile, _ = triton_tiles.launch_parameters(rows)
    height, width = triton_tiles.gradient_chunk(rows, columns, tile)
    assert height < M
    assert width < N
    launches = _Spy(monkeypatch, clip, "_clip_loss_lse_kernel").calls
    _check_clip(rows, columns, 14.3, offset)
    assert len(launches) > 1
    _check_siglip(rows, columns, 10.0, -10.0, offset)
    target = torch.arange(M, device=DEVICE) % N
    want = _ranks_truth(_logits(rows, columns, 1.0), target.cpu())
    assert torch.equal(ranking.ranks(rows, columns, target).cpu(), want)
    if M == N:
        scores = _logits(rows, columns, 1.0)
        for got, of in zip(ranking.paired_ranks(rows, columns), (scores, scores.T), strict=True):
            assert torch.equal(got.cpu(), _ranks_truth(of, target.cpu()))


@pytest.mark.parametrize("megabytes", ["0.001", "0.02", "0.1", "1", "64", "256", "4096"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_chunks_fit_the_workspace(monkeypatch, megabytes, dtype):
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", megabytes)
    budget = float(megabytes) * 2**20
    for multiprocessors in (None, 108, 132):
        tile = triton_tiles._INTERPRETED
        if multiprocessors is not None:
            monkeypatch.setattr(triton_tiles, "multiprocessors", lambda _, n=multiprocessors: n)
            tile = triton_tiles.tile_of("half" if dtype.itemsize == 2 else "tf32", 90)
        for M, N, D in ((1, 1, 4), (700, 33, 100), (65536, 65536, 512), (8192, 300000, 768)):
            rows, columns = (
                _Shape((n, D), dtype, is_cuda=multiprocessors is not None) for n in (M, N)
            )
            height, width = triton_tiles.gradient_chunk(rows, columns, tile)
            assert height % tile.rows == 0
            assert width % tile.columns == 0
            assert height <= max(tile.rows, M + tile.rows - 1)
            is_single = (height, width) == (tile.rows, tile.columns)
            assert height * width * dtype.itemsize <= budget or is_single
            if (multiprocessors, megabytes, M, D) == (132, "4096", 65536, 512):
                assert height % 8448 == 0


class _Shape:
    """What the choice of chunks asks of features, without their memory."""

    def __init__(self, shape, dtype, is_cuda):
        self.shape, self.dtype, self.is_cuda, self.device = shape, dtype, is_cuda, None

    def __len__(self):
        return self.shape[0]

    def element_size(self):
        return self.dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_equal_bit_for_bit(dtype):
    rows, columns = _features(70, 70, 64, dtype)
    scale, bias = _scalar(14.3), _scalar(-10.0)

    def run():
        own, row_lse, column_lse = clip.forward(rows, columns, scale, 0)
        upstream = _upstream(own, row_lse, column_lse, 0)
        yield from (own, row_lse, column_lse)
        yield from clip.backward(
            *upstream, rows, columns, scale, 0, own, row_lse, column_lse, True, True
        )
        yield from siglip.forward(rows, columns, scale, bias, 0, True, True)
        yield from ranking.paired_ranks(rows, columns)

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_strides_do_not_matter():
    rows, columns = _features(33, 33, 16)
    strided = rows.T.contiguous().T, columns.repeat(1, 2)[:, :16]
    target = torch.arange(66, device=DEVICE)[::2] // 2
    for a, b in zip(
        (*clip.forward(rows, columns, _scalar(14.3), 0), ranking.ranks(rows, columns, target)),
        (*clip.forward(*strided, _scalar(14.3), 0), ranking.ranks(*strided, target)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_log1p_is_as_exact_as_fp32():
    x = torch.cat([torch.logspace(-30, 0, 4001), torch.tensor([0.0, 1.0])]).to(DEVICE)
    out = torch.empty_like(x)
    _log1p_kernel[(1,)](x, out, len(x), BLOCK=4096)
    truth = torch.log1p(x.double())
    assert ((out - truth).abs() <= 4e-7 * truth).all()
    assert math.isclose(out[-1].item(), math.log(2), rel_tol=4e-7)


triton, tl = triton_tiles.triton, triton_tiles.tl


@triton.jit
def _log1p_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0)
    tl.store(out_ptr + offs, triton_tiles.log1p(x), mask=offs < N)
