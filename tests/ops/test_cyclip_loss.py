import doctest
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from medfast.ops import cyclip_loss
from medfast.ops.cyclip import api, chunked, reference

NAMES = [f"{name} of {term}" for term in ("cross", "in") for name in ("term", "d_image", "d_text")]
# 1 = nothing to compare with; both sides of B = D; D = 1 and 3 are no power of two
SIZES = [(B, D) for B in (1, 2, 3, 127, 128, 129, 1000) for D in (1, 3, 64, 512)]

torch_loss = partial(cyclip_loss, impl="torch")


def _inputs(B, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(B, D, generator=generator), dim=-1) for _ in range(2))
    return image.to(dtype), text.to(dtype)


def _terms_and_grads(fn, inputs, dtype=None):
    """Return each term with its gradients, as in NAMES."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    found = []
    for index in range(2):
        term = fn(*leaves)[index]
        found += [term.detach(), *torch.autograd.grad(term, leaves)]
    return found


def _assert_as_close_as_eager(fn, inputs):
    """The error against fp64, in norm, is at most twice that of the reference in the same dtype.

    Beyond that, a few roundings of the products that are summed: where they cancel, eager may be
    right by luck.
    """
    truth = _terms_and_grads(reference.cyclip_loss, inputs, torch.float64)
    eager = _terms_and_grads(reference.cyclip_loss, inputs)
    found = _terms_and_grads(fn, inputs)
    image, text = (t.double() for t in inputs)
    p, q = image - text, image + text
    pp, qq, pq = (gram.norm() for gram in chunked.grams(p, q))
    d_p, d_q = p.norm() * qq + q.norm() * pq, q.norm() * pp + p.norm() * pq
    band = 8 * torch.finfo(torch.float32).eps / len(image)
    bands = (band * pp * qq, *[2 * band * (d_p + d_q)] * 2) * 2
    for name, want, low, got, more in zip(NAMES, truth, eager, found, bands, strict=True):
        assert got.dtype == low.dtype
        error, allowed = (got - want).norm(), 2 * (low - want).norm() + more
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "D"), SIZES)
def test_is_as_close_to_fp64_as_eager(B, D, dtype):
    _assert_as_close_as_eager(torch_loss, _inputs(B, D, dtype))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(("B", "D"), [(4, 8), (8, 4)])
def test_is_the_published_formula(B, D, impl):
    x, y = _inputs(B, D, torch.float64)
    cross_modal = in_modal = 0.0
    for i in range(B):
        for j in range(B):
            cross_modal += (x[i] @ y[j] - y[i] @ x[j]) ** 2 / B
            in_modal += (x[i] @ x[j] - y[i] @ y[j]) ** 2 / B
    found = cyclip_loss(x, y, impl=impl)
    for got, want in zip(found, (cross_modal, in_modal), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("fn", [reference.cyclip_loss, chunked.cyclip_loss])
@pytest.mark.parametrize(("B", "D"), [(3, 5), (5, 3)])
def test_gradient_is_that_of_the_value(B, D, fn):
    assert gradcheck(fn, [t.requires_grad_() for t in _inputs(B, D, torch.float64)])


@pytest.mark.parametrize(("B", "D"), [(129, 64), (127, 512)])
def test_relative_accuracy_stays_where_the_modalities_almost_agree(B, D):
    image, noise = _inputs(B, D)
    inputs = image, image + 1e-4 * noise
    truth = _terms_and_grads(reference.cyclip_loss, inputs, torch.float64)
    found = _terms_and_grads(torch_loss, inputs)
    for name, want, got in zip(NAMES, truth, found, strict=True):
        error = (got - want).norm() / want.norm()
        assert error < 1e-6, f"{name}: {error:.2e}"


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (x, -x),
        lambda x, y: (x[:1].expand_as(x), y[:1].expand_as(y)),  # identical rows
        lambda x, y: (x, torch.zeros_like(y)),
        lambda x, y: (torch.zeros_like(x), torch.zeros_like(y)),
        lambda x, y: (100 * x, y * torch.linspace(0.1, 9, len(y))[:, None]),
        lambda x, y: (x, x.roll(1, 1)),  # rotated: the in-modal term is 0
        lambda x, y: (x, x * torch.linspace(0.1, 1, x.shape[1])),  # the cross-modal term is 0
        lambda x, y: (F.normalize(x + 3 * x[0], dim=1), F.normalize(y - 3 * x[0], dim=1)),
    ],
)
@pytest.mark.parametrize(("B", "D"), [(129, 64), (65, 128)])
def test_extreme_batches(B, D, make):
    _assert_as_close_as_eager(torch_loss, make(*_inputs(B, D)))


@pytest.mark.parametrize(("B", "D"), [(129, 64), (65, 128)])
def test_equal_modalities_cost_exactly_nothing(B, D):
    image, _ = _inputs(B, D)
    for value in _terms_and_grads(torch_loss, (image, image)):
        assert not value.any()


@pytest.mark.parametrize("D", [1, 8])
def test_a_single_pair_has_nothing_to_cross(D):
    assert torch_loss(*_inputs(1, D))[0] == 0


def test_grams_of_parts_add_up_to_those_of_the_batch():
    image, text = _inputs(90, 16, torch.float64)
    p, q = image - text, image + text
    parts = zip(chunked.grams(p[:31], q[:31]), chunked.grams(p[31:], q[31:]), strict=True)
    found = chunked.from_grams(*(a + b for a, b in parts), 90)
    torch.testing.assert_close(found, reference.cyclip_loss(image, text))


@pytest.mark.parametrize(("B", "D"), [(129, 64), (64, 128)])
def test_runs_are_equal_bit_for_bit(B, D):
    inputs = _inputs(B, D)
    for a, b in zip(
        _terms_and_grads(torch_loss, inputs), _terms_and_grads(torch_loss, inputs), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("B", "D"), [(129, 64), (64, 128)])
def test_no_uninitialised_memory_is_read(uninitialised_is_nan, B, D):
    _assert_as_close_as_eager(torch_loss, _inputs(B, D))


@pytest.mark.parametrize(("B", "D"), [(33, 16), (16, 33)])
def test_strides_do_not_matter(B, D):
    image, text = _inputs(B, D)
    strided = image.T.contiguous().T, text.repeat(1, 2)[:, :D]
    for a, b in zip(
        _terms_and_grads(torch_loss, (image, text)),
        _terms_and_grads(torch_loss, strided),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("term", [0, 1])
def test_gradient_of_one_side_alone(side, term):
    inputs = _inputs(33, 16)
    want = _terms_and_grads(torch_loss, inputs)[3 * term + 1 + side]
    inputs[side].requires_grad_()
    torch_loss(*inputs)[term].backward()
    torch.testing.assert_close(inputs[side].grad, want)
    assert inputs[1 - side].grad is None


def test_a_second_backward_through_a_kept_graph():
    leaves = [t.requires_grad_() for t in _inputs(9, 4)]
    value = sum(torch_loss(*leaves))
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value * 2, leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize(("B", "D"), [(9, 4), (4, 9)])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_nan_features_make_both_terms_nan(B, D, impl):
    image, text = _inputs(B, D)
    image[3, 1] = torch.nan
    assert all(term.isnan() for term in cyclip_loss(image, text, impl=impl))


@pytest.mark.parametrize(("B", "D"), [(33, 16), (16, 33)])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_autocast_leaves_sums_in_fp32(B, D, impl):
    inputs = _inputs(B, D)
    with torch.autocast("cpu", torch.bfloat16):
        terms = cyclip_loss(*inputs, impl=impl)
    for got, want in zip(terms, cyclip_loss(*inputs, impl=impl), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_terms_are_fp32_scalars(dtype):
    for term in torch_loss(*_inputs(9, 4, dtype)):
        assert term.dtype == torch.float32
        assert term.shape == ()


@pytest.mark.parametrize(
    ("B", "D", "backend"),
    [
        (33, 16, "aot_eager"),
        (16, 33, "aot_eager"),
        pytest.param(
            *(33, 16, "inductor"),
            marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
        ),
    ],
)
def test_compiles_to_one_graph(B, D, backend):
    compiled = torch.compile(lambda *a: cyclip_loss(*a), fullgraph=True, backend=backend)
    inputs = _inputs(B, D)
    for got, want in zip(
        _terms_and_grads(compiled, inputs),
        _terms_and_grads(reference.cyclip_loss, inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("B", "D"), [(3000, 8), (129, 128), (64, 512)])
def test_no_tensor_is_larger_than_the_features(B, D, largest_tensor):
    inputs = _inputs(B, D)
    with largest_tensor() as largest:
        _terms_and_grads(torch_loss, inputs)
    assert largest.bytes == inputs[0].nbytes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda i, t: (i, t[:3]), r"\[4, 8\] and \[3, 8\]"),
        (lambda i, t: (i[0], t), r"image must be \[B, D\].* got \[8\]"),
        (lambda i, t: (i, t.double()), "text must be torch.float32"),
        (lambda i, t: (i.long(), t.long()), "image must be floating point"),
        (lambda i, t: (i[:0], t[:0]), "no size of 0"),
        (lambda i, t: (i.tolist(), t), "image must be a tensor"),
        (lambda i, t: (i, t.to("meta")), "text must be on cpu"),
    ],
)
def test_a_wrong_argument_is_named(change, says):
    with pytest.raises(ValueError, match=f"cyclip_loss: .*{says}"):
        cyclip_loss(*change(*_inputs(4, 8)))


@pytest.mark.parametrize("impl", ["triton", "cuda", "cpu"])
def test_explicit_request_is_refused_not_replaced(impl):
    with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run here: .* impl='auto'"):
        cyclip_loss(*_inputs(4, 8), impl=impl)


def test_an_unknown_implementation_names_the_nearest():
    with pytest.raises(ValueError, match=r"'tritn' is not known\. Did you mean 'triton'"):
        cyclip_loss(*_inputs(4, 8), impl="tritn")


def test_the_example_in_the_docstring():
    assert doctest.testmod(api).failed == 0
