import doctest

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from medfast.ops import local_alignment_loss, word_patch_attention
from medfast.ops.local_alignment import api, reference

TEMPS = (4.0, 5.0, 10.0)
# B, P, T, D: one of everything; captions beyond a block of eight; no powers of two; one patch
SHAPES = [(1, 1, 1, 1), (2, 1, 3, 8), (3, 49, 32, 64), (19, 7, 5, 12), (9, 36, 77, 16)]


def _inputs(B, P, T, D, dtype=torch.float32, masked_patches=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(B, P, D, generator=generator).to(dtype)
    tokens = torch.randn(B, T, D, generator=generator).to(dtype)
    # Valid words anywhere in the caption, from one to all of them.
    token_mask = torch.rand(B, T, generator=generator) < torch.rand(B, 1, generator=generator)
    token_mask[:, T // 2] = True
    token_mask[-1] = True
    patch_mask = None
    if masked_patches:
        patch_mask = torch.rand(B, P, generator=generator) < 0.7
        patch_mask[:, 0] = True
    return patches, tokens, token_mask, patch_mask


def _loss_and_grads(fn, inputs, dtype=None):
    patches, tokens, token_mask, patch_mask = inputs
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (patches, tokens)]
    temps = [torch.tensor(t, dtype=dtype or torch.float32, requires_grad=True) for t in TEMPS]
    loss = fn(
        *leaves,
        token_mask,
        patch_mask=patch_mask,
        temp_attention=temps[0],
        temp_words=temps[1],
        temp_pairs=temps[2],
    )
    return [loss.detach(), *torch.autograd.grad(loss, leaves + temps)]


def _fused(*args, **kwargs):
    return local_alignment_loss(*args, impl="torch", **kwargs)


def _assert_as_close_as_eager(inputs):
    names = ("loss", "d_patches", "d_tokens", "d_temp_attention", "d_temp_words", "d_temp_pairs")
    truth = _loss_and_grads(reference.local_alignment_loss, inputs, torch.float64)
    eager = _loss_and_grads(reference.local_alignment_loss, inputs)
    found = _loss_and_grads(_fused, inputs)
    for name, want, low, got in zip(names, truth, eager, found, strict=True):
        assert got.dtype == low.dtype
        # A few roundings of terms of the size of the features, and of the temperatures' sums.
        band = 2e-5 * max(want.norm().item(), 0.2)
        error, allowed = (got - want).norm(), 2 * (low - want).norm() + band
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("masked_patches", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_close_to_fp64_as_eager(shape, dtype, masked_patches):
    _assert_as_close_as_eager(_inputs(*shape, dtype, masked_patches))


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference_in_fp64(shape, monkeypatch):
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "0.02")  # many tiles
    inputs = _inputs(*shape, masked_patches=True)
    for got, want in zip(
        _loss_and_grads(_fused, inputs, torch.float64),
        _loss_and_grads(reference.local_alignment_loss, inputs, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_reference_is_the_published_loop():
    """One caption at a time against all images, as published; both directions summed there."""
    patches, tokens, token_mask, _ = _inputs(5, 9, 7, 6)
    patches, tokens = patches.double(), tokens.double()
    columns = []
    for caption in range(5):
        words = tokens[caption, token_mask[caption]].expand(5, -1, -1)
        attention = (words @ patches.mT).softmax(1)
        attention = (TEMPS[0] * attention).softmax(2)
        context = attention @ patches
        cosine = F.cosine_similarity(words, context, dim=2)
        columns.append((TEMPS[1] * cosine).exp().sum(1).log())
    scores = TEMPS[2] * torch.stack(columns, 1)
    labels = torch.arange(5)
    want = (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2
    found = reference.local_alignment_loss(patches, tokens, token_mask)
    torch.testing.assert_close(found, want)


def test_reference_gradient_is_that_of_its_value():
    patches, tokens, token_mask, patch_mask = _inputs(3, 4, 3, 2, torch.float64, True)
    temps = [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in TEMPS]

    def fn(patches, tokens, *temps):
        names = ("temp_attention", "temp_words", "temp_pairs")
        settings = dict(zip(names, temps, strict=True))
        return reference.local_alignment_loss(
            patches, tokens, token_mask, patch_mask=patch_mask, **settings
        )

    assert gradcheck(fn, [patches.requires_grad_(), tokens.requires_grad_(), *temps])


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_what_is_masked_never_counts(impl, garbage):
    patches, tokens, token_mask, patch_mask = _inputs(4, 6, 5, 8, masked_patches=True)
    results = []
    for value in (0.0, garbage):
        p = patches.masked_fill(~patch_mask[..., None], value)
        w = tokens.masked_fill(~token_mask[..., None], value)
        results.append(
            _loss_and_grads(
                lambda *a, **k: local_alignment_loss(*a, impl=impl, **k),
                (p, w, token_mask, patch_mask),
            )
        )
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert (results[1][1][~patch_mask] == 0).all()
    assert (results[1][2][~token_mask] == 0).all()


def test_masked_is_the_same_as_left_out():
    patches, tokens, _, _ = _inputs(3, 6, 5, 8)
    token_mask = torch.arange(5) < 3
    patch_mask = torch.arange(6) < 4
    long = local_alignment_loss(
        patches, tokens, token_mask.expand(3, 5), patch_mask=patch_mask.expand(3, 6)
    )
    short = local_alignment_loss(patches[:, :4], tokens[:, :3], torch.ones(3, 3, dtype=torch.bool))
    torch.testing.assert_close(long, short)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 30.0])
def test_features_of_any_length(scale):
    patches, tokens, token_mask, _ = _inputs(5, 6, 5, 8)
    value, *grads = _loss_and_grads(_fused, (patches * scale, tokens, token_mask, None))
    want = reference.local_alignment_loss((patches * scale).double(), tokens.double(), token_mask)
    torch.testing.assert_close(value.double(), want, rtol=1e-4, atol=1e-5)
    assert all(grad.isfinite().all() for grad in grads)


def test_runs_are_equal_bit_for_bit():
    inputs = _inputs(19, 36, 20, 32)
    for a, b in zip(_loss_and_grads(_fused, inputs), _loss_and_grads(_fused, inputs), strict=True):
        assert torch.equal(a, b)


def test_strides_do_not_matter():
    patches, tokens, token_mask, _ = _inputs(5, 6, 5, 8)
    strided = patches.mT.contiguous().mT, tokens.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(_fused(*strided, token_mask), _fused(patches, tokens, token_mask))


@pytest.mark.parametrize("side", [0, 1])
def test_one_side_without_gradient(side):
    patches, tokens, token_mask, _ = _inputs(5, 6, 5, 8)
    want = _loss_and_grads(_fused, (patches, tokens, token_mask, None))[1 + side]
    leaves = [patches, tokens]
    leaves[side].requires_grad_()
    _fused(*leaves, token_mask).backward()
    torch.testing.assert_close(leaves[side].grad, want)
    assert leaves[1 - side].grad is None


def test_nan_features_make_the_loss_nan():
    patches, tokens, token_mask, _ = _inputs(3, 4, 3, 8)
    patches[1, 2, 3] = torch.nan
    assert _fused(patches, tokens, token_mask).isnan()


def test_autocast_leaves_sums_in_fp32():
    patches, tokens, token_mask, _ = _inputs(3, 4, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        value = _fused(patches, tokens, token_mask)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, _fused(patches, tokens, token_mask))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiles_to_one_graph(impl):
    patches, tokens, token_mask, _ = _inputs(5, 6, 5, 8)
    compiled = torch.compile(
        lambda *a: local_alignment_loss(*a, impl=impl), fullgraph=True, backend="aot_eager"
    )
    leaves = [patches.requires_grad_(), tokens.requires_grad_()]
    found = torch.autograd.grad(compiled(*leaves, token_mask), leaves)
    want = torch.autograd.grad(local_alignment_loss(*leaves, token_mask), leaves)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked_patches", [False, True])
def test_registered_op_passes_opcheck(masked_patches):
    patches, tokens, token_mask, patch_mask = _inputs(5, 6, 5, 8, masked_patches=masked_patches)
    temps = [torch.tensor(t, requires_grad=True) for t in TEMPS[:2]]
    args = (patches.requires_grad_(), tokens.requires_grad_(), token_mask, patch_mask, *temps)
    torch.library.opcheck(torch.ops.medfast.local_alignment_loss_fwd.default, args)


def test_memory_stays_within_the_workspace(monkeypatch, largest_tensor):
    """All pairs' similarities would be 40 MB; no tensor comes near."""
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "8")
    from medfast.ops.local_alignment import chunked

    tiles = []
    original = chunked._tile

    def watched(*args):
        tile = original(*args)
        tiles.append(sum(t.numel() * t.element_size() for t in tile))
        return tile

    monkeypatch.setattr(chunked, "_tile", watched)
    inputs = _inputs(128, 36, 40, 8)
    with largest_tensor() as largest:
        _loss_and_grads(_fused, inputs)
    assert tiles
    assert max(tiles) <= 8 * 2**20
    assert largest.bytes <= 8 * 2**20


def test_attention_is_the_one_of_the_loss():
    patches, tokens, token_mask, patch_mask = _inputs(4, 6, 5, 8, masked_patches=True)
    found = word_patch_attention(patches, tokens, token_mask, patch_mask=patch_mask)
    for i in range(4):
        words, seen = tokens[i, token_mask[i]], patches[i, patch_mask[i]]
        want = (TEMPS[0] * (words @ seen.T).softmax(0)).softmax(1)
        torch.testing.assert_close(found[i][token_mask[i]][:, patch_mask[i]], want)
    assert (found[~token_mask] == 0).all()
    assert (found.transpose(1, 2)[~patch_mask] == 0).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p, t, m: (p, t[:2], m), r"\[3, 4, 8\] and \[2, 5, 8\]"),
        (lambda p, t, m: (p, t[..., :4], m), "with one D"),
        (lambda p, t, m: (p[0], t, m), r"patches must be \[B, P, D\]"),
        (lambda p, t, m: (p, t, None), "token_mask must be torch.bool"),
        (lambda p, t, m: (p, t, m.float()), "token_mask must be torch.bool"),
        (lambda p, t, m: (p, t, m[:, :3]), r"token_mask must be torch.bool \[3, 5\]"),
        (lambda p, t, m: (p, t, m & torch.tensor([[1], [0], [1]]).bool()), "caption 1 with no"),
        (lambda p, t, m: (p, t.half(), m), "tokens must be torch.float32"),
    ],
)
def test_a_wrong_argument_is_named(change, says):
    patches, tokens, token_mask, _ = _inputs(3, 4, 5, 8)
    with pytest.raises(ValueError, match=f"local_alignment_loss: .*{says}"):
        local_alignment_loss(*change(patches, tokens, token_mask))


def test_a_caption_without_words_is_named_in_a_compiled_graph():
    patches, tokens, token_mask, _ = _inputs(3, 4, 5, 8)
    token_mask[1] = False
    compiled = torch.compile(local_alignment_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="caption 1 has no valid word"):
        compiled(patches, tokens, token_mask, impl="torch")


def test_an_image_without_patches_is_named():
    patches, tokens, token_mask, _ = _inputs(3, 4, 5, 8)
    patch_mask = torch.ones(3, 4, dtype=torch.bool)
    patch_mask[2] = False
    with pytest.raises(ValueError, match=r"patch_mask .* image 2 with no valid patch"):
        local_alignment_loss(patches, tokens, token_mask, patch_mask=patch_mask)


@pytest.mark.parametrize("impl", ["triton", "cuda", "cpu"])
def test_explicit_request_is_refused_not_replaced(impl):
    patches, tokens, token_mask, _ = _inputs(3, 4, 5, 8)
    with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run here: .* impl='auto'"):
        local_alignment_loss(patches, tokens, token_mask, impl=impl)


def test_the_example_in_the_docstring():
    assert doctest.testmod(api).failed == 0
