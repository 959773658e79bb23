import doctest

import pytest
import torch
import torch.nn.functional as F
from local_loss_checks import Batch, LocalLossChecks, batch

from medfast.ops import dispatch, local_alignment_loss, local_alignment_scores, word_patch_attention
from medfast.ops.dispatch import why_not
from medfast.ops.local_alignment import api, chunked, reference
from medfast.ops.local_alignment.autograd import pair_scores

TEMPS = {"temp_attention": 4.0, "temp_words": 5.0, "temp_pairs": 10.0}


class TestLocalAlignmentLoss(LocalLossChecks):
    name = "local_alignment_loss"
    function = staticmethod(local_alignment_loss)
    reference = staticmethod(reference.local_alignment_loss)
    scalars = TEMPS
    is_positional = False

    @pytest.mark.parametrize("workspace", ["256", "33", "1"])
    def test_what_is_kept_changes_nothing(self, loss, monkeypatch, workspace):
        """All products are kept, some of them, none."""
        monkeypatch.setenv("MEDFAST_WORKSPACE_MB", workspace)
        self.assert_as_close_as_eager(loss, self.inputs(16, 49, 40, 16), rounds=self.rounds)

    @pytest.mark.usefixtures("bf16_products")
    @pytest.mark.parametrize("workspace", ["256", "0.4", "0.01"])
    @pytest.mark.parametrize("sizes", [(9, 33, 40, 16), (5, 5, 200, 40)])
    def test_bf16_in_waves_of_images(self, monkeypatch, workspace, sizes):
        """All images at once, some, one; captions together or, too long for that, alone."""
        if why_not(self.name, "cpu") is not None:
            pytest.skip(why_not(self.name, "cpu"))
        monkeypatch.setenv("MEDFAST_WORKSPACE_MB", workspace)
        inputs = self.inputs(*sizes, dtype=torch.bfloat16, masked=True)
        loss = lambda *a, **k: self.function(*a, impl="cpu", **k)  # noqa: E731
        self.assert_as_close_as_eager(loss, inputs, rounds=True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_memory_stays_within_the_workspace(
        self, loss, bf16_products, monkeypatch, largest_tensor, dtype
    ):
        """All pairs' similarities would be 94 MB, or half of it; no tensor comes near.

        `bf16_products` comes after `loss`, which says that there are none.
        """
        monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "8")
        inputs = self.inputs(128, 36, 40, 8, dtype=dtype)
        with largest_tensor() as largest:
            self.loss_and_grads(loss, inputs)
        assert largest.bytes <= 8 * 2**20

    @pytest.mark.usefixtures("bf16_products")
    @pytest.mark.parametrize("impl", ["torch", "cpu"])
    @pytest.mark.parametrize("of_patches", [0.0, 1e-10, 1e-4, 1.0, 30.0, 1e4, 1e10])
    @pytest.mark.parametrize("of_words", [1e-10, 1.0, 1e4])
    def test_bf16_products_of_any_length(self, impl, of_patches, of_words):
        """Products that are stored in 16 bits neither overflow nor vanish."""
        patches, tokens, *masks = self.inputs(5, 19, 5, 8, dtype=torch.bfloat16)
        inputs = Batch(patches * of_patches, tokens * of_words, *masks)
        loss = lambda *a, **k: self.function(*a, impl=impl, **k)  # noqa: E731
        self.assert_as_close_as_eager(loss, inputs, rounds=True)

    @pytest.mark.usefixtures("bf16_products")
    @pytest.mark.parametrize("impl", ["torch", "cpu"])
    def test_bf16_products_of_unlike_lengths(self, impl):
        """Where one is a thousand times as long as another, each keeps its precision."""
        patches, tokens, *masks = self.inputs(6, 19, 5, 8, dtype=torch.bfloat16)
        lengths = 2.0 ** torch.linspace(-5, 5, 6, dtype=torch.bfloat16)[:, None, None]
        inputs = Batch(patches * lengths, tokens * lengths.flip(0), *masks)
        loss = lambda *a, **k: self.function(*a, impl=impl, **k)  # noqa: E731
        self.assert_as_close_as_eager(loss, inputs, rounds=True)

    @pytest.mark.parametrize("temperature", [-4.0, 0.0, 300.0])
    def test_any_attention_temperature(self, loss, temperature):
        scalars = [temperature, 5.0, 10.0]
        inputs = self.inputs(5, 6, 5, 8, masked=True)
        self.assert_as_close_as_eager(loss, inputs, scalars, rounds=self.rounds)


