"""csrc's CUDA kernels of clip_loss, on GPUs and, their instructions emulated, on a CPU."""

import ctypes
import inspect
import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from cuda_emulator import Emulated, compiled
from global_loss_checks import loss_and_grads
from test_clip_loss import TestClipLoss as ClipLossChecks

import medfast
from medfast.ops import pairwise
from medfast.ops.clip import reference
from medfast.ops.clip.autograd import log_sum_exps
from medfast.ops.dispatch import why_not

# 1 = nothing but an own entry; 127..129 straddle tiles; D of 1, 3 and 100 are no whole pieces, 600
# does not stay in shared memory; with offsets, some rows or columns have no own entry
SIZES = [
    (1, 1, 16, 0),
    (2, 2, 3, 0),
    (127, 127, 64, 0),
    (128, 128, 1, 0),
    (129, 129, 100, 0),
    (70, 33, 16, 0),
    # A tile's corner is an own entry, and nothing else of it.
    (129, 258, 8, 127),
    (260, 40, 8, -160),
    (5, 40, 8, 1000),
    (40, 5, 8, -1000),
    (129, 270, 512, 3),
    (40, 270, 600, 1),
]
EXTREMES = [
    lambda x, y: (x[:1].expand_as(x), x[:1].expand_as(x)),  # every logit as large as the scale
    lambda x, y: (x[:1].expand_as(x), -x[:1].expand_as(x)),
    lambda x, y: (x, x),  # every diagonal wins by far
    lambda x, y: (x, -x),
    lambda x, y: (x, torch.zeros_like(y)),
    lambda x, y: (x, torch.cat([x[:1], y[1:]])),
]
ON_A_GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(params=["blocks", "groups", ON_A_GPU])
def kernels(request, monkeypatch, uninitialised_is_nan):
    """The launchers: for instructions of any GPU, or of sm_90, emulated; or for the GPU here."""
    if request.param == "gpu":
        pytest.importorskip("medfast._CUDA", reason="the CUDA kernels are not built")
        from medfast.ops.clip import cuda

        cuda.device = "cuda"
        yield cuda
        return
    yield _emulate(monkeypatch, request.param == "groups")


def _emulate(monkeypatch, by_groups, **how):
    emulated = Emulated(by_groups, **how)
    monkeypatch.setitem(sys.modules, "medfast._CUDA", emulated)
    monkeypatch.setattr(medfast, "_CUDA", emulated, raising=False)
    from medfast.ops.clip import cuda

    monkeypatch.setattr(cuda, "_CUDA", emulated)
    monkeypatch.setattr(cuda, "_stream", lambda features: 0)
    # Odd, so that blocks share rows unevenly.
    monkeypatch.setattr(cuda, "_slots", lambda features: 3)
    monkeypatch.setattr(cuda, "device", "cpu", raising=False)
    return cuda


