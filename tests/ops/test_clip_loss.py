import doctest

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from medfast.ops import clip_loss
from medfast.ops.clip import api, reference
from medfast.ops.dispatch import why_not

IMPLS = ["torch", "cpu"]
# 1 = no negatives, 127..129 straddle a tile, D = 1 and 3 are no power of two
SHAPES = [(1, 16), (2, 3), (3, 1), (31, 64), (33, 48), (127, 64), (128, 3), (129, 64)]


def _inputs(B, D, dtype=torch.float32, scale=14.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(B, D, generator=generator), dim=-1) for _ in range(2))
    return image.to(dtype), text.to(dtype), torch.tensor(scale)


def _loss_and_grads(fn, inputs, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    loss = fn(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _assert_as_close_as_eager(fn, inputs, positives=None):
    """The error against fp64, in norm, is at most twice that of the reference in the same dtype.

    Beyond that, a few roundings of the terms that a gradient sums, and that of a logit, which moves
    its exponential by as many roundings as the logit is large: where terms cancel, eager may be
    right by luck.
    """
    names = ("loss", "d_image", "d_text", "d_scale")
    truth = _loss_and_grads(
        lambda *a: reference.clip_loss(*a, positives=positives), inputs, torch.float64
    )
    eager = _loss_and_grads(lambda *a: reference.clip_loss(*a, positives=positives), inputs)
    found = _loss_and_grads(lambda *a: fn(*a, positives=positives), inputs)
    image, text = (t.double().norm(dim=1).max() for t in inputs[:2])
    scale = inputs[2].double().abs()
    terms = (scale * image * text + truth[0], scale * text, scale * image, image * text)
    for name, want, low, got, term in zip(names, truth, eager, found, terms, strict=True):
        assert got.dtype == low.dtype
        band = (8 + abs(scale * image * text)) * torch.finfo(torch.float32).eps * term
        error, allowed = (got - want).norm(), 2 * (low - want).norm() + band
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


@pytest.fixture(params=IMPLS)
def loss(request):
    reason = why_not("clip_loss", request.param)
    if reason is not None:
        pytest.skip(reason)
    return lambda *a, **k: clip_loss(*a, impl=request.param, **k)


@pytest.fixture
def tiny_tiles(monkeypatch):
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "0.005")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_is_as_close_to_fp64_as_eager(loss, B, D, dtype):
    _assert_as_close_as_eager(loss, _inputs(B, D, dtype))


@pytest.mark.parametrize(("B", "D"), [(2, 3), (33, 48), (129, 64)])
def test_tiles_change_nothing(loss, tiny_tiles, B, D):
    _assert_as_close_as_eager(loss, _inputs(B, D))


def test_reference_is_the_published_formula():
    image, text, scale = (t.double() for t in _inputs(20, 8))
    logits = scale * image @ text.T
    labels = torch.arange(20)
    want = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(reference.clip_loss(image, text, scale), want)


def test_reference_gradient_is_that_of_its_value():
    leaves = [t.double().requires_grad_() for t in _inputs(5, 4)]
    assert gradcheck(reference.clip_loss, leaves)
    ids = torch.tensor([0, 0, 1, 2, 1])
    assert gradcheck(lambda *a: reference.clip_loss(*a, positives=ids), leaves)


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (x, x),  # saturated: every diagonal wins
        lambda x, y: (x, -x),  # every diagonal loses
        lambda x, y: (x[:1].expand_as(x), x[:1].expand_as(x)),  # all equal
        lambda x, y: (x[:1].expand_as(x), -x[:1].expand_as(x)),  # every cosine -1
        lambda x, y: (x, torch.zeros_like(y)),
        lambda x, y: (x, torch.cat([x[:1], y[1:]])),  # a single pair saturated
    ],
)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_extreme_batches(loss, make, scale):
    image, text, scale = _inputs(65, 32, scale=scale)
    _assert_as_close_as_eager(loss, (*make(image, text), scale))


@pytest.mark.parametrize("scale", [200.0, -20.0])
def test_features_that_are_not_normalised(loss, scale):
    image, text, scale = _inputs(65, 32, scale=scale)
    lengths = torch.linspace(0.1, 9, 65).unsqueeze(1)
    _assert_as_close_as_eager(loss, (image * lengths, text * lengths.flip(0), scale))