def test_reference_is_the_published_loop():
    """One caption at a time against all images, as published; both directions summed there."""
    patches, tokens, token_mask, _ = batch(5, 9, 7, 6)
    patches, tokens = patches.double(), tokens.double()
    columns = []
    for caption in range(5):
        words = tokens[caption, token_mask[caption]].expand(5, -1, -1)
        attention = (words @ patches.mT).softmax(1)
        attention = (4.0 * attention).softmax(2)
        context = attention @ patches
        cosine = F.cosine_similarity(words, context, dim=2)
        columns.append((5.0 * cosine).exp().sum(1).log())
    scores = 10.0 * torch.stack(columns, 1)
    labels = torch.arange(5)
    want = (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2
    found = reference.local_alignment_loss(patches, tokens, token_mask)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("impl", ["torch", "cpu", "reference"])
@pytest.mark.parametrize(("images", "captions"), [(1, 5), (7, 3), (20, 11)])
def test_images_of_one_rank_meet_captions_of_another(impl, images, captions):
    """Blocks of a larger batch give the blocks of its scores, and their gradients."""
    patches, tokens, token_mask, patch_mask = batch(20, 9, 7, 16, masked=True)
    whole = reference.local_alignment_scores(
        patches.double(), tokens.double(), token_mask, patch_mask=patch_mask
    )
    leaves = [patches[:images].clone(), tokens[-captions:].clone()]
    for leaf in leaves:
        leaf.requires_grad_()
    found = local_alignment_scores(
        *leaves, token_mask[-captions:], patch_mask=patch_mask[:images], impl=impl
    )
    want = whole[-captions:, :images]
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((found * weights).sum(), leaves)
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    scores = reference.local_alignment_scores(
        *twins, token_mask[-captions:], patch_mask=patch_mask[:images]
    )
    for got, want in zip(grads, torch.autograd.grad((scores * weights).sum(), twins), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_registered_op_passes_opcheck(impl, masked, needs_grad):
    patches, tokens, token_mask, patch_mask = batch(5, 6, 5, 8, masked=masked)
    token_mask.fill_(
        True
    )  # what is kept is as large as all words need, and beyond that not written
    leaves = [patches, tokens, torch.tensor(4.0), torch.tensor(5.0)]
    p, t, *temps = (leaf.requires_grad_(needs_grad) for leaf in leaves)
    args = (p, t, token_mask, patch_mask, *temps, impl, needs_grad)
    torch.library.opcheck(torch.ops.medfast.local_alignment_loss_fwd.default, args)


def test_products_are_kept_only_for_a_backward():
    patches, tokens, token_mask, _ = batch(5, 6, 5, 8)
    assert chunked.kept_entries(patches, tokens) == 2 * 30 * 25
    temps = torch.tensor(4.0), torch.tensor(5.0)
    args = (patches, tokens, token_mask, None, *temps)
    assert torch.ops.medfast.local_alignment_loss_fwd(*args, "cpu", False)[1].numel() == 0
    with torch.no_grad():
        assert not pair_scores(patches.requires_grad_(), *args[1:], "cpu").requires_grad


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize(("impl", "kept"), [("torch", 2 * 35 * 25), ("cpu", 0)])
def test_what_bf16_keeps(impl, kept):
    """csrc has what is between only in caches."""
    patches, tokens, token_mask, _ = batch(5, 7, 5, 8, dtype=torch.bfloat16)
    args = (patches, tokens, token_mask, None, torch.tensor(4.0), torch.tensor(5.0))
    assert torch.ops.medfast.local_alignment_loss_fwd(*args, impl, True)[1].numel() == kept


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 0.003])
def test_contexts_that_nearly_vanish(impl, dtype, mean):
    """The squares of their lengths are what large sums leave: no cosine is above 1 for that."""
    patches, tokens, token_mask, _ = batch(8, 49, 20, 64, torch.bfloat16)
    patches = patches.float() - patches.float().mean(1, keepdim=True)
    patches += mean * torch.randn(8, 1, 64, generator=torch.Generator().manual_seed(0))
    inputs = patches.to(dtype).requires_grad_(), tokens.to(dtype).requires_grad_(), token_mask
    scores = local_alignment_scores(*inputs, impl=impl)
    assert scores.isfinite().all()
    most = 5 * 1.001 + token_mask.sum(1).float().log()
    assert (scores.abs() <= most[:, None]).all()
    doubles = [x.detach().double().requires_grad_() for x in inputs[:2]]
    want = reference.local_alignment_scores(
        *doubles, token_mask, temp_attention=4.0, temp_words=5.0
    )
    torch.testing.assert_close(scores.double(), want, rtol=0, atol=0.1)
    grads = torch.autograd.grad(scores.sum(), inputs[:2])
    for got, exact in zip(grads, torch.autograd.grad(want.sum(), doubles), strict=True):
        assert (got.double() - exact).norm() <= 0.3 * exact.norm()


