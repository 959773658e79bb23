"""What the kernels over all pairs of tokens compute: run by test_triton_token_kernels.py."""

import os

import pytest
import torch

from medfast.ops import triton_words
from medfast.ops.filip import reference as filip_reference
from medfast.ops.filip import triton as filip
from medfast.ops.local_alignment import reference as alignment_reference
from medfast.ops.local_alignment import triton as alignment

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# Under the interpreter a product of bf16 tiles is garbage.
DTYPES = [torch.float32, torch.float16] + ([] if IS_INTERPRETED else [torch.bfloat16])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# M images of P patches, N captions of T words, D features
SIZES = [(1, 1, 1, 1, 16), (3, 7, 2, 5, 20), (2, 49, 5, 9, 16), (2, 70, 2, 33, 16)]
if not IS_INTERPRETED:
    SIZES += [(5, 196, 9, 77, 200), (3, 361, 70, 128, 64), (33, 49, 40, 40, 512)]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every tensor that torch leaves empty holds NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _batch(M, P, N, T, D, dtype=torch.float32, masks=True, seed=0):
    """Features and masks; what is masked holds NaN and infinity."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(M, P, D, generator=generator) / D**0.25
    tokens = torch.randn(N, T, D, generator=generator) / D**0.25
    token_mask = torch.rand(N, T, generator=generator) < 0.6
    token_mask[:, T // 2] = True
    token_mask[0] = True
    patch_mask = None
    if masks:
        patch_mask = torch.rand(M, P, generator=generator) < 0.7
        patch_mask[:, P // 2] = True
        patches[~patch_mask] = torch.nan
        patch_mask = patch_mask.to(DEVICE)
    tokens[~token_mask] = torch.inf
    return (
        patches.to(DEVICE, dtype),
        tokens.to(DEVICE, dtype),
        token_mask.to(DEVICE),
        patch_mask,
    )


def _upstream(*shape, seed=1):
    """Gradients as those of a mean over the batch, most of them small."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 4
    return (d / len(d)).to(DEVICE)


def _double(inputs):
    """Inputs of the reference: fp64 leaves, on the CPU."""
    return [
        x if x is None else x.cpu() if x.dtype == torch.bool else x.double().cpu().requires_grad_()
        for x in inputs
    ]


def _assert_close(name, got, want, tolerance, floor=0.0):
    got = got.double().cpu()
    error, allowed = (got - want).norm(), tolerance * want.norm() + floor
    assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def _check_alignment(inputs, temp_attention=4.0, temp_words=5.0, tolerance=None):
    dtype = inputs[0].dtype
    tolerance = tolerance or TOLERANCE[dtype]
    temps = [torch.tensor(x, device=DEVICE) for x in (temp_attention, temp_words)]
    scores = alignment.forward(*inputs, *temps)
    patches, tokens, token_mask, patch_mask, *true_temps = _double([*inputs, *temps])
    truth = alignment_reference.local_alignment_scores(
        patches,
        tokens,
        token_mask,
        patch_mask=patch_mask,
        temp_attention=true_temps[0],
        temp_words=true_temps[1],
    )
    assert scores.dtype == torch.float32
    _assert_close("scores", scores, truth.detach(), tolerance)
    d_scores = _upstream(*truth.shape)
    wanted = torch.autograd.grad(truth, (patches, tokens, *true_temps), d_scores.double().cpu())
    grads = alignment.backward(d_scores, scores, *inputs, *temps)
    names = ("d_patches", "d_tokens", "d_temp_attention", "d_temp_words")
    for name, got, want in zip(names, grads, wanted, strict=True):
        assert got.shape == want.shape, name
        # The gradients of scalars are sums of terms that cancel.
        floor = tolerance * d_scores.norm().item() * 4 if want.ndim == 0 else 1e-7
        _assert_close(name, got, want, 3 * tolerance, floor)
    return scores, grads


