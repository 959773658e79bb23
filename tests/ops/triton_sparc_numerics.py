"""What sparc_loss's Triton kernels compute: run by test_triton_sparc_kernels.py."""

import os

import pytest
import torch

from medfast.ops.sparc import reference
from medfast.ops.sparc import triton as sparc
from medfast.ops.sparc.autograd import sparc_loss_fwd

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# Under the interpreter a product of bf16 blocks is garbage.
DTYPES = [torch.float32, torch.float16] + ([] if IS_INTERPRETED else [torch.bfloat16])
# Of sums in fp32, and of contexts, weights and gradients that are rounded to the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
NAMES = ("loss", "d_patches", "d_tokens", "d_scale")
# What a relative error is relative to at least: terms of this order may cancel.
FLOOR = {"loss": 1e-2, "d_patches": 1e-3, "d_tokens": 1e-3, "d_scale": 3e-2}
# Patches, words, features: blocks are of 16 under the interpreter. 1 = a constant row, or no other
# words; 33 straddles blocks; D of 3 and 20 end within a block.
SIZES = [(1, 5, 20), (7, 33, 3), (49, 5, 40), (49, 1, 16), (70, 5, 20)]
if not IS_INTERPRETED:
    # The same corners, for blocks of up to 64 patches, 32 words and 32 features.
    SIZES += [(196, 77, 512), (361, 130, 100), (65, 33, 72)]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every tensor that torch leaves empty holds NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _inputs(P, T, D, dtype=torch.float32, B=2, seed=0):
    """Return patches, tokens and their masks; what is masked holds NaN and infinity."""
    generator = torch.Generator().manual_seed(seed)
    patches, tokens = (torch.randn(B, n, D, generator=generator).to(dtype) for n in (P, T))
    patch_mask, token_mask = (torch.rand(B, n, generator=generator) < 0.7 for n in (P, T))
    # Valid words are anywhere; the first caption is full, and no pair is without any.
    patch_mask[:, -1] = token_mask[:, 0] = token_mask[0] = True
    patches[~patch_mask], tokens[~token_mask] = torch.nan, torch.inf
    return tuple(x.to(DEVICE) for x in (patches, tokens, token_mask, patch_mask))


def _truth(patches, tokens, token_mask, patch_mask, scale, threshold):
    """Return the reference's loss and gradients in fp64."""
    x, y = (z.cpu().double().requires_grad_() for z in (patches, tokens))
    masks = [mask if mask is None else mask.cpu() for mask in (token_mask, patch_mask)]
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    loss = reference.sparc_loss(x, y, masks[0], s, patch_mask=masks[1], threshold=threshold)
    return [loss.detach(), *torch.autograd.grad(loss, (x, y, s))]


def _is_near_threshold(patches, tokens, token_mask, patch_mask, threshold):
    """Return whether rounding may decide if a share counts. The highest is exactly 1."""
    patches, tokens = (x.cpu().double().nan_to_num(0, 0, 0) for x in (patches, tokens))
    token_mask = token_mask.cpu()
    counts = torch.ones(patches.shape[:2]).bool() if patch_mask is None else patch_mask.cpu()
    similarity = tokens @ patches.mT
    mask = counts[:, None]
    high = similarity.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    low = similarity.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    share = (similarity - low) / (high - low)
    least = 1 / mask.sum(-1, keepdim=True) if threshold is None else threshold
    between = mask & token_mask[..., None] & (share > 0) & (share < 1)
    return bool(((share - least).abs()[between.expand_as(share)] < 1e-5).any())


def _run(inputs, scale=10.0, threshold=None, needs_grad=True):
    scale = torch.tensor(scale, device=DEVICE)
    return sparc.forward(*inputs, scale, threshold, needs_grad)