def _features(M, N, D, device, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    sides = (F.normalize(torch.randn(size, D, generator=generator), dim=-1) for size in (M, N))
    return [side.to(device, dtype) for side in sides]


def _check(kernels, rows, columns, scale, offset=0):
    """Hold the forward and the backward to fp64; return what they return."""
    device = rows.device
    logits = scale * rows.double() @ columns.double().T
    own = torch.arange(len(rows))[:, None] + offset == torch.arange(len(columns))
    own = own.to(device)
    others = logits.masked_fill(own, -torch.inf)
    truth = (
        logits.masked_fill(~own, -torch.inf).amax(1),
        others.logsumexp(1),
        others.logsumexp(0),
    )
    factor = torch.tensor(scale, device=device)
    found = kernels.forward(rows, columns, factor, offset)
    tolerance = 2e-6 + 5e-7 * logits.abs().max().item()
    for name, got, want in zip(("own", "rows", "columns"), found, truth, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got.double(), want, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )
    # What the loss hands to the backward.
    sums = [x.float() for x in truth[1:]]
    M, N = len(rows), len(columns)
    of_column = torch.full((N,), -torch.inf, device=device)
    pairs = own.nonzero()
    of_column[pairs[:, 1]] = truth[0].float()[pairs[:, 0]]
    d_rows = torch.sigmoid(sums[0] - truth[0].float()) / (2 * M)
    d_columns = torch.sigmoid(sums[1] - of_column) / (2 * M)
    d_own = torch.zeros_like(d_rows)
    d_own[pairs[:, 0]] = -(d_rows[pairs[:, 0]] + d_columns[pairs[:, 1]])
    gradient = d_rows.double()[:, None] * (logits - sums[0].double()[:, None]).exp()
    gradient += d_columns.double() * (logits - sums[1].double()).exp()
    gradient = torch.where(own, d_own.double()[:, None].expand_as(own), gradient)
    *products, d_scale = kernels.backward(
        d_own, d_rows, d_columns, rows, columns, factor, offset, found[0], *sums, True, True
    )
    rounding = 1e-3 if rows.dtype == torch.float16 else 6e-3
    tolerance = rounding + 5e-7 * logits.abs().max().item()
    sides = (columns.double(), rows.double())
    wanted = (gradient @ sides[0], gradient.T @ sides[1])
    for got, want, side in zip(products, wanted, sides, strict=True):
        # Where terms cancel, the roundings of the terms remain.
        allowed = tolerance * (want.norm() + gradient.norm() * side.norm() / 8)
        assert (got - want).norm() <= allowed
    terms = gradient * (sides[1] @ sides[0].T)
    off = (d_scale - terms.sum()).abs()
    assert off <= (3e-6 + 5e-7 * logits.abs().max()) * terms.abs().sum()
    return (*found, *products, d_scale)


@pytest.mark.parametrize(("M", "N", "D", "offset"), SIZES)
def test_log_sum_exps_and_gradients(kernels, M, N, D, offset):
    _check(kernels, *_features(M, N, D, kernels.device), 14.3, offset)


class _WithoutExactPath:
    """The module, but for the launch that corrects sums where a flag is set."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)

    def clip_loss_online(self, *arguments):
        pass


def test_ordinary_batches_need_no_exact_path(kernels, monkeypatch):
    """It would hide what the usual one does wrong."""
    monkeypatch.setattr(kernels, "_CUDA", _WithoutExactPath(kernels._CUDA))
    for M, N, offset in [(2, 2, 0), (140, 400, 9), (300, 129, -200)]:
        _check(kernels, *_features(M, N, 32, kernels.device), 14.3, offset)


@pytest.mark.parametrize("make", EXTREMES)
@pytest.mark.parametrize("scale", [60.0, 100.0])
def test_extreme_batches(kernels, make, scale):
    _check(kernels, *make(*_features(65, 65, 32, kernels.device)), scale)


@pytest.mark.parametrize("scale", [0.0, -20.0, 200.0])
def test_any_scale(kernels, scale):
    rows, columns = _features(140, 90, 32, kernels.device)
    _check(kernels, rows * 3, columns, scale, 2)


def test_a_row_that_one_shift_does_not_suit_has_exact_sums(kernels):
    """Its sum is 0 as fp32 adds it up; the others suit."""
    rows, columns = _features(140, 150, 32, kernels.device)
    columns = columns[:1] + columns * 0.01
    rows[3] = -columns[0]
    _check(kernels, rows, columns, 100.0)


@pytest.mark.parametrize("megabytes", ["0.01", "0.1"])
def test_chunks_change_nothing(kernels, monkeypatch, megabytes):
    features = _features(260, 300, 16, kernels.device)
    want = _check(kernels, *features, 14.3, 1)
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", megabytes)
    found = _check(kernels, *features, 14.3, 1)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_one_large_gradient_does_not_round_away_the_others(kernels):
    rows, columns = _features(64, 64, 16, kernels.device)
    factor = torch.tensor(14.3, device=kernels.device)
    own, row_lse, column_lse = kernels.forward(rows, columns, factor, 0)
    small = torch.full_like(own, 1e-20)
    d_rows = small.clone()
    d_rows[0] = 1
    d_x, _, _ = kernels.backward(
        *(0 * own, d_rows, 0 * own, rows, columns, factor, 0),
        *(own, row_lse, column_lse, True, False),
    )
    even, _, _ = kernels.backward(
        *(0 * own, small, 0 * own, rows, columns, factor, 0),
        *(own, row_lse, column_lse, True, False),
    )
    assert (d_x[1:] - even[1:]).norm() <= 1e-2 * even[1:].norm()


def test_nan_features_make_sums_nan(kernels):
    rows, columns = _features(130, 130, 16, kernels.device)
    rows[5, 3] = torch.nan
    _, row_lse, column_lse = kernels.forward(
        rows, columns, torch.tensor(5.0, device=kernels.device), 0
    )
    assert row_lse.isnan().nonzero().flatten().tolist() == [5]
    # Its own column leaves it out.
    assert column_lse.isnan().tolist() == [j != 5 for j in range(130)]


def test_runs_are_equal_bit_for_bit(kernels):
    features = _features(200, 300, 64, kernels.device)
    for a, b in zip(
        _check(kernels, *features, 14.3), _check(kernels, *features, 14.3), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("by_groups", [False, True])
def test_no_result_hangs_on_when_threads_and_copies_run(monkeypatch, by_groups):
    """Copies and products take effect at once or as late as may be; threads in several orders."""
    features = _features(140, 300, 130, "cpu")
    found = []
    for is_lazy, seed in [(True, 0), (False, 1), (True, 2)]:
        kernels = _emulate(monkeypatch, by_groups, is_lazy=is_lazy, seed=seed)
        found.append(_check(kernels, *features, 14.3, 7))
    for results in found[1:]:
        for a, b in zip(results, found[0], strict=True):
            assert torch.equal(a, b)


def test_blocks_and_groups_agree(monkeypatch):
    features = _features(150, 260, 64, "cpu")
    found = [_check(_emulate(monkeypatch, g), *features, 14.3) for g in (False, True)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_features_off_their_place_are_copied(kernels):
    rows, columns = _features(33, 40, 16, kernels.device)
    shifted = torch.empty(33 * 16 + 1, dtype=rows.dtype, device=rows.device)[1:].view(33, 16)
    shifted.copy_(rows)
    assert shifted.is_contiguous()
    assert shifted.data_ptr() % 16 != 0
    for a, b in zip(
        _check(kernels, shifted, columns.T.contiguous().T, 14.3),
        _check(kernels, rows, columns, 14.3),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_one_side_alone(kernels):
    rows, columns = _features(33, 140, 16, kernels.device)
    factor = torch.tensor(14.3, device=kernels.device)
    own, row_lse, column_lse = kernels.forward(rows, columns, factor, 0)
    upstream = (torch.rand_like(own), torch.rand_like(own), torch.rand_like(column_lse))
    found = {}
    for needs in itertools.product([True, False], repeat=2):
        found[needs] = kernels.backward(
            *upstream, rows, columns, factor, 0, own, row_lse, column_lse, *needs
        )
    assert found[False, False] == (None, None, None)
    assert torch.equal(found[True, False][0], found[True, True][0])
    assert found[True, False][1] is None
    assert found[False, True][0] is None
    assert torch.equal(found[False, True][1], found[True, True][1])


def _loss(image, text, scale):
    return pairwise.cross_entropy_of_sums(*log_sum_exps(image, text, scale, impl="cuda"))


def _leaves(device):
    image, text = _features(33, 33, 16, device)
    leaves = (image, text, torch.tensor(14.3, device=device))
    return [leaf.requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("needs_grad", [True, False])
def test_registered_op_passes_opcheck(kernels, needs_grad):
    arguments = (*_leaves(kernels.device), 0, "cuda", needs_grad)
    torch.library.opcheck(torch.ops.medfast.clip_loss_fwd.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(kernels, dynamic):
    torch.compiler.reset()
    compiled_loss = torch.compile(_loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    leaves = _leaves(kernels.device)
    found = compiled_loss(*leaves)
    want = reference.clip_loss(*(leaf.double() for leaf in leaves))
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(found, leaves)
    for a, b in zip(grads, torch.autograd.grad(_loss(*leaves), leaves), strict=True):
        assert torch.equal(a, b)


def test_shapes_are_known_without_data():
    image, text = (torch.empty(33, 16, dtype=torch.bfloat16, device="meta") for _ in range(2))
    own, rows, columns = log_sum_exps(image, text, torch.empty((), device="meta"), impl="cuda")
    assert own.shape == rows.shape == columns.shape == (33,)


class TestOnAGpu(ClipLossChecks):
    """Everything that every implementation promises, in the dtypes that this one takes."""

    @pytest.fixture(params=[pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
    def loss(self, request):
        self.device, self.rounds = "cuda", True
        self.dtype = request.param
        reason = why_not(self.name, "cuda", torch.empty(1, 1, dtype=self.dtype, device="cuda"))
        if reason is not None:
            pytest.skip(reason)
        return lambda *a, **k: self.function(*a, impl="cuda", **k)

    def inputs(self, B, D, dtype=None, scalars=None):
        # Those that a test wants in fp32 are in what the kernels take.
        half = dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
        return super().inputs(B, D, half, scalars)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_takes_its_dtype_and_sums_in_fp32(self, loss, dtype):
        leaves = [leaf.float().requires_grad_() for leaf in self.inputs(33, 16)]
        with torch.autocast(self.device, dtype):
            value = loss(*leaves)
        image, text, scale = leaves
        assert torch.equal(value, loss(image.to(dtype), text.to(dtype), scale))
        assert value.dtype == torch.float32
        assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(value, leaves))

    def test_a_cuda_graph_replays_it(self, loss):
        inputs = [leaf.requires_grad_() for leaf in self.inputs(129, 64)]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            want = [t.clone() for t in loss_and_grads(loss, inputs)]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value = loss(*inputs)
            found = [value, *torch.autograd.grad(value, inputs)]
        for output in found:
            output.detach().fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a.detach(), b)

    # Their inputs or their tolerances are those of fp32.
    test_features_that_are_not_normalised = None
    test_a_saturated_batch_has_a_gradient_where_eager_has_none = None


# What is not about this implementation is not tested twice.
for _name in dir(ClipLossChecks):
    _function = getattr(TestOnAGpu, _name)
    _is_test = _name.startswith("test_") and _function is not None
    if _is_test and "loss" not in inspect.signature(_function).parameters:
        setattr(TestOnAGpu, _name, None)


def test_entries_of_a_tile_are_each_held_once():
    for by_groups in (False, True):
        places = (ctypes.c_int * (2 * 256 * (128 if by_groups else 64)))()
        compiled("clip_loss.cpp").places(ctypes.c_bool(by_groups), places)
        held = torch.tensor(list(places)).view(-1, 2)
        # A group has a whole tile, so that two have it twice.
        tile = torch.zeros(128, 128, dtype=torch.int64)
        tile.index_put_((held[:, 0], held[:, 1]), torch.ones(len(held)).long(), accumulate=True)
        assert (tile == (2 if by_groups else 1)).all()


def test_a_slab_is_permuted_within_its_rows():
    library = compiled("clip_loss.cpp")
    library.swizzle.restype = ctypes.c_int64
    places = [[library.swizzle(row, chunk) for chunk in range(8)] for row in range(128)]
    assert sorted(itertools.chain(*places)) == list(range(0, 128 * 128, 16))
    for first in range(0, 128, 8):
        for chunk in range(8):
            banks = {places[first + row][chunk] % 128 for row in range(8)}
            assert len(banks) == 8
        assert {place // 128 for place in places[first]} == {first}


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("span", [(0, 300, 0, 900), (128, 129, 0, 897), (256, 700, 128, 1100)])
def test_tiles_are_each_done_once(span, parts):
    row_blocks, column_blocks = (
        math.ceil((span[1] - span[0]) / 128),
        math.ceil((span[3] - span[2]) / 128),
    )
    out = (ctypes.c_int64 * (3 * row_blocks * parts))()
    compiled("clip_loss.cpp").units(ctypes.byref(Emulated.ClipLossSpan(*span, parts)), out)
    done = []
    for row, first, last in torch.tensor(list(out)).view(-1, 3).tolist():
        assert last > first
        done += [(row, block) for block in range(first, last)]
    assert sorted(done) == list(itertools.product(range(row_blocks), range(column_blocks)))


def test_masks_know_own_entries_and_edges():
    library = compiled("clip_loss.cpp")
    library.mask.restype = ctypes.c_bool
    M, N = 400, 300
    rows, columns = torch.arange(512)[:, None], torch.arange(384)
    found = torch.empty(128, 128, dtype=torch.int32)
    for offset in (0, 1, 127, 128, -1, -127, -128, -129, 2**40, -(2**40)):
        kinds = torch.where(rows + offset == columns, 1, 2)
        kinds = torch.where((rows < M) & (columns < N), kinds, 0)
        for row, column in itertools.product(range(0, 512, 128), range(0, 384, 128)):
            want = kinds[row : row + 128, column : column + 128]
            arguments = (ctypes.c_int64(x) for x in (M, N, offset, row, column))
            is_plain = library.mask(*arguments, ctypes.c_void_p(found.data_ptr()))
            assert torch.equal(found, want.int())
            assert is_plain == (want == 2).all()


def test_parts_fill_the_device():
    from medfast.ops.clip.cuda import parts

    for rows, columns, slots in itertools.product((1, 3, 64, 512), (1, 5, 512), (1, 108, 132, 264)):
        count = parts(rows, columns, slots)
        assert 1 <= count <= columns
        if rows * columns >= 8 * slots:
            longest = math.ceil(rows * count / slots) * math.ceil(columns / count)
            assert rows * columns > 0.75 * slots * longest