def _check_filip(inputs, tolerance=None):
    dtype = inputs[0].dtype
    tolerance = tolerance or {torch.float32: 3e-6}.get(dtype, TOLERANCE[dtype])
    *scores, best_patch, best_word = filip.forward(*inputs, True)
    patches, tokens, token_mask, patch_mask = _double(inputs)
    truth = filip_reference.filip_scores(patches, tokens, token_mask, patch_mask=patch_mask)
    for name, got, want in zip(("image_to_text", "text_to_image"), scores, truth, strict=True):
        assert got.dtype == torch.float32
        _assert_close(name, got, want.detach(), 3e-6)
    d_scores = [_upstream(*x.shape, seed=k) for k, x in enumerate(truth)]
    wanted = torch.autograd.grad(truth, (patches, tokens), [d.double().cpu() for d in d_scores])
    grads = filip.backward(*d_scores, *inputs, best_patch, best_word, True, True)
    for name, got, want in zip(("d_patches", "d_tokens"), grads, wanted, strict=True):
        assert got.shape == want.shape, name
        _assert_close(name, got, want, tolerance)
    return scores, best_patch, best_word, grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_local_alignment_loss(sizes, dtype):
    _check_alignment(_batch(*sizes, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_filip_loss(sizes, dtype):
    _check_filip(_batch(*sizes, dtype=dtype))


def test_no_patch_mask():
    inputs = _batch(2, 20, 3, 5, 16, masks=False)
    _check_alignment(inputs)
    _check_filip(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temp_attention", [-3.0, 1000.0, -1000.0])
def test_local_alignment_loss_of_extreme_temperatures(temp_attention, dtype):
    inputs = _batch(2, 35, 2, 5, 16, dtype=dtype)
    tolerance = TOLERANCE[dtype] * max(1.0, abs(temp_attention) / 20)
    _check_alignment(inputs, temp_attention, 5.0, tolerance)
    _check_alignment(inputs, 4.0, 100.0, 20 * TOLERANCE[dtype])


def test_small_features_in_fp16_have_gradients():
    patches, tokens, *masks = _batch(2, 20, 3, 5, 16, dtype=torch.float16)
    _check_alignment((patches / 32, tokens / 32, *masks))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vectors(dtype):
    patches, tokens, token_mask, patch_mask = _batch(2, 20, 3, 5, 16, dtype=dtype, masks=False)
    patches[0, 3], patches[1] = 0, 0
    _check_filip((patches, tokens, token_mask, patch_mask))
    temps = [torch.tensor(x, device=DEVICE) for x in (4.0, 5.0)]
    tokens[1, 0], token_mask[1, 0] = 0, True
    inputs = (patches, tokens, token_mask, patch_mask)
    scores = alignment.forward(*inputs, *temps)
    truth = alignment_reference.local_alignment_scores(
        patches.double(), tokens.double(), token_mask
    )
    _assert_close("scores", scores, truth.cpu(), TOLERANCE[dtype])
    for grad in alignment.backward(torch.ones_like(scores), scores, *inputs, *temps):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_contexts_that_nearly_vanish(dtype):
    """Whatever rounding leaves of their lengths, no cosine is above 1."""
    patches, tokens, token_mask, _ = _batch(4, 49, 4, 20, 16, masks=False)
    patches = (patches - patches.mean(1, keepdim=True)).to(dtype)
    temps = torch.tensor(0.0, device=DEVICE), torch.tensor(5.0, device=DEVICE)
    inputs = (patches, tokens.to(dtype), token_mask, None)
    scores = alignment.forward(*inputs, *temps)
    most = 5 * 1.001 + token_mask.sum(1).float().log()
    assert (scores.abs() <= most[:, None]).all()
    grads = alignment.backward(torch.ones_like(scores), scores, *inputs, *temps)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("side", [0, 1])
def test_nan_that_counts_is_seen(side):
    inputs = _batch(3, 20, 3, 5, 16)
    features = inputs[side]
    counts = inputs[3] if side == 0 else inputs[2]
    features[1, counts[1].nonzero()[-1, 0], 3] = torch.nan
    image_to_text, text_to_image, *_ = filip.forward(*inputs, True)
    temps = [torch.tensor(x, device=DEVICE) for x in (4.0, 5.0)]
    scores = alignment.forward(*inputs, *temps)
    is_nan = torch.zeros(3, 3, dtype=torch.bool, device=DEVICE)
    is_nan[:, 1] = True  # captions x images
    is_nan = is_nan if side == 0 else is_nan.T
    for found in (image_to_text.T, text_to_image, scores):
        assert torch.equal(found.isnan(), is_nan)


def test_captions_without_words_and_images_without_patches_are_no_numbers():
    patches, tokens, token_mask, patch_mask = _batch(3, 20, 4, 5, 16)
    token_mask[1], patch_mask[2] = False, False
    inputs = (patches, tokens, token_mask, patch_mask)
    temps = [torch.tensor(x, device=DEVICE) for x in (4.0, 5.0)]
    image_to_text, text_to_image, *_ = filip.forward(*inputs, True)
    scores = alignment.forward(*inputs, *temps)
    for found in (image_to_text.T, text_to_image, scores):
        is_number = found.isfinite()
        assert not is_number[1].any()
        assert not is_number[:, 2].any()
        assert is_number[[0, 2, 3]][:, :2].all()


def test_the_first_of_equal_maxima_counts():
    patches, tokens, token_mask, _ = _batch(2, 40, 2, 33, 16, masks=False)
    patches[:, 5] = patches[:, 37] = patches[:, 9]
    tokens[:, 20] = tokens[:, 2]
    token_mask[:, [2, 20]] = True
    inputs = (patches, tokens, token_mask, None)
    _, best_patch, best_word, _ = _check_filip(inputs)
    similarity = torch.einsum("itd,jpd->ijtp", tokens.double().nan_to_num(), patches.double())
    for n in range(2):
        valid = similarity[n, :, token_mask[n]]
        assert torch.equal(best_patch[n, :, : valid.shape[1]].long(), valid.max(2).indices)
        assert torch.equal(best_word[n].long(), valid.max(1).indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_workspace_and_strides_do_not_matter(dtype, monkeypatch):
    inputs = _batch(3, 20, 5, 9, 16, dtype=dtype)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    want = _check_alignment(inputs)
    want_filip = _check_filip(inputs)
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "0.004")
    for given in (inputs, strided):
        scores, grads = _check_alignment(given)
        assert torch.equal(scores, want[0])
        for a, b in zip(grads, want[1], strict=True):
            _assert_close("grad", a, b.double().cpu(), 2e-6, 1e-6)
        scores, *_, grads = _check_filip(given)
        for a, b in zip(scores, want_filip[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_equal_bit_for_bit(dtype):
    inputs = _batch(2, 20, 3, 9, 16, dtype=dtype)
    first, second = ((_check_alignment(inputs), _check_filip(inputs)) for _ in range(2))
    for a, b in zip(_tensors(first), _tensors(second), strict=True):
        assert torch.equal(a, b)


def _tensors(nested):
    if isinstance(nested, torch.Tensor):
        # Entries of words and patches that do not count mean nothing.
        yield from [nested] if nested.is_floating_point() else []
    else:
        for x in nested:
            yield from _tensors(x)


def test_one_side_without_gradient():
    inputs = _batch(2, 20, 3, 9, 16)
    scores, best_patch, best_word, (d_patches, d_tokens) = _check_filip(inputs)
    upstream = [_upstream(*x.shape, seed=k) for k, x in enumerate(scores)]
    best = (best_patch, best_word)
    found = filip.backward(*upstream, *inputs, *best, True, False)
    assert found[1] is None
    assert torch.equal(found[0], d_patches)
    found = filip.backward(*upstream, *inputs, *best, False, True)
    assert found[0] is None
    assert torch.equal(found[1], d_tokens)
    assert all(x.numel() == 0 for x in filip.forward(*inputs, False)[2:])


def test_packed_words_are_those_that_count():
    _, tokens, token_mask, _ = _batch(1, 1, 6, 21, 16)
    token_mask[2] = False
    packed = triton_words.pack(tokens, token_mask, 16, is_interpreted=True)
    count = token_mask.sum()
    assert packed.starts[-1] == count
    assert packed.words.isfinite().all()
    assert (packed.words[count:] == 0).all()
    restored = packed.unpack(packed.words, tokens)
    assert torch.equal(restored, tokens.masked_fill(~token_mask[..., None], 0))
    # Captions without a word have a first piece, the others as many as they need.
    pieces = (packed.counts + 15).div(16, rounding_mode="floor").clamp(min=1)
    assert packed.buckets[-1] == pieces.sum()