def _check(inputs, scale=10.0, threshold=None):
    """Compare the kernels with the reference in fp64."""
    assert not _is_near_threshold(*inputs, threshold)
    dtype = inputs[0].dtype
    tolerance = TOLERANCE[dtype]
    found = _run(inputs, scale, threshold)
    truth = _truth(*inputs, scale, threshold)
    for name, got, want in zip(NAMES, found, truth, strict=True):
        is_bf16 = name in NAMES[1:3] and dtype == torch.bfloat16
        assert got.dtype == (torch.bfloat16 if is_bf16 else torch.float32), name
        assert got.shape == want.shape, name
        assert got.isfinite().all(), name
        error = (got.double().cpu() - want).norm().item()
        allowed = tolerance * (want.norm().item() + FLOOR[name])
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "T", "D"), SIZES)
def test_values_and_gradients(P, T, D, dtype):
    # Of very many shares one tends to be near the threshold.
    tries = (_inputs(P, T, D, dtype, seed=seed) for seed in range(50))
    _check(next(inputs for inputs in tries if not _is_near_threshold(*inputs, None)))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds(threshold, dtype):
    _check(_inputs(49, 5, 20, dtype), threshold=threshold)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_mask_of_patches(dtype):
    patches, tokens, token_mask, _ = _inputs(20, 7, 16, dtype)
    patches = patches.nan_to_num(0.5)
    _check((patches, tokens, token_mask, None))


@pytest.mark.parametrize("scale", [100.0, 0.0, -10.0])
def test_scales(scale):
    _check(_inputs(20, 18, 16), scale)


def test_small_losses_are_not_lost():
    """Each word is a patch, far from the others: the loss is about e^-50."""
    eye = torch.eye(16, device=DEVICE).expand(2, -1, -1)
    ones = torch.ones(2, 16, device=DEVICE, dtype=torch.bool)
    loss, *_ = _run((eye, eye, ones, None), 50.0, 0.5)
    want = _truth(eye, eye, ones, None, 50.0, 0.5)[0]
    assert 0 < want < 1e-20
    assert abs(loss.item() / want.item() - 1) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_features_of_any_length(dtype):
    """fp16 must neither overflow nor underflow where the features do not."""
    patches, tokens, *masks = _inputs(20, 5, 16, dtype)
    want = _run((patches, tokens, *masks))
    for factor in (2.0**-8, 2.0**8):
        found = _run((patches * factor, tokens / factor, *masks))
        assert abs(found[0] - want[0]) <= TOLERANCE[dtype]
        torch.testing.assert_close(found[1] * factor, want[1], rtol=0.02, atol=1e-4)
        torch.testing.assert_close(found[2] / factor, want[2], rtol=0.02, atol=1e-4)


def test_a_gradient_below_the_reach_of_fp16():
    patches, tokens, *masks = _inputs(20, 5, 16, torch.float16)
    # The loss hardly depends on logits that all are about 0.
    found = _run((patches, tokens, *masks), 1e-6)
    want = _truth(patches, tokens, *masks, 1e-6, None)
    for got, gradient in zip(found[1:3], want[1:3], strict=True):
        assert gradient.abs().max() < 2.0**-20
        assert (got.double().cpu() - gradient).norm() <= 2e-3 * gradient.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_word_that_is_equally_similar_to_all_patches_sees_their_mean(dtype):
    patches, tokens, token_mask, _ = _inputs(20, 5, 16, dtype)
    patches = patches.nan_to_num(0.5)
    # In the first image all patches are alike; to the first word of the second they seem so.
    patches[0] = patches[0, :1]
    patches[1, :, 0] = 1
    tokens[1, 0] = torch.eye(16)[0]
    _check((patches, tokens, token_mask, None))