def test_attention_is_the_one_of_the_loss():
    patches, tokens, token_mask, patch_mask = batch(4, 6, 5, 8, masked=True)
    found = word_patch_attention(patches, tokens, token_mask, patch_mask=patch_mask)
    for i in range(4):
        words, seen = tokens[i, token_mask[i]], patches[i, patch_mask[i]]
        want = (4.0 * (words @ seen.T).softmax(0)).softmax(1)
        torch.testing.assert_close(found[i][token_mask[i]][:, patch_mask[i]], want)
    assert (found[~token_mask] == 0).all()
    assert (found.transpose(1, 2)[~patch_mask] == 0).all()


def test_attention_of_chosen_pairs():
    patches, tokens, token_mask, _ = batch(4, 6, 5, 8)
    images, captions = torch.tensor([2, 0, 2]), torch.tensor([1, 0, 3])
    found = word_patch_attention(patches[images], tokens[captions], token_mask[captions])
    alone = word_patch_attention(patches[2:3], tokens[3:], token_mask[3:])
    torch.testing.assert_close(found[2:], alone)


def test_scores_name_themselves_in_errors():
    inputs = batch(3, 4, 5, 8)
    with pytest.raises(ValueError, match=r"local_alignment_scores: patches must be \[M, P, D\]"):
        local_alignment_scores(*Batch(inputs.patches[0], *inputs[1:])[:3])


def test_captions_beyond_the_tiles_of_triton(monkeypatch):
    """Asked for by name it is refused, chosen it is replaced."""
    monkeypatch.setattr(dispatch, "_why_not_triton", lambda features: None)
    chosen = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *a: chosen.append(choose(*a)) or "triton")
    patches, tokens, token_mask, _ = batch(2, 3, 1025, 4)
    with pytest.raises(RuntimeError, match="up to 1025 words, its tiles room for 1024"):
        local_alignment_loss(patches, tokens, token_mask, impl="triton")
    torch.testing.assert_close(
        local_alignment_loss(patches, tokens, token_mask),
        reference.local_alignment_loss(patches, tokens, token_mask),
    )
    assert chosen[0] == "triton"


def test_the_example_in_the_docstring():
    assert doctest.testmod(api).failed == 0
