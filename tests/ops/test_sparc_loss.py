import doctest

import pytest
import torch
import torch.nn.functional as F
from local_loss_checks import LocalLossChecks, batch

from medfast.ops import sparc_loss
from medfast.ops.packing import valid
from medfast.ops.sparc import api, reference

IMPLS = ["torch", "cpu", "reference"]


class TestSparcLoss(LocalLossChecks):
    name = "sparc_loss"
    function = staticmethod(sparc_loss)
    reference = staticmethod(reference.sparc_loss)
    scalars = {"logit_scale": 14.3}  # noqa: RUF012

    def is_clear(self, inputs, threshold=None):
        """No share is within rounding of the threshold, no extreme has a rival."""
        patches = valid(inputs.patches, inputs.patch_mask).double()
        similarity = valid(inputs.tokens, inputs.token_mask).double() @ patches.mT
        mask = inputs.patch_mask
        mask = torch.ones_like(similarity[:, 0], dtype=torch.bool) if mask is None else mask
        counts = mask.sum(1)[:, None, None]
        mask = mask[:, None].expand_as(similarity)
        low, high = (
            similarity.masked_fill(~mask, fill).sort(-1).values for fill in (torch.inf, -torch.inf)
        )
        spread = high[..., -1:] - low[..., :1]
        shares = (similarity - low[..., :1]) / spread.clamp_min(1e-30)
        least = 1 / counts if threshold is None else threshold
        margins = (shares - least).abs()[mask & (spread > 0).expand_as(mask)]
        if threshold in (0.0, 1.0):  # only the lowest or the highest is there, exactly
            margins = margins[margins > 0]
        margins = torch.cat([margins, torch.ones(1, dtype=margins.dtype)])
        return margins.min() > 2e-6 or (margins < 2e-6).double().mean() < 2e-5

    @pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
    def test_a_threshold_of_ones_own(self, loss, threshold):
        self.is_clear = lambda inputs: TestSparcLoss.is_clear(self, inputs, threshold)
        inputs = self.inputs(5, 9, 7, 8, masked=True)
        reference_of = self.reference
        self.reference = lambda *a, **k: reference_of(*a, threshold=threshold, **k)
        fn = lambda *a, **k: loss(*a, threshold=threshold, **k)  # noqa: E731
        self.assert_as_close_as_eager(fn, inputs, rounds=self.rounds)

    def test_memory_stays_within_the_workspace(self, loss, monkeypatch, largest_tensor):
        """All similarities at once would be 3.7 MB; no tensor comes near."""
        monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "0.5")
        inputs = self.inputs(64, 196, 77, 4)
        with largest_tensor() as largest:
            self.loss_and_grads(loss, inputs)
        assert largest.bytes <= 0.5 * 2**20