def test_a_word_of_zeros():
    patches, tokens, token_mask, _ = _inputs(20, 5, 16)
    tokens[0, 1] = 0
    _check((patches.nan_to_num(0.5), tokens, token_mask, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_context_of_zeros(dtype):
    """Its gradient is of the order of 1 / MIN_NORM."""
    patches, tokens, token_mask, _ = _inputs(20, 5, 16, dtype)
    # Integers, whose sum is exact.
    patches = patches.nan_to_num(0.5).mul_(8).round_()
    patches[1, :, 0] = 0
    patches[1, 10:] = -patches[1, :10]
    tokens[1, 0] = torch.eye(16)[0]
    inputs = patches, tokens, token_mask, None
    assert not _is_near_threshold(*inputs, None)
    for name, got, want in zip(NAMES, _run(inputs), _truth(*inputs, 10.0, None), strict=True):
        assert (got.double().cpu() - want).norm() <= TOLERANCE[dtype] * want.norm(), name


def test_of_equal_patches_the_first_is_the_lowest():
    patches, tokens, token_mask, _ = _inputs(20, 5, 16)
    patches = patches.nan_to_num(0.5)
    patches[:, 10:] = patches[:, :10]
    inputs = patches, tokens, token_mask, None
    found = _check(inputs, threshold=0.3)
    want = _truth(*inputs, 10.0, 0.3)
    # Which of the equals gets the gradient shows in single rows.
    assert (found[1].double().cpu() - want[1]).abs().max() < 1e-6


@pytest.mark.parametrize("side", [0, 1])
def test_nan_in_what_counts_is_not_hidden(side):
    patches, tokens, token_mask, _ = _inputs(20, 5, 16)
    patches = patches.nan_to_num(0.5)
    (patches, tokens)[side][0, 0, 3] = torch.nan
    loss, d_patches, d_tokens, d_scale = _run((patches, tokens, token_mask, None))
    assert loss.isnan()
    assert d_scale.isnan()
    assert d_patches[0].isnan().any()
    assert d_tokens[0].isnan().any()
    assert d_patches[1].isfinite().all()
    assert d_tokens[1].isfinite().all()


@pytest.mark.parametrize("side", [2, 3])
def test_a_pair_without_words_or_patches_makes_the_loss_nan(side):
    inputs = _inputs(7, 3, 16)
    inputs[side][1] = False
    loss, d_patches, d_tokens, _ = _run(inputs)
    assert loss.isnan()
    assert d_patches[0].isfinite().all()
    assert d_tokens[0].isfinite().all()
    if side == 2:
        assert (d_patches[1] == 0).all()
        assert (d_tokens[1] == 0).all()


def test_gradients_that_nobody_needs_are_none():
    inputs = _inputs(7, 3, 16)
    loss, *gradients = _run(inputs, needs_grad=False)
    assert gradients == [None] * 3
    assert torch.equal(loss, _run(inputs)[0])


def test_slices_of_the_batch_change_nothing(monkeypatch):
    patches, tokens, *masks = _inputs(20, 5, 16, B=3)
    want = _run((patches, tokens, *masks))
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "0.001")
    for a, b in zip(_run((patches, tokens, *masks)), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_equal_bit_for_bit_and_strides_do_not_matter(dtype):
    patches, tokens, token_mask, patch_mask = _inputs(20, 5, 16, dtype)
    strided = (
        patches.mT.contiguous().mT,
        tokens.repeat(1, 1, 2)[..., :16],
        token_mask.T.contiguous().T,
        patch_mask.T.contiguous().T,
    )
    want = _run((patches, tokens, token_mask, patch_mask))
    for inputs in ((patches, tokens, token_mask, patch_mask), strided):
        for a, b in zip(_run(inputs), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("needs", [[True, True, True], [False, True, False], [False] * 3])
def test_the_op_runs_the_kernels(needs):
    inputs, scale = _inputs(7, 3, 20), torch.tensor(10.0, device=DEVICE)
    found = sparc_loss_fwd(*inputs, scale, None, "triton", needs)
    want = _run(inputs)
    assert torch.equal(found[0], want[0])
    for got, gradient, need in zip(found[1:], want[1:], needs, strict=True):
        assert got.is_contiguous()
        assert torch.equal(got, gradient) if need else got.numel() == 0


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a GPU")
def test_capture_in_a_graph():
    inputs, scale = _inputs(49, 9, 64), torch.tensor(10.0, device=DEVICE)
    torch.use_deterministic_algorithms(False)
    want = sparc.forward(*inputs, scale, None, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sparc.forward(*inputs, scale, None, True)
    graph.replay()
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)