@pytest.mark.parametrize(
    "ids",
    [torch.arange(33), torch.zeros(33).long(), torch.arange(33) // 2, -torch.arange(33) % 7],
)
def test_positives(loss, ids):
    _assert_as_close_as_eager(loss, _inputs(33, 16), positives=ids)


def test_positives_by_hand():
    image, text, scale = (t.double() for t in _inputs(4, 8))
    ids = torch.tensor([5, 9, 5, 1])
    target = (ids[:, None] == ids).double()
    target /= target.sum(1, keepdim=True)
    logits = scale * image @ text.T
    want = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(reference.clip_loss(image, text, scale, positives=ids), want)


def test_different_ids_are_no_ids(loss):
    inputs = _inputs(33, 16)
    for a, b in zip(
        _loss_and_grads(loss, inputs),
        _loss_and_grads(lambda *x: loss(*x, positives=torch.arange(33)), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_runs_are_equal_bit_for_bit(loss):
    inputs = _inputs(129, 64)
    for a, b in zip(_loss_and_grads(loss, inputs), _loss_and_grads(loss, inputs), strict=True):
        assert torch.equal(a, b)


def test_strides_do_not_matter(loss):
    image, text, scale = _inputs(33, 16)
    strided = image.T.contiguous().T, text.repeat(1, 2)[:, :16]
    for a, b in zip(
        _loss_and_grads(loss, (image, text, scale)),
        _loss_and_grads(loss, (*strided, scale)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_gradients_of_some_inputs_alone(loss, needs):
    inputs = _inputs(33, 16)
    want = _loss_and_grads(loss, inputs)[1:]
    leaves = [t.clone().requires_grad_(bool(need)) for t, need in zip(inputs, needs, strict=True)]
    loss(*leaves).backward()
    for leaf, need, grad in zip(leaves, needs, want, strict=True):
        if need:
            torch.testing.assert_close(leaf.grad, grad)
        else:
            assert leaf.grad is None


def test_a_second_backward_through_a_kept_graph(loss):
    leaves = [t.requires_grad_() for t in _inputs(9, 4)]
    value = loss(*leaves)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value * 2, leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_the_scale_may_be_a_number_or_one_element(loss):
    image, text, scale = _inputs(9, 4)
    want = loss(image, text, scale)
    torch.testing.assert_close(loss(image, text, 14.3), want)
    torch.testing.assert_close(loss(image, text, scale.reshape(1)), want)


def test_nan_features_make_the_loss_nan(loss):
    image, text, scale = _inputs(9, 4)
    image[3, 1] = torch.nan
    assert loss(image, text, scale).isnan()


def test_autocast_leaves_sums_in_fp32(loss):
    inputs = _inputs(33, 16)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*inputs)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(*inputs))


@pytest.mark.parametrize("impl", ["auto", "torch", "cpu", "reference"])
def test_compiles_to_one_graph(impl):
    compiled = torch.compile(
        lambda *a: clip_loss(*a, impl=impl), fullgraph=True, backend="aot_eager"
    )
    inputs = _inputs(33, 16)
    for got, want in zip(
        _loss_and_grads(compiled, inputs),
        _loss_and_grads(reference.clip_loss, inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positives", [None, torch.arange(33) // 2])
def test_registered_op_passes_opcheck(positives):
    image, text, scale = _inputs(33, 16)
    leaves = (image.requires_grad_(), text.requires_grad_(), scale.requires_grad_(), positives)
    torch.library.opcheck(torch.ops.medfast.clip_loss_fwd.default, leaves)


def test_memory_stays_within_the_workspace(loss, monkeypatch, largest_tensor):
    """B x B logits would be 36 MB; no tensor of the forward or the backward comes near."""
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "4")
    from medfast.ops.clip import chunked

    tiles = []
    original = chunked._tiles

    def watched(*args):
        for chunk, logits in original(*args):
            tiles.append(logits.numel() * logits.element_size())
            yield chunk, logits

    monkeypatch.setattr(chunked, "_tiles", watched)
    inputs = _inputs(3000, 8)
    with largest_tensor() as largest:
        _loss_and_grads(loss, inputs)
    assert tiles
    assert max(tiles) <= 4 * 2**20
    assert largest.bytes <= 4 * 2**20


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda i, t, s: (i, t[:3], s), r"\[4, 8\] and \[3, 8\]"),
        (lambda i, t, s: (i[0], t, s), r"image must be \[B, D\].* got \[8\]"),
        (lambda i, t, s: (i, t.double(), s), "text must be torch.float32"),
        (lambda i, t, s: (i.long(), t.long(), s), "image must be floating point"),
        (lambda i, t, s: (i[:0], t[:0], s), "no size of 0"),
        (lambda i, t, s: (i, t, torch.ones(2)), "logit_scale must be a number"),
        (lambda i, t, s: (i, t, "14"), "logit_scale must be a number"),
        (lambda i, t, s: (i.tolist(), t, s), "image must be a tensor"),
        (lambda i, t, s: (i, t.to("meta"), s), "text must be on cpu"),
    ],
)
def test_a_wrong_argument_is_named(change, says):
    with pytest.raises(ValueError, match=f"clip_loss: .*{says}"):
        clip_loss(*change(*_inputs(4, 8)))


@pytest.mark.parametrize("ids", [torch.zeros(3).long(), torch.zeros(4), torch.zeros(4, 1).long()])
def test_wrong_positives_are_named(ids):
    with pytest.raises(ValueError, match=r"positives must be torch.int64 \[4\]"):
        clip_loss(*_inputs(4, 8), positives=ids)


def test_an_unknown_implementation_names_the_nearest():
    with pytest.raises(ValueError, match=r"'tritn' is not known\. Did you mean 'triton'"):
        clip_loss(*_inputs(4, 8), impl="tritn")


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_explicit_request_is_refused_not_replaced(impl):
    with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run here: .* impl='auto'"):
        clip_loss(*_inputs(4, 8), impl=impl)


def test_fp64_is_not_rounded():
    image, text, scale = (t.double() for t in _inputs(9, 4))
    with pytest.raises(RuntimeError, match="fp64"):
        clip_loss(image, text, scale, impl="cpu")
    want = reference.clip_loss(image, text, scale)
    torch.testing.assert_close(
        clip_loss(image, text, scale, impl="torch"), want, rtol=1e-12, atol=0
    )


def test_the_example_in_the_docstring():
    assert doctest.testmod(api).failed == 0


@pytest.mark.parametrize("value", ["0", "-1", "many", "nan"])
def test_a_wrong_workspace_is_refused(monkeypatch, value):
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", value)
    with pytest.raises(ValueError, match="MEDFAST_WORKSPACE_MB must be a positive number"):
        clip_loss(*_inputs(4, 8), impl="torch")