def test_reference_is_the_published_loop():
    """One caption at a time, its valid words and patches alone."""
    patches, tokens, token_mask, patch_mask = batch(5, 9, 7, 6, masked=True)
    patches, tokens = patches.double(), tokens.double()
    losses = []
    for i in range(5):
        words, seen = tokens[i, token_mask[i]], patches[i, patch_mask[i]]
        similarity = words @ seen.T
        low, high = similarity.min(1, keepdim=True).values, similarity.max(1, keepdim=True).values
        weights = (similarity - low) / (high - low) if len(seen) > 1 else torch.ones_like(low)
        weights = torch.where(weights < 1 / len(seen), 0.0, weights)
        weights = weights / weights.sum(1, keepdim=True)
        contexts, words = F.normalize(weights @ seen, dim=1), F.normalize(words, dim=1)
        logits = 9.0 * contexts @ words.T
        labels = torch.arange(len(words))
        losses.append((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2)
    found = reference.sparc_loss(patches, tokens, token_mask, 9.0, patch_mask=patch_mask)
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_weights_by_hand():
    similarity = torch.tensor([[0.0, 1.0, 2.0, 4.0], [3.0, 3.0, 3.0, 3.0], [8.0, 1.0, 9.0, 2.0]])
    mask = torch.tensor([[True] * 4, [True] * 4, [True, True, False, True]])
    # A share equal to the threshold counts: 1 of 0 to 4 is 1/4.
    want = [[0, 1 / 7, 2 / 7, 4 / 7], [0.25] * 4, [1, 0, 0, 0]]
    torch.testing.assert_close(reference.align(similarity, mask, None), torch.tensor(want))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_share_at_the_threshold_counts(impl):
    """The similarities 0, 1, 2, 4 are exact in any order of summing; 1 is 1/4 of their range."""
    patches = torch.tensor([[[0.0, 1, 0], [1, 0, 5], [2, 0, 0], [4, 0, 0]]])
    tokens = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    for threshold, context in ((None, [3.0, 0, 5 / 7]), (0.25, [3, 0, 5 / 7]), (0.26, [3.0, 0, 0])):
        logits = 5 * F.normalize(torch.tensor([context, [0.0, 1, 0]]), dim=1) @ tokens[0].T
        labels = torch.arange(2)
        want = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        found = sparc_loss(patches, tokens, mask, 5.0, threshold=threshold, impl=impl)
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_word_that_likes_all_patches_equally_sees_their_mean(impl):
    patches = torch.tensor([[[1.0, 2, 0], [1, 0, 2], [1, 4, 4]]], requires_grad=True)
    tokens = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    value = sparc_loss(patches, tokens, mask, 3.0, impl=impl)
    contexts = torch.tensor([[1.0, 2, 2], [1, 4 * 2 / 3 + 2 / 3, 4 * 2 / 3]])
    logits = 3 * F.normalize(contexts, dim=1) @ tokens[0].T
    labels = torch.arange(2)
    want = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(value, want)
    grads = torch.autograd.grad(value, (patches, tokens))
    twins = [t.detach().double().requires_grad_() for t in (patches, tokens)]
    wants = torch.autograd.grad(reference.sparc_loss(*twins, mask, 3.0), twins)
    for got, want in zip(grads, wants, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan"), "a", torch.tensor(0.5)])
def test_a_wrong_threshold_is_named(threshold):
    patches, tokens, token_mask, _ = batch(3, 4, 5, 8)
    with pytest.raises(ValueError, match="sparc_loss: threshold must be a number from 0 to 1"):
        sparc_loss(patches, tokens, token_mask, 5.0, threshold=threshold)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("needs", [[True, True, True], [False, True, False], [False] * 3])
def test_registered_op_passes_opcheck(impl, needs):
    patches, tokens, token_mask, patch_mask = batch(5, 6, 5, 8, masked=True)
    leaves = (patches, tokens, torch.tensor(9.0))
    p, t, scale = (leaf.requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True))
    args = (p, t, token_mask, patch_mask, scale, None, impl, needs)
    torch.library.opcheck(torch.ops.medfast.sparc_loss_fwd.default, args)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_a_scaled_loss_lifts_small_gradients_of_fp16(impl):
    """As a gradient scaler does: without the scale many of these are 0 in fp16."""
    patches, tokens, token_mask, _ = batch(8, 6, 5, 8, dtype=torch.float16)
    leaves = [(100 * t).requires_grad_() for t in (patches, tokens)]
    value = sparc_loss(*leaves, token_mask, 1e-2, impl=impl)
    small = torch.autograd.grad(value, leaves[1], retain_graph=True)[0]
    lifted = torch.autograd.grad(2.0**16 * value, leaves[1])[0]
    twins = [t.detach().double().requires_grad_() for t in leaves]
    want = torch.autograd.grad(reference.sparc_loss(*twins, token_mask, 1e-2), twins[1])[0]
    assert (small.double() - want).norm() > 0.02 * want.norm()
    torch.testing.assert_close(lifted.double() / 2**16, want, rtol=1e-3, atol=1e-9)


def test_the_example_in_the_docstring():
    assert doctest.testmod(api).failed == 0
